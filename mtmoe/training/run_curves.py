"""What a run's folder tells about its directions: where each was best, what it lost since, how often it was seen."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe.errors import ConfigError, DataError
from mtmoe.evaluation.buckets import BUCKETS, Buckets, assign_buckets, training_pairs
from mtmoe.evaluation.report import NUMBER, TEXT, Table, markdown_table
from mtmoe.files import write_json, write_text
from mtmoe.training.curves import Verdict, judge_all, read_curves, trained_from, value_at

logger = logging.getLogger(__name__)

Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class RunCurves:
    """The validation curves of a run, and what is known of its directions."""

    losses: Curves
    """Direction -> validation losses, bits a token."""
    sampled: Curves
    """The same of training pairs, with ``--train-sample``."""
    epochs: Curves
    """Direction -> how often its average training pair had been seen; empty for runs that did not log it."""
    verdicts: Mapping[str, Verdict]
    buckets: Buckets
    pairs: Mapping[str, int]
    """Direction -> training pairs, where data.json says it."""
    max_update: int
    """Updates that the run was planned for, or has made where its command does not say."""

    def trained_from(self) -> dict[str, int]:
        """Direction -> update at which its training began, as far as its epochs tell; 0 without them."""
        return {name: trained_from(self.epochs.get(name, [])) for name in self.losses}


def read_run(run: Path) -> RunCurves:
    """Read a run folder, finished or running, or a ``log.jsonl`` alone.

    Raises:
        ConfigError: there is no log, or it has no validation losses by direction.
    """
    log = run / "log.jsonl" if run.is_dir() else run
    losses = read_curves(log)
    verdicts = judge_all(losses)
    described = _read(log.with_name("run.json"))
    command = [str(word) for word in described.get("command", [])]
    planned = int(command[command.index("--max-update") + 1]) if "--max-update" in command[:-1] else 0
    data_folder = described.get("config", {}).get("data")
    data = _read(Path(data_folder) / "data.json") if data_folder else {}
    return RunCurves(
        losses=losses,
        sampled=read_curves(log, kind="train_sample"),
        epochs=read_curves(log, "epochs"),
        verdicts=verdicts,
        buckets=assign_buckets(list(losses), data),
        pairs=training_pairs(losses, data),
        max_update=planned or max(verdict.last_update for verdict in verdicts.values()),
    )


def direction_rows(run: RunCurves) -> list[dict[str, Any]]:
    """The figures of each direction, from the largest bucket to the smallest; None where something is not known."""
    order = {bucket: place for place, bucket in enumerate(BUCKETS)}
    rows = []
    for name in sorted(run.losses, key=lambda name: (order.get(run.buckets.of.get(name, ""), -1), name)):
        verdict, epochs, sampled = run.verdicts[name], run.epochs.get(name, []), run.sampled.get(name, [])
        rows.append(
            {
                "direction": name,
                "bucket": run.buckets.of.get(name),
                "train_pairs": run.pairs.get(name),
                "best_update": verdict.best_update,
                "best_loss": round(verdict.best_loss, 3),
                "last_loss": round(verdict.last_loss, 3),
                "lost": round(verdict.lost, 3),
                "overfits": verdict.overfits,
                "best_epochs": value_at(epochs, verdict.best_update),
                "epochs": value_at(epochs, verdict.last_update),
                "train_loss": sampled[-1][1] if sampled else None,
            }
        )
    return rows


def direction_table(rows: list[dict[str, Any]]) -> Table:
    """Lay out `direction_rows` for people; columns of which nothing is known are left out."""
    columns = [
        ("direction", "direction", TEXT, "{}"),
        ("bucket", "resource", TEXT, "{}"),
        ("train_pairs", "pairs", NUMBER, "{:,}"),
        ("best_update", "best update", NUMBER, "{:,}"),
        ("best_epochs", "epochs then", NUMBER, "{:.1f}"),
        ("best_loss", "best loss", NUMBER, "{:.3f}"),
        ("last_loss", "last loss", NUMBER, "{:.3f}"),
        ("lost", "lost since", NUMBER, "{:.3f}"),
        ("train_loss", "training loss", NUMBER, "{:.3f}"),
        ("epochs", "epochs seen", NUMBER, "{:.1f}"),
    ]
    kept = [column for column in columns if any(row[column[0]] is not None for row in rows)]
    cells = [
        ["" if row[key] is None else form.format(row[key]).replace("_", " ") if align == TEXT and key == "bucket"
         else form.format(row[key]) for key, _, align, form in kept]
        for row in rows
    ]  # fmt: skip
    return [(heading, align) for _, heading, align, _ in kept], cells


def report_markdown(run: RunCurves) -> str:
    """The table of a run, and what its columns mean."""
    rows = direction_rows(run)
    worse = [row["direction"] for row in rows if row["overfits"]]
    last = max(verdict.last_update for verdict in run.verdicts.values())
    parts = [
        "# Validation by direction",
        f"- {last:,} of {run.max_update:,} updates; losses in bits a token, smoothed over three validations\n"
        "- *best update*: lowest smoothed loss, the latest of equal ones; *lost since*: what the last validation is "
        "above it\n"
        f"- better before than at the last validation: {', '.join(worse) or 'none'}\n"
        f"- resource buckets: {run.buckets.description}",
        markdown_table(direction_table(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(folder: Path) -> RunCurves:
    """Write ``validation.json``, ``validation.md`` and, with matplotlib, ``validation.svg`` into a run's folder.

    Raises:
        ConfigError: the run has no validation losses by direction.
    """
    from mtmoe.evaluation.plot import plot_curves

    run = read_run(folder)
    target = folder if folder.is_dir() else folder.parent
    document = {
        "unit": "bits a token",
        "max_update": run.max_update,
        "buckets": {"rule": run.buckets.rule, "description": run.buckets.description},
        "directions": direction_rows(run),
        "curves": {"valid": run.losses, "train_sample": run.sampled, "epochs": run.epochs},
    }
    write_json(target / "validation.json", document)
    write_text(target / "validation.md", report_markdown(run))
    picture = plot_curves(run.losses, run.sampled, run.buckets.of)
    if picture is not None:
        write_text(target / "validation.svg", picture)
    return run


def try_report(folder: Path) -> None:
    """`write_report` at the end of training, where a run without validations is nothing to complain about."""
    try:
        write_report(folder)
    except (ConfigError, DataError) as error:
        logger.info("no report on validation: %s", error)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return document if isinstance(document, dict) else {}
