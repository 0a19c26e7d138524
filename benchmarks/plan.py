"""Compare `mtmoe plan` with real training steps on this machine: parameters, memory, FLOPs and time.

The machine's own rates are measured first: a large matrix product and a large copy, in the type of the products. With
them the plan predicts each step at a utilisation of 1, so that *predicted / measured* time is the utilisation that a
plan for this machine should assume. Parameters and saved activations are counted, not timed; the memory of a step is
what it adds to the process at its peak (gradients, activations, logits); the plan's sum is an upper bound of that,
since gradients come as activations go. Timings need an otherwise idle machine.

    python -m benchmarks.plan
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.limits import limit_runs, rates
from benchmarks.machine import describe, restart_with_quick_environment
from benchmarks.report import machine_line, table
from benchmarks.step import LABEL_SMOOTHING, task_of, training_step
from benchmarks.timing import alternate, peak_memory
from fairseq_plugins.criterions.label_smoothed_cross_entropy import (
    AUXILIARY,
    MtmoeCriterionConfig,
    MtmoeLabelSmoothedCrossEntropy,
)
from fairseq_plugins.models.mtmoe_transformer import MtmoeTransformerModel, mtmoe_transformer
from fairseq_plugins.optim.adamw import MtmoeAdamW, MtmoeAdamWConfig
from mtmoe.files import write_json, write_text
from mtmoe.planning.activations import activation_bytes
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.flops import BACKWARD, forward_flops
from mtmoe.planning.hardware import GIB, Cluster, Gpu
from mtmoe.planning.layouts import Layout
from mtmoe.planning.model import ModelShape
from mtmoe.planning.parameters import count_parameters
from mtmoe.planning.step_time import step_time
from mtmoe.planning.training import TrainingSetup

SMALL = ModelShape(
    vocabulary_size=8000, d_model=512, encoder_layers=3, decoder_layers=3, encoder_expert_d_ffn=1024,
    decoder_expert_d_ffn=1024, top_k=2,
)  # fmt: skip

SHAPES: dict[str, ModelShape] = {
    "dense": replace(SMALL, encoder_moe_freq=0, decoder_moe_freq=0),
    "MoE 8": SMALL,
    "MoE 8 CMR": replace(SMALL, cmr=True),
    "MoE 32": replace(SMALL, num_experts=32),
    "MoE 32 top-1": replace(SMALL, num_experts=32, top_k=1),
    "wide MoE 8": replace(SMALL, d_model=768, encoder_heads=12, decoder_heads=12),
}
"""Name -> what is planned and trained."""


def options_of(shape: ModelShape, dropout: float = 0.0) -> Namespace:
    """The options of fairseq that make a model of a shape; both sides have experts of the same width."""
    options = Namespace(
        encoder_layers=shape.encoder_layers, decoder_layers=shape.decoder_layers, encoder_embed_dim=shape.d_model,
        encoder_ffn_embed_dim=shape.encoder_d_ffn, decoder_ffn_embed_dim=shape.decoder_d_ffn,
        encoder_attention_heads=shape.encoder_heads, decoder_attention_heads=shape.decoder_heads,
        encoder_moe_freq=shape.encoder_moe_freq, decoder_moe_freq=shape.decoder_moe_freq,
        moe_ffn_embed_dim=shape.encoder_expert_d_ffn, num_experts=shape.num_experts, top_k=shape.top_k,
        gate=shape.gate, cosine_gate_dim=shape.cosine_gate_dim, cmr=shape.cmr, cmr_d_ffn=shape.cmr_d_ffn,
        capacity_factor=shape.capacity_factor, eom=shape.eom, share_all_embeddings=shape.share_all_embeddings,
        share_decoder_input_output_embed=shape.share_decoder_input_output_embed,
        encoder_learned_pos=shape.encoder_learned_positions, decoder_learned_pos=shape.decoder_learned_positions,
        encoder_normalize_before=shape.encoder_pre_norm, decoder_normalize_before=shape.decoder_pre_norm,
        layernorm_embedding=shape.layernorm_embedding, max_source_positions=shape.max_source_positions,
        max_target_positions=shape.max_target_positions, dropout=dropout,
    )  # fmt: skip
    if shape.top_k == 1:
        options.normalize_weights = "none"
    mtmoe_transformer(options)
    return options


def build_model(shape: ModelShape, dropout: float = 0.0) -> MtmoeTransformerModel:
    """A real model of a shape."""
    task = task_of(shape.vocabulary_size)
    return MtmoeTransformerModel.build_model(options_of(shape, dropout), task)


def build(shape: ModelShape, dropout: float = 0.0) -> tuple[Any, Any, Any]:
    """Model, loss and optimiser, as `benchmarks.step.training_step` takes them."""
    torch.manual_seed(1)
    model = build_model(shape, dropout)
    names = (*(f"{name}_weight" for name in AUXILIARY), "cmr_budget")
    weights = {name: getattr(MtmoeCriterionConfig(), name) for name in names}
    criterion = MtmoeLabelSmoothedCrossEntropy(
        task_of(shape.vocabulary_size), label_smoothing=LABEL_SMOOTHING, sentence_avg=False, **weights
    )
    criterion.collect_routing = False
    return model, criterion, MtmoeAdamW(MtmoeAdamWConfig(lr=[1e-4]), list(model.parameters()))


def batch_of(setup: TrainingSetup, vocabulary: int) -> dict[str, Any]:
    """Sentences of equal length without padding, as plans take them."""
    generator = torch.Generator().manual_seed(1)
    sentences = setup.tokens // setup.length

    def side() -> Tensor:
        return torch.randint(4, vocabulary, (sentences, setup.length), generator=generator)

    target = side()
    inputs = {
        "src_tokens": side(), "src_lengths": torch.full((sentences,), setup.length),
        "prev_output_tokens": torch.cat([torch.full_like(target[:, :1], 2), target[:, :-1]], dim=1),
    }  # fmt: skip
    return {"net_input": inputs, "target": target, "ntokens": target.numel()}


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of memory that `forward` saves for the backward pass, the parameters themselves left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being given to others

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    found = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    del result
    return found


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity: what the plan says, what was measured."""

    name: str
    predicted: float
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return None if not self.measured else self.predicted / self.measured


def machine_rates(autocast: bool, rounds: int, budget: float) -> dict[str, float]:
    """FLOP/s of a large product and bytes/s of a large copy, in the type of the products."""
    case = Case(dtype="bf16" if autocast else "fp32", num_experts=8)  # its shape does not matter here
    return rates(case, alternate(limit_runs(case), rounds=rounds, budget=budget))


def machine_as_gpu(measured: dict[str, float]) -> Gpu:
    """This machine as a cluster of one; its network is never used."""
    flops = measured["flops_per_second"]
    return Gpu(
        name="this machine", memory=GIB, flops={"half": flops, "single": flops},
        memory_bandwidth=measured["bytes_per_second"], network_in_node=1.0, network_between_nodes=1.0, host=1.0,
    )  # fmt: skip


def compare(shape: ModelShape, setup: TrainingSetup, gpu: Gpu, rounds: int, budget: float) -> list[Compared]:
    """Plan a step and run it."""
    parts, batch = build(shape), batch_of(setup, shape.vocabulary_size)
    model, criterion, _ = parts
    autocast = setup.dtype == "autocast"
    model.train()

    def forward() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return criterion(model, batch)[0]

    saved = saved_bytes(model, forward)
    times = alternate({"step": lambda: training_step(parts, batch, autocast)}, rounds=rounds, budget=budget)
    parts[2].zero_grad()
    added = peak_memory(lambda: training_step(parts, batch, autocast), "cpu")
    layout = Layout(Cluster(gpu, 1, 1), 1)
    assumed = Assumptions(utilisation=1.0, memory_bandwidth_share=1.0)
    counted = activation_bytes(shape, setup, device="cpu")
    parameters = count_parameters(shape)
    step = step_time(shape, setup, layout, assumed).total
    flops = forward_flops(shape, setup.tokens, setup.tokens, setup.length).total * (1 + BACKWARD)
    gradients = setup.bytes.gradient * parameters.total
    return [
        Compared("parameters", parameters.total, sum(each.numel() for each in model.parameters())),
        Compared("saved activations, MiB", (counted.saved + counted.copies) / 2**20, saved / 2**20),
        Compared(
            "memory that a step adds, MiB",
            (counted.saved + counted.copies + counted.working + gradients) / 2**20,
            None if added is None else added / 2**20,
        ),
        Compared("step at full rate, ms", 1e3 * step, 1e3 * times["step"].median),
        Compared("GFLOP/s of the machine and of the step", gpu.flops["half"] / 1e9, flops / times["step"].median / 1e9),
    ]


def report(machine: dict[str, Any], rows: dict[str, list[Compared]], setup: TrainingSetup) -> str:
    """The report as Markdown."""
    cells = [
        [model, each.name, f"{each.predicted:,.0f}", "–" if each.measured is None else f"{each.measured:,.0f}",
         "–" if each.ratio is None else f"{each.ratio:.3f}"]
        for model, found in rows.items()
        for each in found
    ]  # fmt: skip
    return (
        f"# The plan and the machine\n\n{machine_line(machine)}\n\n{setup.dtype}, {setup.tokens} source and target "
        f"tokens, sentences of {setup.length}.\n\n"
        + table(["model", "quantity", "plan", "measured", "plan / measured"], cells)
    )


def main() -> int:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES), help="which of them, with commas (default: all)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens on each side (default: %(default)s)")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "autocast"), default="autocast", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for one model (default: %(default)s)")
    parser.add_argument("--allocator", choices=("auto", "system"), default="auto", help="auto preloads tcmalloc")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="(default: %(default)s)")
    args = parser.parse_args()
    chosen = [name.strip() for name in args.models.split(",")]
    if set(chosen) - SHAPES.keys():
        parser.error(f"--models must be of: {', '.join(SHAPES)}")
    if args.allocator == "auto":
        restart_with_quick_environment("benchmarks.plan")
    setup = TrainingSetup(tokens=args.tokens, length=args.length, dtype=args.dtype, dropout=False)
    gpu = machine_as_gpu(machine_rates(args.dtype == "autocast", args.rounds, args.budget))
    rows = {name: compare(SHAPES[name], setup, gpu, args.rounds, args.budget) for name in chosen}
    text = report(describe(), rows, setup)
    print(text)
    write_text(args.output / "plan.md", text)
    values = {
        name: {each.name: {"plan": each.predicted, "measured": each.measured} for each in found}
        for name, found in rows.items()
    }
    write_json(args.output / "plan.json", {"machine": describe(), "rows": values})
    return 0


if __name__ == "__main__":
    sys.exit(main())
