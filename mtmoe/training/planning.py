"""A curriculum from the folder of a run or of data: the phases, and the table that says why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe.errors import ConfigError
from mtmoe.evaluation.buckets import assign_buckets, training_pairs
from mtmoe.evaluation.report import NUMBER, TEXT, markdown_table
from mtmoe.training.curriculum import COUNT_SHARES, DEFAULT_SHARES, Schedule, derive, derive_by_count, dump
from mtmoe.training.run_curves import direction_rows, direction_table, read_run

NOMINAL = 10_000
"""Updates that a plan by count is laid out over where their number is not given: starts are written as shares."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A curriculum and its reasons."""

    schedule: Schedule
    document: str
    """The phases, as a curriculum file."""
    explanation: str
    """Markdown: a row for each direction."""


def plan_from_run(
    run: Path, *, max_update: int = 0, shares: Sequence[float] = DEFAULT_SHARES, fit: str = "share"
) -> Plan:
    """Plan by where each direction of a run was best.

    Args:
        run: folder of a run, finished or not, or its log.
        max_update: updates of the run to plan, for starts in updates; 0 = as many as that run, as shares.
        shares: see `mtmoe.training.curriculum.derive`.
        fit: see there.

    Raises:
        ConfigError: the run has no validation losses by direction, or an option makes no sense.
    """
    curves = read_run(run)
    total = max_update or curves.max_update
    begun = curves.trained_from()
    schedule = derive(curves.verdicts, total, shares=shares, fit=fit, trained_from=begun)
    rows = direction_rows(curves)
    columns, cells = direction_table(rows)
    lines = []
    for row, line in zip(rows, cells, strict=True):
        name = row["direction"]
        needed = f"{row['best_update'] - begun[name]:,}" if row["overfits"] else "all"
        lines.append([*line, needed, f"{schedule.starts[name]:,}"])
    table = markdown_table(([*columns, ("needs", NUMBER), ("starts", NUMBER)], lines))
    notes = [f"Starts are updates of a run of {total:,}; *needs* are updates of training up to the best."]
    late = [name for name, start in begun.items() if start]
    if late:
        notes.append(f"That run has trained {', '.join(late)} only from a later update on; *needs* count from there.")
    return Plan(schedule, _document(schedule, total, max_update), "\n\n".join([table, *notes]) + "\n")


def plan_by_count(folder: Path, *, max_update: int = 0, shares: Sequence[float] = COUNT_SHARES) -> Plan:
    """Plan by training pairs alone.

    Args:
        folder: of prepared data, or of a run, which names its data.
        max_update: updates of the run to plan, for starts in updates; 0 = starts as shares.
        shares: see `mtmoe.training.curriculum.derive_by_count`.

    Raises:
        ConfigError: there is no data.json to count by.
    """
    data, directions = _described(folder)
    buckets, pairs = assign_buckets(directions, data), training_pairs(directions, data)
    if not buckets.of:
        raise ConfigError(f"the data.json of {folder} has no training pairs of its directions")
    total = max_update or NOMINAL
    schedule = derive_by_count({name: buckets.of.get(name, "high") for name in directions}, total, shares=shares)
    columns = [("direction", TEXT), ("resource", TEXT), ("pairs", NUMBER), ("starts", NUMBER)]
    order = sorted(directions, key=lambda name: (schedule.starts[name], name))
    start = "{:,}" if max_update else "{:.1%}"
    cells = [
        [name, buckets.of.get(name, "").replace("_", " "), f"{pairs.get(name, 0):,}",
         start.format(schedule.starts[name] / (1 if max_update else total))]
        for name in order
    ]  # fmt: skip
    explanation = f"{markdown_table((columns, cells))}\n\nResource buckets: {buckets.description}.\n"
    return Plan(schedule, _document(schedule, total, max_update), explanation)


def _document(schedule: Schedule, total: int, max_update: int) -> str:
    return dump(schedule, 0 if max_update else total)


def _described(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """data.json and the directions of prepared data, or of the data of a run."""
    run = folder / "run.json"
    if run.is_file():
        folder = Path(json.loads(run.read_text(encoding="utf-8"))["config"]["data"])
    missing = [name for name in ("data.json", "languages.json") if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder / missing[0]} is missing; give prepared data or a run that was trained on it")
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return data, list(json.loads((folder / "languages.json").read_text(encoding="utf-8"))["directions"])
