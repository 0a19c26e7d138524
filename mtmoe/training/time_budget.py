"""How many updates fit into a number of minutes: measured once, then kept."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtmoe.errors import ConfigError, MtmoeError
from mtmoe.files import write_json
from mtmoe.training.preset import TrainConfig, build_command
from mtmoe.training.process import run_training
from mtmoe.training.run_log import parse_metrics

CALIBRATION_SECONDS = 40.0
"""Of real training, after the warm-up, to find the rate of updates."""

WARM_UPDATES = 20
"""Updates of the short training that do not count."""

RESERVE = 0.07
"""Share of the budget that is kept for the last validation and checkpoint, and for a rate that drops: with 0.04, the
last 6 % of the updates of a 20-minute run on a shared machine did not fit."""


def time_budget(
    config: TrainConfig, environment: Mapping[str, str], report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Options that make training fit into ``config.minutes``: the number of updates, and a hard limit behind it.

    The rate is measured once, in a short training of the same model and data in a temporary folder, and kept in
    ``calibration.json``: a resumed run has the same schedule as an unbroken one.

    Raises:
        MtmoeError: the short training failed.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    path = config.folder / "calibration.json"
    wanted = {"minutes": config.minutes, "options": json.loads(json.dumps(dict(config.options))), "arch": config.arch}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {key: stored.get(key) for key in wanted} == wanted:
            report(f"time budget: {stored['max_update']} updates in {config.minutes:g} minutes, as measured before")
            return _budget_options(config, stored["max_update"])
        if (config.folder / "checkpoints" / "checkpoint_last.pt").exists():
            raise ConfigError(f"{path} is of other minutes or options; the schedule of a begun run cannot change")
    report(f"time budget: training for {CALIBRATION_SECONDS:.0f} seconds to measure the rate of updates")
    measured = calibrate(config, environment)
    seconds = config.minutes * 60 * (1 - RESERVE) - measured["start_seconds"] - measured["end_seconds"]
    spent = measured["validation_seconds"] * measured["validations_per_update"]
    max_update = max(1, int(seconds / (measured["update_seconds"] + spent)))
    write_json(path, {**wanted, **measured, "max_update": max_update})
    rate = 1 / measured["update_seconds"]
    report(f"time budget: {rate:.2f} updates/s, so {max_update} in {config.minutes:g} minutes")
    return _budget_options(config, max_update)


def _budget_options(config: TrainConfig, max_update: int) -> dict[str, Any]:
    # The limit only acts when the machine gets slower: the schedule then ends before its lr reaches 0.
    return {"max_update": max_update, "total_num_update": max_update, "stop_time_hours": config.minutes / 60}


def calibrate(config: TrainConfig, environment: Mapping[str, str]) -> dict[str, float]:
    """Train for a short while in a temporary folder, and measure.

    Returns:
        ``update_seconds``; ``start_seconds`` before the first update; ``validation_seconds`` of one validation with
        its checkpoint, ``end_seconds`` = the same; ``validations_per_update``, from the options.

    Raises:
        MtmoeError: it failed; the end of its output is in the text.
    """
    validates = not config.options.get("disable-validation")
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=config.folder) as folder:
        command = build_command(
            config, save_dir=Path(folder), log_interval=10, max_update=1_000_000, total_num_update=1_000_000,
            validate_interval_updates=100 if validates else None, save_interval_updates=None, stop_time_hours=None,
        )  # fmt: skip
        watch = _Calibration()
        logs = Path(folder) / "logs"
        status = run_training(config, command, environment, watch.line, watch.lines.append, logs)
    if len(watch.steady) < 2:
        tail = "\n  ".join(watch.lines[-15:])
        raise MtmoeError(f"the training to measure the rate of updates ended with status {status}:\n  {tail}")
    (first_time, first), (last_time, last) = watch.steady[0], watch.steady[-1]
    # None came into the window: take a second for each minute of the budget, which is plenty for a valid-limit.
    paused = sum(watch.pauses.values())
    one = paused / len(watch.pauses) if watch.pauses else config.minutes * validates
    intervals = [int(config.options.get(key) or 0) for key in ("validate-interval-updates", "save-interval-updates")]
    rate = max((1 / each for each in intervals if each), default=0.0)
    if watch.epoch_batches:
        freq = int(config.options.get("update-freq") or 1)
        rate += freq / watch.epoch_batches / int(config.options.get("validate-interval") or 1)
    return {
        "update_seconds": max(last_time - first_time - paused, 1e-6) / (last - first),
        "start_seconds": watch.steady[0][0] - watch.begun - WARM_UPDATES * 0.1,
        "validation_seconds": one if validates else 0.0,
        "end_seconds": one + 1.0,
        "validations_per_update": rate,
    }


class _Calibration:
    """Reads the output of the short training, and says when it has seen enough."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.lines: list[str] = []
        self.steady: list[tuple[float, int]] = []
        """(time, update) of each line of metrics after the warm-up."""
        self.pauses: dict[int, float] = {}
        """Update -> seconds of its validation, over all sets that are scored; after the warm-up."""
        self.epoch_batches = 0
        self._validating = 0.0

    def line(self, text: str) -> bool:
        """Take a line of output; true once there is nothing more to learn."""
        now = time.monotonic()
        self.lines.append(text)
        batches = re.search(r"\| epoch 1 from update 0: .* (\d+) batches", text)
        if batches:
            self.epoch_batches = int(batches[1])
        if "begin validation on" in text:
            self._validating = now
        record = parse_metrics(text)
        if record is None:
            return False
        if record["kind"] == "train_inner":
            # A warm-up first: allocator, thread pools, the first batches of each length.
            if record["num_updates"] >= WARM_UPDATES:
                self.steady.append((now, int(record["num_updates"])))
        elif record["kind"] != "train" and self._validating and self.steady:
            update = int(record["num_updates"])
            self.pauses[update] = self.pauses.get(update, 0.0) + now - self._validating
            self._validating = 0.0
        return len(self.steady) > 2 and now - self.steady[0][0] > CALIBRATION_SECONDS
