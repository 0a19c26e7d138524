"""Estimate what a training takes on many GPUs: parameters, memory, bytes and time of each layout; recommend one.

MODEL is an architecture (mtmoe_transformer_tiny, …_base, …_big, …_nllb), switch-1.6t, a preset of `mtmoe train`, a
model folder, or a checkpoint; options such as --experts change its shape. Nothing is trained, and no GPU is needed.
The exit status is 0 if a layout fits in memory, and 1 if none does. docs/scaling.md tells how to read the tables.

Examples:
  mtmoe plan mtmoe_transformer_base --vocab 32000 --gpus 8 --gpu h100
  mtmoe plan mtmoe_transformer_nllb --vocab 256206 --gpus 64 --gpu a100-80 --dtype bf16 --zero1 --recompute --options
  mtmoe plan scripts/train/base.yaml --gpus 16 --memory 48 --flops 90 --network 30,10 --json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtmoe.errors import ConfigError
from mtmoe.planning import presets
from mtmoe.planning.assumptions import with_overrides
from mtmoe.planning.hardware import GIB, GIGA, GPUS, TERA, Cluster, Gpu
from mtmoe.planning.model import ModelShape
from mtmoe.planning.plan import make_plan
from mtmoe.planning.report import Table, heading, tables
from mtmoe.planning.training import DTYPES, GATING_DROPOUT_MODES, PAYLOADS, TrainingSetup

if TYPE_CHECKING:
    from mtmoe.training.preset import TrainConfig

SHAPE_OPTIONS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("vocab", ("vocabulary_size",), "rows of the embedding"),
    ("d-model", ("d_model",), "width of a token"),
    ("d-ffn", ("encoder_d_ffn", "decoder_d_ffn"), "width inside dense feed-forward networks"),
    ("expert-d-ffn", ("encoder_expert_d_ffn", "decoder_expert_d_ffn"), "width inside an expert; --d-ffn sets it too"),
    ("layers", ("encoder_layers", "decoder_layers"), "layers on each side"),
    ("encoder-layers", ("encoder_layers",), "layers of the encoder"),
    ("decoder-layers", ("decoder_layers",), "layers of the decoder"),
    ("heads", ("encoder_heads", "decoder_heads"), "attention heads"),
    ("experts", ("num_experts",), "experts in each MoE layer"),
    ("moe-freq", ("encoder_moe_freq", "decoder_moe_freq"), "every how many layers one has experts; 0 = none"),
    ("top-k", ("top_k",), "experts that each token uses"),
    ("cmr-d-ffn", ("cmr_d_ffn",), "width inside the shared network of CMR; 0 = the expert's"),
)
"""Option, the fields of `ModelShape` that it sets, and its help."""

PRESET_SUFFIXES = (".yaml", ".yml")

AUTOCAST = {"bfloat16": "autocast"}
"""Value of the training's option ``--autocast`` -> number types of a plan."""

WIDTH = 120
"""Columns that the tables take at most, whatever the terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mtmoe plan``."""
    parser.add_argument("model", nargs="?", default="mtmoe_transformer", metavar="MODEL",
                        help="architecture, preset, model folder or checkpoint")  # fmt: skip
    parser.add_argument("--data", type=Path, help="prepared data of a checkpoint or preset; default: what it names")
    shape = parser.add_argument_group("shape of the model (default: the MODEL's)")
    for option, names, text in SHAPE_OPTIONS:
        shape.add_argument(f"--{option}", type=int, default=argparse.SUPPRESS, dest=f"shape:{','.join(names)}",
                           metavar="N", help=text)  # fmt: skip
    shape.add_argument("--cmr", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest="shape:cmr",
                       help="Conditional MoE Routing: a shared network beside the experts")  # fmt: skip
    shape.add_argument("--share-embeddings", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                       dest="shape:share_all_embeddings,share_decoder_input_output_embed",
                       help="one matrix for encoder, decoder and output")  # fmt: skip
    for option, text in (
        ("eom", "rate of Expert Output Masking, which leaves rows out"), ("capacity-factor", "slots; 0 drops none"),
    ):  # fmt: skip
        shape.add_argument(f"--{option}", type=float, default=argparse.SUPPRESS, metavar="X",
                           dest=f"shape:{option.replace('-', '_')}", help=text)  # fmt: skip
    _add_hardware(parser)
    _add_training(parser)
    parser.add_argument("--options", action="store_true", help="what each option that saves something would change")
    parser.add_argument("--explain", action="store_true", help="list all assumptions and where they come from")
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE",
                        help="change an assumption, such as utilisation=0.3; may be repeated")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as JSON: bytes and seconds")


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs in all")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node")
    group.add_argument("--gpu", default="a100-80", metavar="NAME", help=f"one of: {', '.join(GPUS)}")
    group.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU; default: that of --gpu")
    group.add_argument("--flops", type=float, metavar="TFLOPS", help="its peak TFLOP/s in the type of the products")
    group.add_argument("--network", metavar="IN,BETWEEN",
                       help="GB/s a GPU sends within a node and between nodes; default: those of --gpu")  # fmt: skip
    group.add_argument("--expert-parallel-size", type=int, metavar="N", help="look at this layout only")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group, default = parser.add_argument_group("training"), TrainingSetup()
    group.add_argument("--tokens", type=int, default=argparse.SUPPRESS, metavar="N",
                       help=f"target tokens a GPU in a batch, and as many source tokens (default: max-tokens of a "
                       f"preset, else {default.tokens})")  # fmt: skip
    group.add_argument("--length", type=int, default=default.length, metavar="N", help="tokens of a sentence")
    group.add_argument("--accumulate", type=int, default=argparse.SUPPRESS, metavar="N",
                       help="batches an update (default: update-freq of a preset, else 1)")  # fmt: skip
    group.add_argument("--dtype", default=argparse.SUPPRESS, choices=tuple(DTYPES),
                       help="autocast: fp32 weights, bf16 products; bf16, fp16: fp32 master copies (default: that of a "
                       f"preset, else {default.dtype})")  # fmt: skip
    group.add_argument("--dropout", action=argparse.BooleanOptionalAction, default=True, help="keep dropout's masks")
    for name, text in (
        ("zero1", "shard optimiser states of what is replicated (ZeRO-1)"),
        ("offload", "optimiser states of experts in host memory"),
        ("recompute", "compute activations again in the backward pass"),
        ("bilevel", "route to a node, then to experts on it (SMILE)"),
        ("overlap", "hide all-to-all behind the shared network of CMR"),
    ):
        group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
    group.add_argument("--payload", default="compute", choices=tuple(PAYLOADS), help="number type in the all-to-all")
    group.add_argument("--gating-dropout", type=float, default=0.0, metavar="P",
                       help="share of steps without exchange")  # fmt: skip
    group.add_argument("--gating-dropout-mode", default="gate", choices=GATING_DROPOUT_MODES,
                       help="on such steps: experts of the own GPU, or none")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Plan and print; returns the exit status: 0 if a layout fits, else 1."""
    plan = make_plan(
        model_of(args), cluster_of(args), setup_of(args), with_overrides(args.assume), args.expert_parallel_size
    )
    if args.json:
        print(json.dumps(plan.to_json(), indent=2, allow_nan=False))
    else:
        print(heading(plan))
        for table in tables(plan, options=args.options, explain=args.explain):
            _print(table)
        chosen = f"expert-parallel size {plan.best.layout.expert_parallel}" if plan.best else "none"
        print(f"\nRecommended: {chosen}: {plan.reason}.")
    return 0 if plan.best else 1


def model_of(args: argparse.Namespace) -> ModelShape:
    """The shape that MODEL and the options of the shape name."""
    changes: dict[str, Any] = {}
    given = {key.removeprefix("shape:"): value for key, value in vars(args).items() if key.startswith("shape:")}
    if "encoder_d_ffn,decoder_d_ffn" in given:
        changes |= dict.fromkeys(
            ("encoder_expert_d_ffn", "decoder_expert_d_ffn"), given["encoder_d_ffn,decoder_d_ffn"]
        )
    for names in sorted(given, key=lambda key: -key.count(",")):  # --encoder-layers counts more than --layers
        changes |= dict.fromkeys(names.split(","), given[names])
    return replace(_named_model(args.model, args.data), **changes)


def _named_model(name: str, data: Path | None) -> ModelShape:
    path = Path(name)
    if name in presets.names() or not path.exists():
        return presets.by_name(name)
    if path.suffix in PRESET_SUFFIXES:
        config = _preset(path)
        return presets.from_options(config.options, config.arch, _vocabulary(data or Path(config.data)))
    if (path / "config.json").is_file():
        return presets.from_folder(path)
    from mtmoe.checkpoint import open_model  # torch takes seconds, and nothing else here needs it

    return presets.from_config(open_model(path, data).config.to_json(), str(path))


def _preset(path: Path) -> TrainConfig:
    from mtmoe.training.preset import load_config  # takes NumPy along

    return load_config(path)


def _vocabulary(data: Path) -> int | None:
    """Rows of the embedding that prepared data makes; None where there is none."""
    try:
        with (data / "dict.txt").open("rb") as lines:
            return 4 + sum(1 for _ in lines)  # fairseq's special symbols come first
    except OSError:
        return None


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The hardware that the options name."""
    if args.gpu not in GPUS:
        known = ", ".join(GPUS)
        raise ConfigError(f"--gpu {args.gpu!r} is unknown; choose one of: {known}; --memory and --flops change it")
    values: dict[str, Any] = {field: getattr(GPUS[args.gpu], field) for field in Gpu.__slots__}
    if args.memory is not None:
        values["memory"] = args.memory * GIB
    if args.flops is not None:
        values["flops"] = dict.fromkeys(values["flops"], args.flops * TERA)
    if args.network is not None:
        values["network_in_node"], values["network_between_nodes"] = _network(args.network)
    if args.memory is not None or args.flops is not None:
        values["name"], values["bf16"] = f"{args.gpu}, changed", True
    return Cluster(Gpu(**values), args.gpus, args.gpus_per_node)


def _network(text: str) -> tuple[float, float]:
    try:
        in_node, between = (float(part) * GIGA for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--network {text!r} must be two numbers in GB/s, such as 300,25") from None
    return in_node, between


def setup_of(args: argparse.Namespace) -> TrainingSetup:
    """The training that the options name; a preset tells what they leave out."""
    values: dict[str, Any] = _training_of(args.model)
    values |= {name: getattr(args, name) for name in asdict(TrainingSetup()) if hasattr(args, name)}
    return TrainingSetup(**values)


def _training_of(name: str) -> dict[str, Any]:
    """Batch and number type of a preset; nothing for models that are none."""
    path = Path(name)
    if path.suffix not in PRESET_SUFFIXES or not path.exists():
        return {}
    options = presets.plain_options(_preset(path).options)
    dtypes = [dtype for dtype in ("bf16", "fp16") if options.get(dtype)]
    found: dict[str, Any] = {"dtype": dtypes[0] if dtypes else AUTOCAST.get(str(options.get("autocast")), "fp32")}
    if "checkpoint_activations" in options:
        found["recompute"] = True
    for option, field in (("max_tokens", "tokens"), ("update_freq", "accumulate")):
        value = options.get(option)
        if isinstance(value, list):
            value = value[-1]  # of the last epochs
        if value is not None:
            found[field] = value
    return found


def _print(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(title=table.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for number, name in enumerate(table.header):
        prose = name == "what and why"
        drawn.add_column(name, justify="left" if prose or not number else "right", no_wrap=not prose, vertical="top")
    for row in table.rows:
        drawn.add_row(*row)
    # rich would cut numbers in a narrow terminal or a pipe; a line that is too long may be wrapped instead.
    console = Console(highlight=False, soft_wrap=False)
    console.width = max(console.width, WIDTH)
    console.print(drawn)
