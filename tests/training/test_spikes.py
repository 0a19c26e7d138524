import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import ConfigError
from mtmoe.training.spikes import WINDOW, SpikeDetector

NORMS = st.lists(st.floats(0.01, 100), min_size=1, max_size=2 * WINDOW)


def judge(detector, norms):
    return [detector.exceeded(norm) for norm in norms]


@given(norms=NORMS, factor=st.floats(1.5, 20))
def test_a_norm_is_compared_with_the_median_of_those_before_it(norms, factor):
    norms = [*norms, *norms[::-1]]
    found = judge(SpikeDetector(factor), norms)
    for i, median in enumerate(found):
        before = norms[max(i - WINDOW, 0) : i]
        spike = len(before) == WINDOW and norms[i] > factor * statistics.median(before)
        assert median == (statistics.median(before) if spike else 0.0)


@given(norms=NORMS, rest=NORMS)
def test_a_restored_detector_goes_on_as_an_unbroken_one(norms, rest):
    whole, first, second = (SpikeDetector(2.0) for _ in range(3))
    assert judge(whole, norms) == judge(first, norms)
    second.restore(first.state())
    assert judge(second, rest) == judge(whole, rest)


def test_some_spikes_do_not_hide_the_next_one_but_a_lasting_change_is_accepted():
    detector = SpikeDetector(10.0)
    judge(detector, [1.0] * WINDOW)
    assert judge(detector, [50.0] * (WINDOW // 2)) == [1.0] * (WINDOW // 2)
    assert judge(detector, [50.0] * 10)[1:] == [0.0] * 9


def test_without_a_factor_nothing_is_a_spike_and_nothing_is_kept():
    detector = SpikeDetector(0.0)
    assert not any(judge(detector, [*[1.0] * WINDOW, 1e30]))
    assert detector.state() == []


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0, float("nan")])
def test_a_factor_that_would_skip_ordinary_updates_is_refused(factor):
    with pytest.raises(ConfigError, match="must be more than 1 times the median, or 0 for no guard"):
        SpikeDetector(factor)
