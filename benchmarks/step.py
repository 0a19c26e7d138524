"""Time whole training steps of a 6 + 6 layer model: forward, backward, clipping and optimiser, dense against MoE.

All models have the same active FLOPs: the MoE ones have experts of half the dense width, two for each token, in every
second layer. `fairseq` is its own Transformer, loss and Adam in fp32; the others are this project's, under bf16
autocast unless named fp32. They run in turn within one process, so all have the same allocator; in a real run only ours
asks for tcmalloc, which `benchmarks.training` shows.

    python -m benchmarks.step
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import base_architecture
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig

import fairseq_plugins  # noqa: F401, its repairs of fairseq are needed under a current torch
from benchmarks.machine import describe, restart_with_quick_environment
from benchmarks.report import machine_line, number, table
from benchmarks.timing import alternate
from fairseq_plugins.criterions.label_smoothed_cross_entropy import (
    AUXILIARY,
    MtmoeCriterionConfig,
    MtmoeLabelSmoothedCrossEntropy,
)
from fairseq_plugins.models.mtmoe_transformer import MtmoeTransformerModel, mtmoe_transformer
from fairseq_plugins.optim.adamw import MtmoeAdamW, MtmoeAdamWConfig
from mtmoe.files import write_json, write_text

LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0


def task_of(vocabulary: int) -> Any:
    """What models and losses ask of a task: a dictionary for both sides."""
    dictionary = Dictionary()
    for index in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{index}")
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Options that all models share."""
    return {
        "encoder_layers": args.layers, "decoder_layers": args.layers, "encoder_embed_dim": args.d_model,
        "encoder_ffn_embed_dim": args.d_ffn, "encoder_attention_heads": args.d_model // 64,
        "decoder_attention_heads": args.d_model // 64, "share_all_embeddings": True, "encoder_normalize_before": True,
        "decoder_normalize_before": True, "max_source_positions": 1024, "max_target_positions": 1024, "dropout": 0.1,
    }  # fmt: skip


def make_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Sentences of three quarters to all of `args.length` tokens, padded as fairseq pads: sources on the left."""
    generator = torch.Generator().manual_seed(1)

    def side(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(4, args.vocabulary, (args.sentences, args.length), generator=generator)
        lengths = torch.randint(args.length * 3 // 4, args.length + 1, (args.sentences,), generator=generator)
        lengths[0] = args.length
        position = torch.arange(args.length)
        padding = position < args.length - lengths[:, None] if left else position >= lengths[:, None]
        return tokens.masked_fill(padding, 1), lengths

    source, source_lengths = side(left=True)
    target, target_lengths = side(left=False)
    previous = torch.cat([torch.full_like(target[:, :1], 2), target[:, :-1]], dim=1)
    return {
        "net_input": {"src_tokens": source, "src_lengths": source_lengths, "prev_output_tokens": previous},
        "target": target,
        "ntokens": int(target_lengths.sum()),
    }


def plain_fairseq(args: argparse.Namespace, task: Any) -> tuple[Any, Any, Any]:
    """Fairseq's own model, loss and optimiser."""
    options = Namespace(**sizes(args))
    base_architecture(options)
    model = TransformerModel.build_model(options, task)
    criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=LABEL_SMOOTHING)
    config = FairseqAdamConfig(lr=[1e-4], adam_betas="(0.9, 0.98)", adam_eps=1e-6, tpu=False)
    return model, criterion, FairseqAdam(config, list(model.parameters()))


def ours(args: argparse.Namespace, task: Any, num_experts: int = 0) -> tuple[Any, Any, Any]:
    """Our model, loss and optimiser; no experts make a dense model."""
    moe = {"moe_freq": 2, "num_experts": num_experts, "moe_ffn_embed_dim": args.d_ffn // 2} if num_experts else {}
    options = Namespace(**sizes(args), **({"moe_freq": 0} | moe))
    mtmoe_transformer(options)
    model = MtmoeTransformerModel.build_model(options, task)
    weights = {
        name: getattr(MtmoeCriterionConfig(), name)
        for name in (*(f"{name}_weight" for name in AUXILIARY), "cmr_budget")
    }
    criterion = MtmoeLabelSmoothedCrossEntropy(task, label_smoothing=LABEL_SMOOTHING, sentence_avg=False, **weights)
    criterion.collect_routing = False  # as the task sets it between two lines of the log
    return model, criterion, MtmoeAdamW(MtmoeAdamWConfig(lr=[1e-4]), list(model.parameters()))


SYSTEMS: dict[str, tuple[Callable[[argparse.Namespace, Any], tuple[Any, Any, Any]], bool]] = {
    "fairseq": (plain_fairseq, False),
    "dense fp32": (ours, False),
    "dense": (ours, True),
    "MoE 8": (lambda args, task: ours(args, task, 8), True),
    "MoE 32": (lambda args, task: ours(args, task, 32), True),
}
"""Name -> how to make model, loss and optimiser, and whether they run under bf16 autocast."""


def training_step(parts: tuple[Any, Any, Any], batch: Mapping[str, Any], autocast: bool) -> float:
    """What fairseq's trainer does for one batch; returns the loss, in nats a token."""
    model, criterion, optimizer = parts
    model.train()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, sample_size, _ = criterion(model, batch)
    optimizer.backward(loss)
    optimizer.multiply_grads(1.0 / sample_size)
    optimizer.clip_grad_norm(CLIP_NORM)
    optimizer.step()
    return loss.item() / sample_size


def report(machine: dict[str, Any], args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> str:
    """The report as Markdown."""
    dense, plain = (rows.get(name, {}).get("median") for name in ("dense", "fairseq"))
    cells = [
        [
            name,
            f"{row['parameters'] / 1e6:.0f}",
            number(dense / row["median"] if dense else None),
            number(plain / row["median"] if plain else None),
            number(row["words"] / row["median"], 0),
            number(1e3 * row["median"], 0),
            number(1e3 * row["min"], 0),
        ]
        for name, row in rows.items()
    ]
    header = ["model", "million parameters", "x dense", "x fairseq", "target words/s", "ms", "least ms"]
    return (
        f"# One training step\n\n{machine_line(machine)}\n\n{args.layers} + {args.layers} layers, "
        f"d_model {args.d_model}, d_ffn {args.d_ffn} (experts: two of {args.d_ffn // 2} a token in every second "
        f"layer), vocabulary {args.vocabulary}, {args.sentences} sentences of up to {args.length} tokens; medians of "
        f"up to {args.rounds} rounds in turn. Larger is faster in the columns with x.\n\n{table(header, cells)}"
    )


def main() -> int:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which of them, with commas (default: all)")
    for name, default, text in (
        ("layers", 6, "layers on each side"), ("d-model", 512, "width"), ("d-ffn", 2048, "width of the dense network"),
        ("vocabulary", 8000, "words"), ("sentences", 64, "in a batch"), ("length", 32, "tokens of the longest"),
        ("rounds", 7, "timed rounds"), ("warmup", 2, "rounds before those"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for one model (default: %(default)s)")
    parser.add_argument("--allocator", choices=("auto", "system"), default="auto", help="auto preloads tcmalloc")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="(default: %(default)s)")
    args = parser.parse_args()
    chosen = [name.strip() for name in args.systems.split(",")]
    if set(chosen) - SYSTEMS.keys():
        parser.error(f"--systems must be of: {', '.join(SYSTEMS)}")
    if args.allocator == "auto":
        restart_with_quick_environment("benchmarks.step")
    task, batch = task_of(args.vocabulary), make_batch(args)
    parts, runs = {}, {}
    for name in chosen:
        build, autocast = SYSTEMS[name]
        torch.manual_seed(1)
        parts[name] = build(args, task)
        runs[name] = lambda parts=parts[name], autocast=autocast: training_step(parts, batch, autocast)
    started = time.perf_counter()
    times = alternate(runs, rounds=args.rounds, budget=args.budget, warmup=args.warmup)
    rows = {
        name: {
            **asdict(times[name]),
            "words": batch["ntokens"],
            "parameters": sum(parameter.numel() for parameter in parts[name][0].parameters()),
            "loss": runs[name](),
        }
        for name in chosen
    }
    text = report(describe(), args, rows)
    print(f"{text}\n[{time.perf_counter() - started:.0f} s]")
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "step.md", text)
    write_json(args.output / "step.json", {"machine": describe(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
