"""Print the table of a run's validation losses by direction; write it, and a plot, into the run's folder.

Works on a run that is still going on. A direction over-fits where its smoothed loss was lower before than it is at the
last validation. Writes validation.json, validation.md and, where matplotlib is installed, validation.svg.

Example:
  mtmoe curves runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mtmoe.training.run_curves import report_markdown, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its log.jsonl")


def run(args: argparse.Namespace) -> int:
    """Write the report and print it; returns the exit status."""
    print(report_markdown(write_report(args.run)), end="")
    return 0
