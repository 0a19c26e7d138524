"""The files of an experiment: one for each finished run, and its outputs."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe.errors import DataError
from mtmoe.evaluation.test_sets import read_json
from mtmoe.routing_table import RoutingTable

BUCKETS = ("very_low", "low", "high")
"""Resource buckets of an experiment, the fewest pairs first. They are disjoint, unlike those of an evaluation."""

Curve = list[tuple[int, dict[str, float]]]
"""(update, direction -> loss in bits a token), by rising update."""


@dataclass(frozen=True, slots=True)
class ExperimentRun:
    """One finished training of a configuration with one seed."""

    path: Path
    """Its file."""
    config: str
    """Name of the configuration."""
    seed: int
    """Of the training."""
    record: dict[str, Any]
    """The whole file."""

    @classmethod
    def load(cls, path: Path) -> ExperimentRun:
        """Read a run.

        Raises:
            DataError: the file is damaged, or lacks what names the run.
        """
        record = read_json(path, "a finished run of an experiment")
        try:
            return cls(path, str(record["config"]), int(record["seed"]), record)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is no run of an experiment: {error!r}") from error

    @property
    def title(self) -> str:
        """The configuration as people call it."""
        return str(self.record.get("title") or self.config)

    @property
    def bucket(self) -> dict[str, str]:
        """Direction -> its resource bucket."""
        return dict(self.record.get("bucket") or {})

    @property
    def pairs(self) -> dict[str, int]:
        """Direction -> its training pairs."""
        return {direction: int(count) for direction, count in (self.record.get("pairs") or {}).items()}

    def number(self, name: str) -> float | None:
        """A figure of the run, None where it was not measured."""
        value = self.record.get(name)
        return None if value is None else float(value)

    def scores(self, split: str) -> dict[str, dict[str, float]]:
        """Direction -> its scores; nothing where the run was not scored on this split."""
        return dict(self.record.get(f"{split}_scores") or {})

    def curve(self, name: str) -> Curve:
        """Losses by direction over the training: "valid", or "train_sample", training text read as in evaluation."""
        points = []
        for point in self.record.get(name) or []:
            losses = {direction: float(loss) for direction, loss in point["nll_loss"].items() if loss is not None}
            points.append((int(point["update"]), losses))
        return sorted(points, key=lambda point: point[0])

    def routing(self) -> RoutingTable | None:
        """What the gates chose; None for a dense model, or where nobody counted.

        It stands in the run's file, or in one that `mtmoe routing` wrote: ``routing/CONFIG.seedN.json``.

        Raises:
            DataError: the table is damaged.
        """
        value = self.record.get("routing")
        if value:
            return RoutingTable.from_json(value, f"routing of {self.path}")
        path = self.path.parent.parent / "routing" / f"{self.config}.seed{self.seed}.json"
        return RoutingTable.load(path) if path.is_file() else None

    def hypotheses(self, split: str) -> dict[str, list[str]]:
        """Direction -> its outputs; nothing where they were not kept.

        Raises:
            DataError: the file is damaged.
        """
        path = self.path.parent.parent / "outputs" / f"{self.config}.seed{self.seed}.{split}.jsonl.xz"
        if not path.is_file():
            return {}
        found = {}
        try:
            with lzma.open(path, "rt", encoding="utf-8", newline="\n") as stream:
                for line in stream:
                    entry = json.loads(line)
                    found[str(entry["direction"])] = [str(text) for text in entry["hypotheses"]]
        except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error
        return found


@dataclass(frozen=True, slots=True)
class Experiment:
    """All finished runs of an experiment so far."""

    name: str
    """Such as ``tatoeba``."""
    runs: tuple[ExperimentRun, ...]
    """By configuration and seed."""

    @classmethod
    def load(cls, folder: Path) -> Experiment:
        """Read ``FOLDER/runs/*.json``.

        Raises:
            DataError: there is no run, one is damaged, or two were trained on other data.
        """
        runs = sorted(
            (ExperimentRun.load(path) for path in sorted((folder / "runs").glob("*.json"))),
            key=lambda run: (run.config, run.seed),
        )
        if not runs:
            raise DataError(f"{folder / 'runs'} has no finished run (CONFIG.seedN.json)")
        prints = {str(run.record.get("data_fingerprint")): run.path.name for run in runs}
        if len(prints) > 1:
            raise DataError(f"runs of {folder} were trained on other data: {', '.join(sorted(prints.values()))}")
        return cls(folder.name, tuple(runs))

    @property
    def configs(self) -> dict[str, list[ExperimentRun]]:
        """Configuration -> its runs by rising seed."""
        found: dict[str, list[ExperimentRun]] = {}
        for run in self.runs:
            found.setdefault(run.config, []).append(run)
        return found

    @property
    def bucket(self) -> dict[str, str]:
        """Direction -> bucket, of all runs."""
        return {direction: bucket for run in self.runs for direction, bucket in run.bucket.items()}

    @property
    def pairs(self) -> dict[str, int]:
        """Direction -> training pairs."""
        return {direction: count for run in self.runs for direction, count in run.pairs.items()}

    def directions(self, bucket: str) -> list[str]:
        """The directions of a bucket."""
        return [direction for direction, one in self.bucket.items() if one == bucket]

    def split(self, wanted: str = "auto") -> str:
        """The text to report on: "test" as soon as every run was scored on it, else "valid"."""
        if wanted != "auto":
            return wanted
        return "test" if all(run.scores("test") for run in self.runs) else "valid"


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1) over seeds; None of a single one."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return float((sum((value - middle) ** 2 for value in values) / (len(values) - 1)) ** 0.5)


def mean_over(losses: Mapping[str, float], directions: Sequence[str]) -> float | None:
    """Mean over those of `directions` that have a value, each counting once; None where none has."""
    values = [losses[direction] for direction in directions if direction in losses]
    return mean(values) if values else None
