from collections import Counter

from mtmoe.evaluation.samples import choose_samples
from mtmoe.evaluation.test_sets import TestSet


def choose(directions, segments, count):
    test_sets = [
        TestSet(f"en-{number}", [f"s{i}" for i in range(segments)], [f"r{i}" for i in range(segments)])
        for number in range(directions)
    ]
    outputs = {one.direction: [f"o{i}" for i in range(segments)] for one in test_sets}
    return choose_samples(test_sets, outputs, count)


def test_spread_over_directions():
    assert Counter(one.direction for one in choose(10, 100, 12)).total() == 12
    assert set(Counter(one.direction for one in choose(10, 100, 12)).values()) == {1, 2}
    assert set(Counter(one.direction for one in choose(6, 100, 12)).values()) == {2}
    few = [int(one.direction[3:]) for one in choose(79, 100, 12)]
    assert len(set(few)) == 12
    assert max(few) - min(few) > 60


def test_spread_over_the_set_and_aligned():
    chosen = choose(1, 100, 4)
    assert [one.source for one in chosen] == ["s12", "s37", "s62", "s87"]
    assert all(one.source[1:] == one.reference[1:] == one.output[1:] for one in chosen)


def test_same_for_every_model_and_bounded():
    assert choose(3, 7, 12) == choose(3, 7, 12)
    assert len(choose(2, 3, 12)) == 6
    assert choose(2, 3, 0) == []
    assert choose_samples([], {}, 12) == []


def test_both_directions_of_a_pair_show_different_segments():
    chosen = choose(10, 300, 10)
    assert len({one.source for one in chosen}) == 10
