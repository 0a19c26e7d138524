"""Start fairseq-train with a preset, show the command it runs, and go on with a run that was stopped.

Examples:
  mtmoe train scripts/train/demo.yaml
  mtmoe train scripts/train/base.yaml --set data=runs/bible/data --set output=runs/bible --set max-tokens=2048
  mtmoe train scripts/train/demo.yaml --minutes 20      # max-update follows from a short measurement
  mtmoe train scripts/train/demo.yaml --dry-run         # only print the command
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

from mtmoe.training import launcher
from mtmoe.training.preset import build_command, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mtmoe train``."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="preset: data, output, arch, options of fairseq-train")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change a key of the preset, or any option of fairseq-train, such as lr=0.001; may be repeated",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="time budget of training; default: that of the preset, if any")
    parser.add_argument(
        "--resume", choices=["auto", "never"], default="auto",
        help="auto: go on from the last checkpoint; never: refuse a folder that has one",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")


def run(args: argparse.Namespace) -> int:
    """Train; the exit status is that of fairseq-train."""
    config = load_config(args.config, args.overrides)
    if args.minutes is not None:
        config = replace(config, minutes=args.minutes)
    if args.dry_run:
        print(shlex.join(build_command(config)))
        return 0
    return launcher.train(config, resume=args.resume == "auto", report=lambda line: print(line, flush=True))
