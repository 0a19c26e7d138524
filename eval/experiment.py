#!/usr/bin/env python
"""Put the finished runs of experiments into tables, pictures and one page; run it again whenever there are more.

For each experiment it writes results.json beside the runs, its part of the Markdown page with PNGs, and for all of them
one HTML page that asks for nothing from outside. Without DATA, the prepared data that the runs were trained on,
differences stand without significance.

Examples:
  python eval/experiment.py low_resource=runs/low_resource/data
  python eval/experiment.py low_resource=runs/low_resource/data bible=runs/bible/data --split valid
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mtmoe.errors import MtmoeError
from mtmoe.evaluation.experiment import Experiment, summarise
from mtmoe.evaluation.experiment.page import Pictures, write_html, write_markdown
from mtmoe.evaluation.experiment.significance import SAMPLES
from mtmoe.evaluation.test_sets import PreparedData
from mtmoe.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", metavar="NAME[=DATA]", help="folder of results, and its data")
    parser.add_argument("--results", type=Path, default=Path("eval/results"), metavar="DIR", help="where NAME lies")
    parser.add_argument("--page", type=Path, default=Path("docs/experiments/low-resource.md"), metavar="FILE.md")
    parser.add_argument("--report", type=Path, default=Path("eval/report.html"), metavar="FILE.html")
    parser.add_argument(
        "--split", choices=("auto", "test", "valid"), default="auto", help="auto: test once all have it"
    )
    parser.add_argument("--baselines", default="moe,dense", metavar="A,B", help="configurations to compare with")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"resamples; default: {SAMPLES}")
    args = parser.parse_args(arguments)
    try:
        finished = [_report(words, args) for words in args.experiments]
        write_html(args.report, finished)
    except MtmoeError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.report} and {args.page}")
    return 0


def _report(words: str, args: argparse.Namespace) -> tuple[dict[str, Any], Pictures]:
    name, _, data = words.partition("=")
    folder = args.results / name
    experiment = Experiment.load(folder)
    split = experiment.split(args.split)
    references = _references(Path(data), experiment, split) if data else None
    with tqdm(total=len(experiment.runs) if data else 0, unit="run", desc=name, file=sys.stderr, disable=None) as bar:
        results = summarise(
            experiment,
            references,
            split=split,
            baselines=[one for one in args.baselines.split(",") if one],
            samples=args.samples,
            advance=bar.update,
        )
    write_json(folder / "results.json", results)
    pictures = Pictures.draw(experiment, results)
    write_markdown(args.page, experiment, results, pictures.main)
    return results, pictures


def _references(folder: Path, experiment: Experiment, split: str) -> dict[str, list[str]]:
    data = PreparedData(folder)
    directions = [direction for direction in experiment.bucket if data.has_text(direction, split)]
    return {direction: data.read(direction, split).references for direction in directions}


if __name__ == "__main__":
    sys.exit(main())
