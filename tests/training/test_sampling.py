import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.training.sampling import (
    Pool,
    draw_part,
    draw_sentences,
    effective_epochs,
    epoch_quotas,
    keyed_uniform,
    permuted,
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


@given(st.integers(1, 400), st.integers(0, 1 << 63))
def test_a_keyed_permutation_is_one(size, word):
    assert sorted(permuted(size, np.arange(size), (word,)).tolist()) == list(range(size))


def test_a_keyed_permutation_mixes_and_needs_no_memory_for_the_rest():
    size, some = 3 * 10**9 + 7, np.arange(10**6, 10**6 + 40_000)
    numbers = permuted(size, some, (1, 2))
    assert len(set(numbers.tolist())) == len(some)
    counts = np.histogram(numbers, bins=40, range=(0, size))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 72.1  # chi squared, 39 degrees, p = 0.001
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    ends = numbers % 64  # a stride in the grid would show here
    assert ((np.bincount(ends, minlength=64) - 625) ** 2 / 625).sum() < 103.4  # 63 degrees
    for key in ((1, 3), (2, 1), (1,)):
        assert (permuted(size, some, key) == numbers).mean() < 0.001
    assert np.array_equal(permuted(size, some[[7, 5]], (1, 2)), numbers[[7, 5]])


@given(st.integers(1, 30), st.lists(st.integers(0, 40), max_size=6))
def test_parts_that_follow_each_other_leave_out_nothing(size, counts):
    bounds = np.cumsum([0, *counts]).tolist()
    parts = [draw_part(size, start, stop, (5,)) for start, stop in itertools.pairwise(bounds)]
    drawn = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
    assert np.array_equal(drawn, draw_part(size, 0, bounds[-1], (5,)))
    for copy in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[copy : copy + size].tolist()) == list(range(size))


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 1000), st.integers(1, 7))
def test_a_pool_is_the_usable_sentences(usable, first, block):
    wanted = np.flatnonzero(usable) + first
    refused = np.flatnonzero(~np.array(usable)) + first
    pool = Pool.without(first, first + len(usable), [refused[i : i + block] for i in range(0, len(refused), block)])
    assert len(pool) == len(wanted)
    assert pool.all().tolist() == wanted.tolist()
    places = np.arange(len(wanted))[::-2]
    assert pool.take(places).tolist() == wanted[places].tolist()
