"""Decode every direction of a test set, score it with chrF++ and BLEU, and write reports for people and programs.

Writes to the output folder: evaluation.json, evaluation.md, evaluation.html, samples.md, hypotheses/ and references/.
Started again after an interruption, it decodes only the directions that are missing.

Examples:
  mtmoe evaluate runs/demo
  mtmoe evaluate model --data runs/demo/data --directions en-de,de-en --split valid --limit 100 --output valid
  mtmoe evaluate --hypotheses other-system/ --data runs/demo/data --output other-evaluation
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtmoe.errors import ConfigError, DataError
from mtmoe.languages import parse_direction

if TYPE_CHECKING:
    from mtmoe.evaluation import EvaluationSettings, Translate
    from mtmoe.evaluation.run import Evaluation
    from mtmoe.evaluation.test_sets import PreparedData

WHOLE_FILE = 1 << 30
"""Bytes up to which a model's file is hashed whole; of a larger one size, time and both ends stand for it."""

END = 1 << 20
"""Bytes hashed at each end of a larger file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="model folder, fairseq checkpoint (.pt), or folder of a run, whose best checkpoint is taken",
    )
    parser.add_argument(
        "--hypotheses",
        type=Path,
        metavar="DIR",
        help="score outputs that stand in DIR as en-de.txt, one segment a line, instead of a MODEL's",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="prepared data with the test text; default: `data` of the model's run"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write to; default: the model's run, else evaluation/NAME"
    )
    parser.add_argument("--split", choices=("test", "valid"), default="test", help="text to score")
    parser.add_argument(
        "--directions", default="all", metavar="A-B,…", help="directions to score, as en-de,eng_Latn-ron_Latn"
    )
    parser.add_argument(
        "--limit", type=int, default=300, metavar="N", help="segments of each direction, the first N; 0 takes all"
    )
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="translations to show")
    buckets = parser.add_argument_group("resource buckets")
    buckets.add_argument(
        "--buckets",
        choices=("auto", "absolute", "data", "relative"),
        default="auto",
        help="by training pairs (absolute), by the data recipe's levels (data), by the share of the largest pair "
        "(relative), or the first of them that tells directions apart (auto)",
    )
    buckets.add_argument(
        "--thresholds",
        metavar="LOW,HIGH",
        help="training pairs from which a direction is low and high; default: 100000,1000000",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--beam", type=int, default=4, metavar="N", help="hypotheses kept; 1 is greedy and fastest")
    decoding.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="above 1 favours long output")
    decoding.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="source tokens in a batch")
    decoding.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="number format of the model"
    )
    decoding.add_argument("--device", default="cpu", metavar="NAME", help="torch device to run on")
    decoding.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table and the samples; returns the exit status."""
    if (args.model is None) == (args.hypotheses is None):
        raise ConfigError("give either a MODEL to decode with or --hypotheses DIR with outputs to score")
    try:
        evaluation, output = _score_given(args) if args.model is None else _decode_and_score(args)
    except ValueError as error:  # an option that is out of range
        raise ConfigError(str(error)) from error
    _show(evaluation, output)
    return 0


def _score_given(args: argparse.Namespace) -> tuple[Evaluation, Path]:
    from mtmoe.evaluation import score_hypotheses

    if args.data is None:
        raise ConfigError("--hypotheses needs --data: the prepared data with the test text")
    output = args.output or args.hypotheses.parent / f"{args.hypotheses.resolve().name}-evaluation"
    return score_hypotheses(args.hypotheses, _open_data(args.data), output, settings=_settings(args)), output


def _decode_and_score(args: argparse.Namespace) -> tuple[Evaluation, Path]:
    # Imported here: torch takes seconds, and wrong options or missing data should be told at once.
    from tqdm import tqdm

    from mtmoe.checkpoint import locate_model
    from mtmoe.evaluation import evaluate
    from mtmoe.evaluation.run import read_test_sets

    settings = _settings(args)
    found = locate_model(args.model)
    run_folder = _run_folder(found)
    folder = args.data or (run_folder / "data" if run_folder else None)
    if folder is None or not folder.is_dir():
        raise DataError(f"no prepared data beside {found}; name the folder with --data")
    data = _open_data(folder)
    total = sum(len(test_set.sources) for test_set in read_test_sets(data, settings))
    output = args.output or run_folder or Path("evaluation") / found.resolve().name
    translate, decoding = _load(args, found, folder)
    model = {"path": str(found), "fingerprint": fingerprint(found)}
    with tqdm(total=total, unit="segment", desc="decoding", file=sys.stderr) as bar:
        evaluation = evaluate(
            translate, data, output, settings=settings, model=model, decoding=decoding, advance=bar.update
        )
    return evaluation, output


def _load(args: argparse.Namespace, found: Path, data: Path) -> tuple[Translate, dict[str, Any]]:
    """Load the model; gives the callable that translates and everything that its outputs depend on besides."""
    from mtmoe.inference import Translator
    from mtmoe.inference.translator import MAX_LENGTH_A, MAX_LENGTH_B

    translator = Translator.load(found, data=data, device=args.device, dtype=args.dtype, threads=args.threads)
    options = {"beam": args.beam, "length_penalty": args.length_penalty, "max_tokens": args.max_tokens}

    def translate(texts: Sequence[str], source: str, target: str, advance: Any) -> list[str]:
        reported = 0

        def progress(done: int, total: int) -> None:
            nonlocal reported
            advance(done - reported)
            reported = done

        return translator.translate(texts, source, target, **options, progress=progress)

    length_limit = f"{MAX_LENGTH_A:g} x source + {MAX_LENGTH_B} tokens"
    return translate, {**options, "dtype": args.dtype, "device": args.device, "length_limit": length_limit}


def _open_data(folder: Path) -> PreparedData:
    from mtmoe.evaluation.test_sets import PreparedData

    return PreparedData(folder)


def _settings(args: argparse.Namespace) -> EvaluationSettings:
    from mtmoe.evaluation import EvaluationSettings

    directions = None
    if args.directions != "all":
        named = [one.strip() for one in args.directions.split(",") if one.strip()]
        directions = tuple("-".join(parse_direction(one)) for one in named)
    return EvaluationSettings(
        split=args.split,
        directions=directions,
        limit=args.limit,
        bucket_rule=args.buckets,
        thresholds=_thresholds(args.thresholds),
        samples=args.samples,
    )


def _thresholds(text: str | None) -> Any:
    from mtmoe.evaluation.buckets import Thresholds

    if text is None:
        return None
    try:
        low, high = (int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--thresholds {text} is not LOW,HIGH, two whole numbers such as 100000,1000000") from error
    return Thresholds(low=low, high=high)


def _run_folder(model: Path) -> Path | None:
    """The training run that a checkpoint belongs to, or that a converted model folder lies in."""
    for folder in model.absolute().parents[:2]:
        if (folder / "data" / "languages.json").is_file():
            return Path(folder)
    return None


def fingerprint(model: Path) -> str:
    """Sha256 of a model file, or of a model folder's files with their names; its card and figures do not count.

    A file above a gigabyte is known by its size, time of change and both ends, since hashing a model of a hundred
    gigabytes takes longer than decoding.
    """
    from mtmoe.checkpoint.folder import identity, is_model_folder

    if model.is_dir() and is_model_folder(model) and (known := identity(model)) is not None:
        return known
    hasher = hashlib.sha256()
    for path in sorted(model.rglob("*")) if model.is_dir() else [model]:
        if not path.is_file():
            continue
        hasher.update(f"{path.relative_to(model) if path != model else ''}\0".encode())
        status = path.stat()
        with path.open("rb") as stream:
            if status.st_size <= WHOLE_FILE:
                hasher.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            hasher.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            hasher.update(stream.read(END))
            stream.seek(-END, 2)
            hasher.update(stream.read(END))
    return hasher.hexdigest()


def _show(evaluation: Evaluation, output: Path) -> None:
    from mtmoe.evaluation.report import direction_table, group_table, markdown_table, samples_text, summary_lines

    result = evaluation.result
    print(markdown_table(direction_table(result)))
    print()
    print(markdown_table(group_table(result)))
    print()
    print("\n".join(summary_lines(result)))
    if evaluation.samples:
        print()
        print(samples_text(evaluation.samples))
    print(
        f"\nwrote {output / 'evaluation.json'}, evaluation.md, evaluation.html, samples.md, hypotheses/ and references/"
    )
