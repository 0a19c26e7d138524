"""What an experiment is: one base preset, the configurations that change it, and the runs that follow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from mtmoe.errors import ConfigError
from mtmoe.files import read_yaml
from mtmoe.training.preset import TrainConfig

MINUTES = 20.0
"""Guess of a run's time where neither the file nor a finished run tells it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedCurriculum:
    """A curriculum that follows from another configuration's run with the same seed."""

    source: str
    """Configuration whose validation curves are read."""
    shares: tuple[float, ...]
    """Lengths of the phases; see `mtmoe.training.curriculum.derive`."""
    fit: str = "share"
    """How the phases follow from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One row of the table: how it differs from the base."""

    name: str
    """Short name, also of its folder."""
    title: str
    """For people."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of fairseq-train that differ from the base; null takes one of the base out."""
    curriculum: Sequence[Mapping[str, Any]] | str | None = None
    """Phases, or "auto"; see `TrainConfig`."""
    derived: DerivedCurriculum | None = None
    """Instead of phases: derive them."""
    seeds: tuple[int, ...] = ()
    """Seeds of its runs; empty takes the experiment's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """An experiment file; see scripts/experiments/low_resource.yaml."""

    name: str
    """Short name."""
    recipe: str
    """Data recipe, for `mtmoe prepare`."""
    output: Path
    """Folder of data, checkpoints and logs; not kept in version control."""
    results: Path
    """Folder of what came out: a JSON file for each run, and its translations."""
    baseline: str
    """Configuration that the others are compared with."""
    seeds: tuple[int, ...]
    """Seeds of the runs of each configuration."""
    base: Mapping[str, Any]
    """Preset that all configurations start from: ``arch`` and ``options``."""
    configurations: tuple[Configuration, ...]
    """In the order in which they are run."""
    checkpoint: str = "best"
    """Model of a run that is scored: "best" by its best-checkpoint-metric, or "last"."""
    beam: int = 4
    """Beam of decoding."""
    length_penalty: float = 1.0
    """Length penalty of decoding."""
    threads: int = 1
    """Threads of each run."""
    jobs: int = 2
    """Runs at a time."""
    minutes: float = MINUTES
    """A run's expected time, until a finished one tells it."""

    def __post_init__(self) -> None:
        if self.checkpoint not in ("best", "last"):
            raise ValueError(f"checkpoint={self.checkpoint!r} must be one of: best, last")

    @property
    def data(self) -> Path:
        """The prepared data."""
        return self.output / "data"

    def configuration(self, name: str) -> Configuration:
        """Find a configuration.

        Raises:
            ConfigError: there is none of that name.
        """
        for one in self.configurations:
            if one.name == name:
                return one
        raise ConfigError(f"configuration {name!r} is unknown; {self.name} has: {', '.join(names(self))}")

    def runs(self, only: Iterable[str] = (), seeds: Iterable[int] = ()) -> list[Run]:
        """All runs, seed by seed, so that each configuration has one run before any has two.

        Args:
            only: names of configurations; none takes all.
            seeds: seeds; none takes those of the experiment and its configurations.

        Raises:
            ConfigError: a configuration is unknown.
        """
        chosen = [self.configuration(name) for name in only] or list(self.configurations)
        wanted = tuple(seeds)
        pairs = [(one, seed) for one in chosen for seed in wanted or one.seeds or self.seeds]
        order = sorted(dict.fromkeys(seed for _, seed in pairs))
        return [Run(self, one, seed) for number in order for one, seed in pairs if seed == number]


def names(experiment: Experiment) -> list[str]:
    """Names of all configurations."""
    return [one.name for one in experiment.configurations]


@dataclass(frozen=True, slots=True)
class Run:
    """One training: a configuration and a seed."""

    experiment: Experiment
    """Where it belongs."""
    configuration: Configuration
    """What is trained."""
    seed: int
    """Of weights, batches and masks."""

    @property
    def name(self) -> str:
        """For messages and file names."""
        return f"{self.configuration.name}.seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.experiment.output / self.configuration.name / f"seed{self.seed}"

    @property
    def result(self) -> Path:
        """The file that says that it is done, and what came of it."""
        return self.experiment.results / "runs" / f"{self.name}.json"

    @property
    def needs(self) -> Run | None:
        """The run that has to be done before."""
        derived = self.configuration.derived
        if derived is None:
            return None
        return Run(self.experiment, self.experiment.configuration(derived.source), self.seed)

    def updates_done(self) -> int:
        """Updates that its log tells of."""
        log = self.folder / "log.jsonl"
        if not log.is_file():
            return 0
        done = 0
        for line in log.read_text(encoding="utf-8").splitlines():
            if '"train_inner"' in line:
                done = int(json.loads(line)["num_updates"])
        return done

    def preset(self, phases: Sequence[Mapping[str, Any]] | str | None) -> TrainConfig:
        """The preset to train with.

        Args:
            phases: the curriculum, with a derived one worked out.
        """
        base = dict(self.experiment.base)
        options = {**base.pop("options", {}), **self.configuration.options, "seed": self.seed}
        return TrainConfig(
            **base,
            data=str(self.experiment.data),
            output=str(self.folder),
            threads=self.experiment.threads,
            options={key: value for key, value in options.items() if value is not None},
            curriculum=phases,
        )


def load_experiment(path: str | os.PathLike[str]) -> Experiment:
    """Read an experiment file.

    Raises:
        ConfigError: it cannot be read, a key is unknown or missing, or a value makes no sense.
    """
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold keys and values, such as name: low_resource")
    _check_keys(document, Experiment, str(path))
    rows = document.pop("configurations")
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{path}: configurations must map names to what they change")
    try:
        experiment = Experiment(
            **{**document, "output": Path(document["output"]), "results": Path(document["results"])}
            | {"seeds": tuple(document["seeds"])},
            configurations=tuple(_configuration(name, row, str(path)) for name, row in rows.items()),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for one in (experiment.baseline, *(c.derived.source for c in experiment.configurations if c.derived)):
        experiment.configuration(one)
    for run in experiment.runs():
        run.preset(None)  # wrong options are told now, not after hours
    return experiment


def _configuration(name: str, row: Any, path: str) -> Configuration:
    where = f"{path}, configuration {name}"
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: {row!r} must be a mapping with title and what it changes")
    _check_keys({**row, "name": name}, Configuration, where)
    derived = row.get("derived")
    if derived is not None:
        if row.get("curriculum"):
            raise ConfigError(f"{where}: give curriculum or derived, not both")
        _check_keys(derived, DerivedCurriculum, f"{where}, derived")
        derived = DerivedCurriculum(**{**derived, "shares": tuple(derived["shares"])})
    options = {str(key).replace("_", "-"): value for key, value in (row.get("options") or {}).items()}
    return Configuration(
        name=name,
        title=row["title"],
        options=options,
        curriculum=row.get("curriculum"),
        derived=derived,
        seeds=tuple(row.get("seeds") or ()),
    )


def _check_keys(value: Mapping[str, Any], kind: Any, where: str) -> None:
    known = {item.name: item for item in fields(kind)}
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; choose from: {', '.join(known)}")
    missing = [
        name
        for name, item in known.items()
        if item.default is MISSING and item.default_factory is MISSING and name not in value
    ]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
