"""Validation curves of a run by direction: read from its log, smoothed, and judged for over-fitting."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtmoe.errors import ConfigError

Curve = Sequence[tuple[int, float]]
"""(update, value) pairs, rising in their updates."""

TOLERANCE = 0.002
"""Losses that differ by less than this share count as equal when a curve's best is looked for: on a plateau, noise of a
small validation set would otherwise choose."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a validation curve says of its direction."""

    best_update: int
    """Where the smoothed loss is lowest; of values that are equal up to `TOLERANCE`, the latest."""
    best_loss: float
    """Smoothed, at `best_update`."""
    last_update: int
    last_loss: float
    """Smoothed, as `best_loss`, so that noise at the end is no over-fitting."""

    @property
    def overfits(self) -> bool:
        """Whether the direction was better before than at the last validation."""
        return self.best_update < self.last_update

    @property
    def lost(self) -> float:
        """What has been lost since the best, in the curve's unit; 0 where the last validation is the best."""
        return self.last_loss - self.best_loss if self.overfits else 0.0


def smooth(curve: Curve) -> list[tuple[int, float]]:
    """Weigh each value with its neighbours, 1 : 2 : 1; the first and the last have one neighbour only."""
    values = [value for _, value in curve]
    smoothed = []
    for i, (update, value) in enumerate(curve):
        around = values[max(i - 1, 0) : i] + [value, value] + values[i + 1 : i + 2]
        smoothed.append((update, sum(around) / len(around)))
    return smoothed


def best_step(curve: Curve, tolerance: float = 0.0) -> int:
    """Update at which a curve is lowest; of values within `tolerance` (a share) of the lowest, the latest."""
    lowest = min(value for _, value in curve)
    return max(update for update, value in curve if value <= lowest + abs(lowest) * tolerance)


def judge(curve: Curve) -> Verdict:
    """Find the best of a smoothed curve.

    Raises:
        ValueError: the curve is empty.
    """
    if not curve:
        raise ValueError("a curve without validations has no best")
    smoothed = smooth(curve)
    best = best_step(smoothed, TOLERANCE)
    return Verdict(best, dict(smoothed)[best], *smoothed[-1])


def read_curves(
    log: str | os.PathLike[str], metric: str = "nll_loss", kind: str = "valid"
) -> dict[str, list[tuple[int, float]]]:
    """Read curves by direction from a run's ``log.jsonl``.

    A run that was killed logs some validations again when it goes on; the later line counts. A last line that is cut
    off, as a killed or running run leaves one, is passed over.

    Args:
        log: one JSON object a line.
        metric: keys ``{metric}_{direction}`` are read.
        kind: lines of this kind count.

    Raises:
        ConfigError: the file is missing, or a line is no JSON.
    """
    curves: dict[str, dict[int, float]] = {}
    try:
        text = Path(log).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"log {log} cannot be read: {error.strerror}") from error
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) > 1 and not text.endswith("\n"):
                break
            raise ConfigError(f"log {log}, line {number} is no JSON: {error}") from error
        if record.get("kind") != kind:
            continue
        for key, value in record.items():
            name = key.removeprefix(f"{metric}_")
            if name != key and "-" in name and not isinstance(value, str):
                curves.setdefault(name, {})[int(record["num_updates"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def value_at(curve: Curve, update: int) -> float | None:
    """The value at the last point up to `update`; None before the first."""
    return next((value for at, value in reversed(curve) if at <= update), None)


def trained_from(epochs: Curve) -> int:
    """First update of a direction's training as far as its effective epochs tell: the last validation before it."""
    return max((update for update, value in epochs if value == 0.0), default=0)


def judge_all(curves: Mapping[str, Curve]) -> dict[str, Verdict]:
    """Direction -> what its curve says; a direction without validations is an error.

    Raises:
        ConfigError: a direction, or the whole run, has no validation losses.
    """
    empty = [name for name, curve in curves.items() if not curve]
    if empty or not curves:
        raise ConfigError(f"no validation losses of {', '.join(empty) or 'any direction'}; validate more often")
    return {name: judge(curve) for name, curve in curves.items()}
