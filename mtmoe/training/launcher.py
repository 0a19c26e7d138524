"""Start fairseq-train from a preset, write down how, and go on with a run that was stopped."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mtmoe.errors import ConfigError, DataError
from mtmoe.files import write_json, write_text
from mtmoe.training.preset import TrainConfig, build_command
from mtmoe.training.process import MALLOC_SETTINGS, build_environment, run_training
from mtmoe.training.run_curves import try_report
from mtmoe.training.run_log import RunLog
from mtmoe.training.time_budget import time_budget


def train(config: TrainConfig, *, resume: bool = True, report: Callable[[str], None] = print) -> int:
    """Run a preset to its end, or go on with it.

    Writes in the run folder: ``checkpoints/``, ``log.jsonl`` (a JSON object for each line of metrics), ``train.log``
    (all that fairseq prints), with several processes ``logs/rank0.log`` and so on, ``command.txt``, ``run.json``, with
    a time budget ``calibration.json`` and, in the end, ``validation.md``, ``.json`` and ``.svg``: what each direction
    was at its best, and what it lost since.

    Args:
        config: the preset.
        resume: go on from ``checkpoint_last.pt`` where there is one; else refuse a folder that has checkpoints.
        report: gets a line of progress at a time.

    Returns:
        The exit status of fairseq-train; 0 = done, 143 and 130 = stopped by a signal, with a checkpoint.

    Raises:
        ConfigError, DataError: the preset cannot be run.
    """
    if not (Path(config.data) / "languages.json").is_file():
        raise DataError(f"{config.data} is no prepared data: languages.json is missing; run `mtmoe prepare` first")
    last = config.folder / "checkpoints" / "checkpoint_last.pt"
    if last.exists() and not resume:
        raise ConfigError(f"{last} exists; go on with --resume auto, or give another output folder")
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.curriculum is not None and not isinstance(config.curriculum, str):
        phases = [dict(phase) for phase in config.curriculum]
        write_text(config.folder / "curriculum.yaml", yaml.safe_dump(phases, sort_keys=False))
    environment = build_environment(config, report)
    changes: dict[str, Any] = {}
    if config.minutes:
        changes = time_budget(config, environment, report)
    command = build_command(config, **changes)
    write_text(config.folder / "command.txt", shlex.join(command) + "\n")
    write_json(config.folder / "run.json", describe_run(config, command, environment))
    report(shlex.join(command))
    if config.distributed:
        machines = f" on each of {config.nnodes} machines" if config.nnodes > 1 else ""
        report(f"processes: {config.nproc}{machines}; their logs are {config.folder / 'logs'}/rank*.log")
    if last.exists():
        report(f"resuming from {last}")
    log = RunLog(config.folder, report)
    with log:
        status = run_training(config, command, environment, log.line, log.note)
    try_report(config.folder)
    if status == 0:
        report(f"training is done: {config.folder / 'checkpoints'}")
    elif status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        report("training was stopped; the same command goes on with it")
    elif config.distributed:  # the launcher has said why
        report(f"training ended with status {status}; the logs of all processes are in {config.folder / 'logs'}")
    else:
        report(f"fairseq-train ended with status {status}; the end of {config.folder / 'train.log'} says why:")
        for line in log.tail:
            report(f"  {line}")
    return status


def describe_run(config: TrainConfig, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What is needed to tell how a run was made: config, data, versions, machine."""
    data = Path(config.data) / "data.json"
    fingerprint = json.loads(data.read_text(encoding="utf-8")).get("fingerprint") if data.is_file() else None
    versions = {}
    for package in ("mtmoe", "torch", "ve-fairseq", "numpy", "sentencepiece"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": json.loads(json.dumps(asdict(config))),
        "command": list(command),
        "seed": config.options.get("seed", 1),
        "data_fingerprint": fingerprint,
        "dictionary_sha256": hashlib.sha256((Path(config.data) / "dict.txt").read_bytes()).hexdigest(),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"cpu_count": os.cpu_count(), "platform": platform.platform()},
        "environment": {
            name: environment[name]
            for name in ("OMP_NUM_THREADS", "LD_PRELOAD", *MALLOC_SETTINGS)
            if name in environment
        },
    }


def _git_revision() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    words = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
