"""The whole evaluation: decode or read outputs, score every direction, aggregate, and write the reports."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe import __version__
from mtmoe.errors import DataError
from mtmoe.evaluation import report
from mtmoe.evaluation.buckets import Buckets, Thresholds, aggregate, assign_buckets, training_pairs
from mtmoe.evaluation.decoding import Advance, Decoded, HypothesisStore, Translate, decode
from mtmoe.evaluation.metrics import score
from mtmoe.evaluation.off_target import LanguageChecker
from mtmoe.evaluation.samples import Sample, choose_samples
from mtmoe.evaluation.test_sets import PreparedData, TestSet, read_lines, write_lines

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of evaluation.json; a reader refuses a newer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Which text is scored and how directions are grouped."""

    split: str = "test"
    """Text to score: test, or valid where a setting is still being chosen."""
    directions: tuple[str, ...] | None = None
    """Directions to score; None takes all that have text."""
    limit: int = 300
    """Segments of each direction, from the start of its file; 0 takes all."""
    bucket_rule: str = "auto"
    """How directions are put into resource buckets; see `mtmoe.evaluation.buckets.assign_buckets`."""
    thresholds: Thresholds | None = None
    """Training pairs at which the buckets begin; None takes the rule's own."""
    samples: int = 12
    """Translations to show."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} must be 0 (all segments) or more")
        if self.samples < 0:
            raise ValueError(f"samples={self.samples} must be 0 or more")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    result: dict[str, Any]
    """The content of evaluation.json."""
    samples: list[Sample]
    """A few translations."""


def evaluate(
    translate: Translate,
    data: PreparedData,
    output: Path,
    *,
    settings: EvaluationSettings,
    model: Mapping[str, Any],
    decoding: Mapping[str, Any],
    advance: Advance | None = None,
) -> Evaluation:
    """Decode every direction, score it, and write evaluation.json, .md, .html, samples.md, hypotheses and references.

    A direction whose outputs stand in `output` from the same model, sources and decoding settings is not decoded again,
    so an interrupted evaluation is simply started anew.

    Args:
        translate: the model, batched and in order.
        data: prepared data.
        output: folder to write to.
        settings: what to score.
        model: what identifies the model; must change when its outputs may.
        decoding: the decoding settings; must hold all that outputs depend on.
        advance: told how many more segments are decoded.

    Raises:
        DataError: the data lacks what was asked for, or is damaged.
        ValueError: a setting is out of range.
    """
    test_sets = read_test_sets(data, settings)
    made_by = {"model": model.get("fingerprint", dict(model)), "decoding": dict(decoding)}
    store = HypothesisStore(output / "hypotheses", made_by)
    decoded = {}
    for test_set in test_sets:
        decoded[test_set.direction] = decode(test_set, translate, store, advance or (lambda segments: None))
    return _finish(test_sets, decoded, data, output, settings, model, decoding)


def score_hypotheses(
    hypotheses: Path, data: PreparedData, output: Path, *, settings: EvaluationSettings, name: str | None = None
) -> Evaluation:
    """Score outputs that some other program made: one file ``en-de.txt`` a direction, one segment a line.

    Without directions in the settings, every file that fits a direction of the data is scored.

    Args:
        hypotheses: folder of the files.
        data: prepared data.
        output: folder to write to, as `evaluate` does.
        settings: what to score.
        name: of the system, for the report; by default the folder.

    Raises:
        DataError: a file is missing or has another number of lines than its test set.
    """
    if not hypotheses.is_dir():
        raise DataError(f"{hypotheses} is not a folder of hypotheses (one file en-de.txt for each direction)")
    present = [name for name in data.directions if (hypotheses / f"{name}.txt").is_file()]
    if settings.directions is None and not present:
        raise DataError(
            f"{hypotheses} has no file for any direction of {data.folder}; "
            f"expected names such as {data.directions[0] if data.directions else 'en-de'}.txt"
        )
    wanted = present if settings.directions is None else settings.directions
    test_sets = read_test_sets(data, settings, wanted)
    decoded = {}
    for test_set in test_sets:
        path = hypotheses / f"{test_set.direction}.txt"
        outputs = read_lines(path)
        if len(outputs) != len(test_set.references):
            raise DataError(
                f"{path} has {len(outputs)} lines, the {settings.split} set of {test_set.direction} has "
                f"{len(test_set.references)} (limit {settings.limit or 'none'}); set --limit to what was decoded"
            )
        decoded[test_set.direction] = Decoded(outputs, 0.0, reused=True)
        kept = output / "hypotheses" / path.name
        if kept.resolve() != path.resolve():
            write_lines(kept, outputs)
            kept.with_suffix(".json").unlink(missing_ok=True)
    model = {"name": name or str(hypotheses)}
    return _finish(test_sets, decoded, data, output, settings, model, {"method": "outputs were given"})


def read_test_sets(
    data: PreparedData, settings: EvaluationSettings, directions: Sequence[str] | None = None
) -> list[TestSet]:
    """Read every direction's segments, before anything slow begins."""
    wanted = settings.directions if directions is None else directions
    chosen = data.choose_directions(wanted, settings.split)
    return [data.read(direction, settings.split, settings.limit) for direction in chosen]


def _finish(
    test_sets: Sequence[TestSet],
    decoded: Mapping[str, Decoded],
    data: PreparedData,
    output: Path,
    settings: EvaluationSettings,
    model: Mapping[str, Any],
    decoding: Mapping[str, Any],
) -> Evaluation:
    outputs = {direction: one.outputs for direction, one in decoded.items()}
    checker = LanguageChecker({code for one in test_sets for code in (one.source, one.target)} | set(data.languages))
    directions, signatures = score_directions(test_sets, decoded, checker)
    buckets = assign_buckets(
        list(directions), data.description, rule=settings.bucket_rule, thresholds=settings.thresholds
    )
    sizes = training_pairs(directions, data.description)
    for direction, row in directions.items():
        row["bucket"] = buckets.of.get(direction)
        row["training_pairs"] = sizes.get(direction)
    result = _assemble(directions, signatures, buckets, data, settings, model, decoding)
    result["off_target_method"] = checker.method
    samples = choose_samples(test_sets, outputs, settings.samples)
    for test_set in test_sets:  # compare needs them, and the data folder may be gone by then
        write_lines(output / "references" / f"{test_set.direction}.txt", test_set.references)
    report.write_reports(output, result, samples)
    return Evaluation(result, samples)


def score_directions(
    test_sets: Sequence[TestSet], decoded: Mapping[str, Decoded], checker: LanguageChecker
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Score each direction.

    Returns:
        direction -> figures as in evaluation.json, and sacrebleu's signatures: ``chrf++`` is one text, ``bleu`` maps
        each signature to its directions, since the tokeniser follows the target language.
    """
    directions: dict[str, dict[str, Any]] = {}
    bleu_signatures: dict[str, list[str]] = {}
    chrf_signature = ""
    for test_set in test_sets:
        outcome = decoded[test_set.direction]
        scores = score(test_set.sources, outcome.outputs, test_set.references, test_set.target)
        off_target = checker.count(outcome.outputs, test_set.target, test_set.references)
        directions[test_set.direction] = {
            "chrf++": scores.chrf,
            "bleu": scores.bleu,
            "length_ratio": scores.length_ratio,
            "sentences": scores.sentences,
            "copy_chrf++": scores.copy_chrf,
            "untranslated": scores.untranslated,
            "off_target": off_target.share,
            "off_target_judged": off_target.judged,
            "off_target_unsure": off_target.unsure,
            "seconds": round(outcome.seconds, 3),
            "test_set": test_set.fingerprint,
        }
        chrf_signature = scores.chrf_signature
        bleu_signatures.setdefault(scores.bleu_signature, []).append(test_set.direction)
    return directions, {"chrf++": chrf_signature, "bleu": bleu_signatures}


def _assemble(
    directions: dict[str, dict[str, Any]],
    signatures: dict[str, Any],
    buckets: Buckets,
    data: PreparedData,
    settings: EvaluationSettings,
    model: Mapping[str, Any],
    decoding: Mapping[str, Any],
) -> dict[str, Any]:
    groups = aggregate(directions, buckets.of)
    everything = groups["all"]["all"]
    return {
        "format": FORMAT,
        "mean_chrf++": everything["chrf++"],
        "mean_bleu": everything["bleu"],
        "mean_copy_chrf++": everything["copy_chrf++"],
        "directions": directions,
        "groups": groups,
        "buckets": {"rule": buckets.rule, "description": buckets.description},
        "signatures": signatures,
        "model": dict(model),
        "data": {
            "folder": str(data.folder),
            "recipe": data.description.get("recipe"),
            "fingerprint": data.description.get("fingerprint"),
            "split": settings.split,
            "limit": settings.limit,
        },
        "decoding": dict(decoding),
        "seconds": round(sum(row["seconds"] for row in directions.values()), 3),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "mtmoe": __version__,
    }
