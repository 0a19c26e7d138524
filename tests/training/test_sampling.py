import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.training.sampling import (
    draw_sentences,
    effective_epochs,
    epoch_quotas,
    keyed_uniform,
    temperature_probabilities,
)

SIZES = {"en-de": 1000, "de-en": 1000, "en-mk": 10}
sizes_of_directions = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10_000), min_size=1)


def test_temperature_one_keeps_the_proportions_and_infinity_makes_them_equal():
    assert temperature_probabilities(SIZES, 1.0)["en-mk"] == pytest.approx(10 / 2010)
    assert temperature_probabilities(SIZES, float("inf"))["en-mk"] == pytest.approx(1 / 3)


@given(sizes_of_directions, st.floats(0.5, 20.0))
def test_probabilities_sum_to_one_and_flatten_with_temperature(sizes, temperature):
    cold, warm = temperature_probabilities(sizes, temperature), temperature_probabilities(sizes, 2 * temperature)
    assert sum(cold.values()) == pytest.approx(1.0)
    spread = lambda p: max(p.values()) - min(p.values())  # noqa: E731
    assert spread(warm) <= spread(cold) + 1e-12


@given(sizes_of_directions, st.floats(0.5, 20.0), st.integers(1, 5000))
def test_quotas_sum_to_the_epoch_and_follow_the_probabilities(sizes, temperature, epoch_size):
    quotas = epoch_quotas(sizes, temperature, epoch_size)
    assert sum(quotas.values()) == epoch_size
    for name, share in temperature_probabilities(sizes, temperature).items():
        assert abs(quotas[name] - share * epoch_size) <= 1.0 + 1e-6


@given(sizes_of_directions)
def test_temperature_one_takes_each_sentence_once(sizes):
    assert epoch_quotas(sizes, 1.0) == sizes


def test_wrong_temperature_and_no_data_are_refused():
    with pytest.raises(ValueError, match="temperature 0 must be above 0"):
        temperature_probabilities(SIZES, 0)
    with pytest.raises(ValueError, match="none of the 1 directions has training sentences: en-de"):
        temperature_probabilities({"en-de": 0}, 1)


@given(st.integers(1, 50), st.integers(0, 200))
def test_draws_repeat_no_sentence_more_than_needed(size, quota):
    drawn = np.bincount(draw_sentences(size, quota, np.random.default_rng(0)), minlength=size)
    assert drawn.sum() == quota
    assert drawn.max() - drawn.min() <= 1


def test_effective_epochs():
    assert effective_epochs(SIZES, {"en-de": 500, "en-mk": 40}) == {"en-de": 0.5, "de-en": 0.0, "en-mk": 4.0}


def test_keyed_uniform_is_uniform_and_depends_on_every_word():
    draws = np.array([keyed_uniform(1, update, micro) for update in range(2000) for micro in range(3)])
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - 600) ** 2 / 600).sum() < 27.9  # chi squared, 9 degrees, p = 0.001
    assert len({keyed_uniform(1, 2, 3), keyed_uniform(2, 2, 3), keyed_uniform(1, 3, 3), keyed_uniform(1, 2, 4)}) == 4
    assert keyed_uniform(1, 2, 3) == keyed_uniform(1, 2, 3)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
