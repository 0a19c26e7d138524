"""Start fairseq-train with a preset, show the command it runs, and go on with a run that was stopped.

Examples:
  mtmoe train scripts/train/demo.yaml
  mtmoe train scripts/train/base.yaml --set data=runs/bible/data --set output=runs/bible --set max-tokens=2048
  mtmoe train scripts/train/demo.yaml --minutes 20      # max-update follows from a short measurement
  mtmoe train scripts/train/demo.yaml --dry-run         # only print the command
  mtmoe train scripts/train/base.yaml --nproc 4         # four processes on this machine, with GPUs one for each
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from typing import Any

from mtmoe.training import launcher
from mtmoe.training.preset import build_command, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mtmoe train``; several of them change a key of the preset."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="preset: data, output, arch, options of fairseq-train")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a key of the preset, or any option of fairseq-train, such as lr=0.001; may be repeated",
    )  # fmt: skip
    of_preset: dict[str, Any] = {"default": argparse.SUPPRESS}  # what is not given is as the preset says
    parser.add_argument("--minutes", type=float, help="time budget of training", **of_preset)
    parser.add_argument(
        "--resume", choices=["auto", "never"], default="auto",
        help="auto: go on from the last checkpoint; never: refuse a folder that has one",
    )  # fmt: skip
    parser.add_argument("--nproc", type=int, help="processes on this machine, with GPUs one for each", **of_preset)
    parser.add_argument(
        "--max-restarts", type=int, **of_preset,
        help="times that all processes start again from the last checkpoint when one of several has failed",
    )  # fmt: skip
    parser.add_argument("--nnodes", type=int, help="machines that train together, each with --nproc", **of_preset)
    parser.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help="where machines meet: one of them, and a free port", **of_preset
    )
    parser.add_argument("--rdzv-id", metavar="NAME", help="name of the run there", **of_preset)
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")


def run(args: argparse.Namespace) -> int:
    """Train; the exit status is that of fairseq-train."""
    config = load_config(args.config, args.overrides)
    named = ("minutes", "nproc", "max_restarts", "nnodes", "rdzv_endpoint", "rdzv_id")
    config = replace(config, **{name: value for name, value in vars(args).items() if name in named})
    if args.dry_run:
        print(shlex.join(build_command(config)))
        return 0
    return launcher.train(config, resume=args.resume == "auto", report=lambda line: print(line, flush=True))
