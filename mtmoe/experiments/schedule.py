"""Many runs, some at a time: which are done, how long the rest takes, and working them off."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from mtmoe.experiments.plan import Experiment, Run

POLL = 1.0
"""Seconds between two looks at the running processes."""


def minutes_of(experiment: Experiment) -> float:
    """Expected minutes of a run: the mean of the finished ones, else what the file says."""
    seconds = []
    for run in experiment.runs():
        if run.result.is_file():
            seconds.append(json.loads(run.result.read_text(encoding="utf-8"))["total_seconds"])
    return statistics.fmean(seconds) / 60 if seconds else experiment.minutes


def plan_lines(experiment: Experiment, runs: Sequence[Run], jobs: int) -> list[str]:
    """The plan for people: each run with its state, and how long the rest takes."""
    each = minutes_of(experiment)
    updates = int(experiment.base["options"]["max-update"])
    width = max(len(run.name) for run in runs)
    lines, left = [], 0.0
    for run in runs:
        total = int(run.configuration.options.get("max-update", updates))
        if run.result.is_file():
            state = "done"
        else:
            done = min(run.updates_done(), total)
            left += each * (1 - done / total)
            state = f"{done:,} of {total:,} updates" if done else f"to do, {each:.0f} min"
        after = f", after {run.needs.name}" if run.needs and not run.needs.result.is_file() else ""
        lines.append(f"{run.name:<{width}}  {state}{after}  ({run.configuration.title})")
    open_runs = sum(not run.result.is_file() for run in runs)
    lines.append(
        f"{len(runs) - open_runs} of {len(runs)} runs are done; the rest takes about {left / 60 / jobs:.1f} hours, "
        f"{jobs} at a time with {experiment.threads} thread{'s' * (experiment.threads > 1)} each"
    )
    return lines


class Pool:
    """Runs in processes of their own, so many at a time.

    Args:
        command: gives the command line of a run.
        jobs: runs at a time.
        report: gets a line of progress at a time.
    """

    def __init__(self, command: Callable[[Run], list[str]], jobs: int, report: Callable[[str], None] = print) -> None:
        self.command, self.jobs, self.report = command, jobs, report
        self._running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}
        self._signal = 0

    def work(self, runs: Sequence[Run]) -> dict[str, int]:
        """Work off runs, each after the one that it needs; a failed one does not stop the others.

        Returns:
            Name -> exit status of those that failed; of those that need a failed one, 1.
        """
        waiting = [run for run in runs if not run.result.is_file()]
        failed: dict[str, int] = {}
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while (waiting and not self._signal) or self._running:
                while len(self._running) < self.jobs and not self._signal:
                    ready = next((run for run in waiting if run.needs is None or run.needs.result.is_file()), None)
                    if ready is None:
                        break
                    waiting.remove(ready)
                    self._start(ready)
                if not self._running:  # what is left waits for runs that failed or were not asked for
                    failed |= {run.name: 1 for run in waiting}
                    break
                time.sleep(POLL)
                failed |= self._collect()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal:
            failed |= {run.name: 128 + self._signal for run in waiting}
        return failed

    def _start(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "experiment.log"
        self.report(f"{run.name}: started, see {log}")
        with Path(log).open("ab") as stream:
            # A session of its own: the terminal's Ctrl-C comes to us alone, and we pass it on once.
            process = subprocess.Popen(self.command(run), stdout=stream, stderr=stream, start_new_session=True)
        self._running[run.name] = (run, process)

    def _collect(self) -> dict[str, int]:
        failed = {}
        for name, (run, process) in list(self._running.items()):
            status = process.poll()
            if status is None:
                continue
            del self._running[name]
            if status == 0:
                self.report(f"{name}: done, see {run.result}")
            else:
                failed[name] = 128 - status if status < 0 else status
                self.report(f"{name}: ended with status {failed[name]}, see {run.folder / 'experiment.log'}")
        return failed

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        for _run, process in self._running.values():
            process.send_signal(signal.SIGTERM)
