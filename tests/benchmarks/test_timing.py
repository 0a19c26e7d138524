"""Turns, rounds and medians, on a clock that the runs move."""

import pytest
import torch

from benchmarks.machine import code_fingerprint, quick_environment
from benchmarks.timing import Times, alternate, peak_memory


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, seconds, log, name):
        def run():
            log.append(name)
            self.now += seconds

        return run


def test_all_run_in_turn_and_the_warm_up_does_not_count():
    clock, log = Clock(), []
    runs = {name: clock.taking(seconds, log, name) for name, seconds in (("a", 1.0), ("b", 2.0))}
    times = alternate(runs, rounds=3, budget=100.0, warmup=2, clock=clock)
    assert "".join(log) == "ab" * 5
    assert times == {"a": Times(1.0, 1.0, 3), "b": Times(2.0, 2.0, 3)}


def test_a_slow_one_gets_fewer_rounds_spread_over_the_others():
    clock, log = Clock(), []
    runs = {name: clock.taking(seconds, log, name) for name, seconds in (("a", 1.0), ("slow", 50.0))}
    times = alternate(runs, rounds=9, budget=20.0, least=3, warmup=2, clock=clock)
    assert (times["a"].rounds, times["slow"].rounds) == (9, 3)
    assert log.index("slow") == 1
    assert log.count("slow") == 4  # one warm-up is enough for what takes longer than the budget
    timed = log[3:]
    assert [timed[: index].count("a") for index, name in enumerate(timed) if name == "slow"] == [1, 4, 7]


def test_reset_is_outside_of_the_time():
    clock = Clock()
    times = alternate(
        {"a": clock.taking(1.0, [], "a")}, rounds=3, budget=10.0, clock=clock, reset=clock.taking(5.0, [], "reset")
    )
    assert times["a"].median == 1.0


def test_median_and_least():
    assert Times.of([3.0, 1.0, 2.0, 10.0]) == Times(2.5, 1.0, 4)


def test_peak_memory_sees_what_is_freed_again():
    found = peak_memory(lambda: torch.ones(1 << 24).sum(), "cpu")
    if found is None:
        pytest.skip("this system does not tell")
    assert 0.9 * (1 << 26) < found < 1.5 * (1 << 26)


def test_other_code_has_another_fingerprint():
    assert code_fingerprint() == code_fingerprint()
    assert code_fingerprint() != code_fingerprint(("mtmoe/moe",))


def test_the_environment_is_complete_after_one_restart():
    once = quick_environment({"PATH": "/bin"})
    assert quick_environment(once) == once
    assert quick_environment({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"})["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
