import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import DataError
from mtmoe.evaluation.significance import holm, mean_interval, paired_test, stars, wilcoxon

WORDS = ["the", "file", "could", "not", "be", "saved", "because", "disk", "is", "full", "please", "try", "again"]


def sentences(count=60):
    chance = random.Random(1)
    return [" ".join(chance.choices(WORDS, k=8)) for _ in range(count)]


def spoil(lines, share, seed):
    """Replace words by noise, each with probability `share`."""
    chance = random.Random(seed)
    return [" ".join("zzz" if chance.random() < share else word for word in line.split()) for line in lines]


@pytest.mark.parametrize("method", ["bootstrap", "randomisation"])
@pytest.mark.parametrize("metric", ["chrf++", "bleu"])
def test_a_real_difference_is_found_and_chance_is_not(method, metric):
    references = sentences()
    worse, better = spoil(references, 0.4, 1), spoil(references, 0.15, 2)
    real = paired_test(worse, better, references, "en", metric=metric, method=method, samples=500)
    assert real.difference > 5
    assert real.p_value < 0.01
    null = paired_test(
        spoil(references, 0.3, 3),
        spoil(references, 0.3, 4),
        references,
        "en",
        metric=metric,
        method=method,
        samples=500,
    )
    assert null.p_value > 0.05


def test_equal_systems_do_not_differ():
    references = sentences(10)
    outputs = spoil(references, 0.3, 1)
    assert paired_test(outputs, list(outputs), references, "en").p_value == 1.0
    spaced = [line.replace(" ", "  ") for line in outputs]  # other text, but chrF++ sees none of it
    assert paired_test(outputs, spaced, references, "en", samples=100).p_value == 1.0


def test_same_seed_same_p():
    references = sentences(20)
    systems = spoil(references, 0.3, 1), spoil(references, 0.25, 2)
    first, second = (paired_test(*systems, references, "en", samples=200, seed=7) for _ in range(2))
    assert first == second


def test_bad_arguments():
    with pytest.raises(ValueError, match="method='t-test' is unknown; choose one of: bootstrap, randomisation"):
        paired_test(["a"], ["b"], ["c"], "en", method="t-test")
    with pytest.raises(ValueError, match="seed=0 must be at least 1"):
        paired_test(["a"], ["b"], ["c"], "en", seed=0)
    with pytest.raises(DataError, match="outputs of 1 and 2 segments and 1 references"):
        paired_test(["a"], ["b", "c"], ["c"], "en")


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_keeps_order_and_never_lowers(p_values):
    corrected = holm(p_values)
    assert list(corrected) == list(p_values)
    assert all(p_values[key] <= value <= 1 for key, value in corrected.items())
    by_given = sorted(p_values, key=lambda key: p_values[key])
    assert [corrected[key] for key in by_given] == sorted(corrected.values())


def test_stars():
    assert [stars(p) for p in (0.0009, 0.001, 0.01, 0.05)] == ["***", "**", "*", ""]


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=10))
def test_wilcoxon_is_the_share_of_signs_that_are_as_extreme(differences):
    """Against all 2^n choices of signs, counted one by one, ties included."""
    values = [value for value in differences if value]
    size = sorted(map(abs, values))
    ranks = [size.index(abs(value)) + (size.count(abs(value)) + 1) / 2 for value in values]
    observed = min(
        sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0),
        sum(rank for rank, value in zip(ranks, values, strict=True) if value < 0),
    )
    sums = [sum(rank for bit, rank in enumerate(ranks) if choice >> bit & 1) for choice in range(2 ** len(ranks))]
    expected = min(1.0, 2 * sum(one <= observed for one in sums) / len(sums)) if values else 1.0
    assert wilcoxon(differences) == pytest.approx(expected)


def test_wilcoxon_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    differences = [0.3, 1.2, -0.4, 2.2, 0.9, 1.7, -0.1, 0.8, 1.1, 0.6]
    assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_interval_of_the_mean():
    low, high = mean_interval([1.0, 2.0, 3.0, 2.0])
    assert 1.0 <= low < 2.0 < high <= 3.0
    assert mean_interval([1.5]) == (1.5, 1.5)
    with pytest.raises(ValueError, match="at least one difference"):
        mean_interval([])
