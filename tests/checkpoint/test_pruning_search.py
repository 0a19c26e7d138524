"""The search for the fewest experts against trying all numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.checkpoint.expert_selection import select_experts
from mtmoe.checkpoint.pruning_search import bytes_removed, most_within, smallest_that_holds


@given(low=st.integers(0, 50), span=st.integers(0, 200), data=st.data())
def test_search_finds_what_trying_all_finds(low, span, data):
    high = low + span
    first = data.draw(st.integers(low, high))  # the fewest that are enough
    asked = []

    def holds(count):
        asked.append(count)
        return count >= first

    assert smallest_that_holds(low, high, holds) == first
    assert len(asked) == len(set(asked)) <= max(1, span).bit_length()
    assert high not in asked


@given(answers=st.lists(st.booleans(), min_size=1, max_size=40))
def test_without_order_the_found_number_still_holds_and_the_one_below_does_not(answers):
    answers[-1] = True
    found = smallest_that_holds(0, len(answers) - 1, answers.__getitem__)
    assert answers[found]
    assert found == 0 or not answers[found - 1]


@given(size=st.integers(0, 400), rule=st.sampled_from(["layer", "threshold"]))
def test_the_most_that_fit(size, rule):
    rng = np.random.default_rng(1)
    scores = {("encoder", 1): rng.random(6), ("decoder", 1): rng.random(4)}
    of_expert, full = {("encoder", 1): 30, ("decoder", 1): 11}, 300
    least = dict.fromkeys(scores, 1)

    def choose(count):
        return select_experts(scores, count, least, rule=rule)

    sizes = {count: full - bytes_removed(choose(count), of_expert) for count in range(2, 11)}
    fitting = [count for count, taken in sizes.items() if taken <= size]
    if fitting:
        assert most_within(size, full, of_expert, 2, 10, choose) == max(fitting)
    else:
        with pytest.raises(ValueError, match=rf"max_size={size} bytes is too small: .* still takes {sizes[2]}"):
            most_within(size, full, of_expert, 2, 10, choose)
