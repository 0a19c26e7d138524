"""Time several things in turn, and see how much memory one of them takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one thing over the rounds."""

    median: float
    min: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Summarise at least one measurement."""
        return cls(statistics.median(seconds), min(seconds), len(seconds))


def alternate(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    budget: float,
    least: int = 2,
    warmup: int = 2,
    reset: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Run all in turn, A B C A B C, so that a change of the machine's speed meets all of them alike.

    Args:
        runs: name -> what to time.
        rounds: timed turns of each.
        budget: seconds that one may take in all; a slower one gets fewer rounds, spread over the others'.
        least: rounds that even the slowest gets.
        warmup: turns before those; one that takes the whole budget by itself gets a single one.
        reset: called before each run, outside its time.
        clock: tells the time in seconds, all work on the device done.

    Returns:
        Name -> times.
    """
    last: dict[str, float] = {}

    def once(name: str) -> float:
        reset()
        started = clock()
        runs[name]()
        return clock() - started

    for _ in range(warmup):
        for name in runs:
            if last.get(name, 0.0) < budget:
                last[name] = once(name)
    wanted = {name: max(least, min(rounds, int(budget / max(last[name], 1e-9)))) for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    turns = max(rounds, least)
    for turn in range(turns):
        for name, count in wanted.items():
            # Even steps: with 3 of 9 rounds the turns 0, 3 and 6.
            if turn * count // turns != (turn - 1) * count // turns:
                times[name].append(once(name))
    return {name: Times.of(seconds) for name, seconds in times.items()}


def device_clock(device: str) -> Callable[[], float]:
    """A clock that waits for the device."""
    if device == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes that `run` adds to the process at its peak: resident memory on a CPU, allocated memory on a GPU.

    Free memory that the allocator keeps is given back first, so that it cannot hide what `run` takes.

    Returns:
        The bytes; None where the system cannot tell (Linux can).
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM, the peak, becomes the current size
        before = _status("VmHWM")
    except OSError:
        return None
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _give_back() -> None:
    process = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        process.malloc_trim(0)
    with contextlib.suppress(AttributeError):
        process.MallocExtension_ReleaseFreeMemory()
