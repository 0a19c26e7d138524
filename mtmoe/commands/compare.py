"""Put two evaluations side by side, with the paired significance of every direction's difference.

Both must have been scored on the same test sets. Stars mark what stays significant after Holm's correction for the
number of directions; for the difference over all directions there are Wilcoxon's test and a bootstrap interval.

Examples:
  mtmoe compare runs/dense runs/moe
  mtmoe compare runs/dense runs/moe --metric bleu --method randomisation --output comparison.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mtmoe.errors import ConfigError
from mtmoe.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="baseline: folder that `mtmoe evaluate` wrote to")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="the run that is compared with it")
    parser.add_argument("--metric", choices=("chrf++", "bleu"), default="chrf++", help="what to compare")
    parser.add_argument(
        "--method", choices=("bootstrap", "randomisation"), default="bootstrap", help="paired test of each direction"
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="resamples or trials; 0: 1000 for bootstrap, else 10000"
    )
    parser.add_argument("--seed", type=int, default=12345, metavar="N", help="of the random numbers")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the comparison as JSON to FILE")


def run(args: argparse.Namespace) -> int:
    """Compare, and print Markdown; returns the exit status."""
    from tqdm import tqdm

    from mtmoe.evaluation import compare
    from mtmoe.evaluation.report import comparison_markdown

    try:
        with tqdm(unit="direction", desc="testing", file=sys.stderr, disable=None) as bar:
            comparison = compare(
                args.run_a,
                args.run_b,
                metric=args.metric,
                method=args.method,
                samples=args.samples,
                seed=args.seed,
                advance=bar.update,
            )
    except ValueError as error:  # an option that is out of range
        raise ConfigError(str(error)) from error
    print(comparison_markdown(comparison), end="")
    if args.output:
        write_json(args.output, comparison.to_json())
        print(f"mtmoe compare: wrote {args.output}", file=sys.stderr)
    return 0
