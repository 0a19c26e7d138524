"""Derive from a run which directions over-fit, and so should join training late; write it as a curriculum.

The run should have trained all directions from the start, with the regularisation of the run that is planned. A
direction that is best after k updates joins so late that it trains for about k, rounded up to one of the shares of all
updates. One whose best is the last validation does not over-fit and trains from the start. In a run with a curriculum,
updates count from when a direction joined. Starts are written as shares of all updates, unless --max-update is given.

Examples:
  mtmoe curriculum runs/first --output curriculum.yaml
  mtmoe train scripts/train/tiny.yaml --set output=runs/second --set curriculum=curriculum.yaml
  mtmoe curriculum runs/first --fit median --shares 1 0.5 0.1
  mtmoe curriculum runs/my/data --by count              # by training pairs alone, before any run
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mtmoe.files import write_text
from mtmoe.training import curriculum
from mtmoe.training.planning import plan_by_count, plan_from_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run, or its log.jsonl; with --by count also prepared data"
    )
    parser.add_argument(
        "--by", choices=("curves", "count"), default="curves", help="what says which directions are to join late"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="S",
        help="shares of all updates that the buckets train for; default: "
        f"{' '.join(map(str, curriculum.DEFAULT_SHARES))}, by count (for high, low, very low) "
        f"{' '.join(map(str, curriculum.COUNT_SHARES))}",
    )  # fmt: skip
    parser.add_argument(
        "--fit", choices=curriculum.FITS, default="share",
        help="share: a bucket trains for its share; median: for the median of what its directions need",
    )  # fmt: skip
    parser.add_argument(
        "--max-update", type=int, default=0, metavar="N",
        help="updates of the run that is planned, if others than those of RUN; starts are then update numbers",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the curriculum there, not to the screen")


def run(args: argparse.Namespace) -> int:
    """Derive, print why, and write; returns the exit status."""
    if args.by == "count":
        plan = plan_by_count(args.run, max_update=args.max_update, shares=args.shares or curriculum.COUNT_SHARES)
    else:
        plan = plan_from_run(
            args.run, max_update=args.max_update, shares=args.shares or curriculum.DEFAULT_SHARES, fit=args.fit
        )
    print(plan.explanation)
    if args.output:
        write_text(args.output, plan.document)
        print(f"wrote {args.output}; train with --set curriculum={args.output}")
    else:
        print(plan.document, end="")
    return 0
