"""Presets of training: what `mtmoe train` reads from YAML, and the fairseq-train command that follows."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtmoe.errors import ConfigError
from mtmoe.files import read_yaml
from mtmoe.training.curriculum import AUTO, load


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A preset: what `mtmoe train` reads from YAML, and saves in ``run.json``."""

    data: str
    """Folder that `mtmoe prepare` wrote."""
    output: str
    """Run folder; checkpoints, logs and the command go there."""
    arch: str = "mtmoe_transformer_tiny"
    """fairseq architecture."""
    task: str = "mtmoe_translation"
    """fairseq task."""
    criterion: str = "mtmoe_label_smoothed_cross_entropy"
    """fairseq criterion."""
    optimizer: str = "mtmoe_adamw"
    """fairseq optimiser."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Any other option of fairseq-train, without dashes: ``max-tokens: 1024``, ``cpu: true``; false leaves it out."""
    curriculum: Sequence[Mapping[str, Any]] | str | None = None
    """Phases, or the name of a file of phases; they are written to the run folder. "auto": training decides."""
    minutes: float = 0.0
    """Time budget of training; max-update then follows from a short calibration. 0 = as options say."""
    threads: int = 0
    """OMP_NUM_THREADS of each process; 0 = the cores that this process may use, divided between those of training."""
    nproc: int = 1
    """Processes of training on this machine; with GPUs, one for each."""
    max_restarts: int = 0
    """Times that all processes start again from the last checkpoint when one of several has failed."""
    nnodes: int = 1
    """Machines that train together, each with `nproc` processes and the same run folder."""
    rdzv_endpoint: str = ""
    """``host:port`` of one of the machines, at which they meet; "" = there is only this one."""
    rdzv_id: str = "mtmoe"
    """Name of the run at that endpoint, the same on all machines."""
    allocator: str = "auto"
    """"auto": tcmalloc where it is installed, else glibc with settings for training; "system": leave it alone."""

    def __post_init__(self) -> None:
        if self.minutes < 0:
            raise ConfigError(f"minutes={self.minutes} must not be negative; 0 = no budget")
        if self.allocator not in ("auto", "system"):
            raise ConfigError(f"allocator={self.allocator!r} is unknown; choose one of: auto, system")
        for name, least in (("nproc", 1), ("nnodes", 1), ("max_restarts", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise ConfigError(f"{name}={number!r} must be a whole number, {least} at least")
        if self.rdzv_endpoint and not re.fullmatch(r".+:\d+", self.rdzv_endpoint):
            raise ConfigError(f"rdzv_endpoint={self.rdzv_endpoint!r} must be host:port, such as node1:29500")
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError(f"nnodes={self.nnodes} needs rdzv_endpoint: host:port of one of the machines")
        if self.nnodes > 1 and self.minutes:
            raise ConfigError("minutes are measured on one machine; with nnodes give max-update among the options")
        fields = {"save-dir", "user-dir", "arch", "task", "criterion", "optimizer", "curriculum-file"}
        fixed = fields & set(self.options)
        if fixed:
            raise ConfigError(f"options must not set {', '.join(sorted(fixed))}; that is set outside of options")

    @property
    def distributed(self) -> bool:
        """Whether training has several processes."""
        return self.nproc * self.nnodes > 1

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a preset, and change some of it.

    Args:
        path: YAML file with the fields of `TrainConfig`.
        overrides: ``key=value``; a key that is no field of the config is an option of fairseq-train, with or without
            ``options.`` before it. Values are YAML.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value makes no sense.
    """
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold keys and values, such as data: runs/demo/data")
    document["options"] = {str(key).replace("_", "-"): value for key, value in (document.get("options") or {}).items()}
    known = set(TrainConfig.__dataclass_fields__)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override!r} must be key=value, such as max-tokens=2048")
        value = yaml.safe_load(text)
        if key in known and key != "options":
            document[key] = value
        else:
            document["options"][key.removeprefix("options.").replace("_", "-")] = value
    unknown = sorted(set(document) - known)
    if unknown:
        raise ConfigError(
            f"{path}: unknown key {', '.join(map(str, unknown))}; choose from: {', '.join(sorted(known))}. "
            "Options of fairseq-train go under options:"
        )
    missing = [key for key in ("data", "output") if not document.get(key)]
    if missing:
        raise ConfigError(f"{path}: {' and '.join(missing)} must be given")
    document["curriculum"] = _phases(document.get("curriculum"))
    return TrainConfig(**document)


def _phases(given: Any) -> Any:
    """Phases instead of the name of their file: ``run.json`` then says what the run was trained with."""
    if not isinstance(given, str) or given == AUTO:
        return given
    load(given)  # a mistake is named now, not after the data has been loaded
    document = read_yaml(given, "curriculum")
    return document["phases"] if isinstance(document, dict) else document


def plugin_folder() -> Path:
    """The folder of the fairseq plugins, for ``--user-dir``.

    Raises:
        ConfigError: they are not installed.
    """
    found = importlib.util.find_spec("fairseq_plugins")  # finds without importing: that would load fairseq
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the fairseq plugins are not installed; install the package with pip, or run in its checkout")
    return Path(next(iter(found.submodule_search_locations))).resolve()


def build_command(config: TrainConfig, *, save_dir: Path | None = None, **changes: Any) -> list[str]:
    """The fairseq-train command of a preset, word by word.

    Args:
        config: the preset.
        save_dir: where checkpoints go; by default ``checkpoints`` in the run folder.
        changes: options that come before those of the preset, with underscores; None leaves one out.

    Raises:
        ConfigError: fairseq-train is not installed.
    """
    options: dict[str, Any] = {
        "user-dir": plugin_folder(),
        "save-dir": save_dir or config.folder / "checkpoints",
        "arch": config.arch,
        "task": config.task,
        "criterion": config.criterion,
        "optimizer": config.optimizer,
        "log-format": "json",
        "num-workers": 0,
        **config.options,
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    if config.curriculum is not None:
        options["curriculum-file"] = AUTO if config.curriculum == AUTO else config.folder / "curriculum.yaml"
    if options.get("lr-scheduler") == "polynomial_decay":
        options.setdefault("total-num-update", options.get("max-update"))
    words = [str(_program("fairseq-train")), config.data]
    for key, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{key}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return words


def _program(name: str) -> Path:
    """A command of the Python that runs this, or of the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed; install the extra: pip install 'mtmoe[train]'")
    return Path(found)
