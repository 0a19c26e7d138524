"""Selections against slow searches: equal numbers a layer, the paper's raised threshold, budgets of both sides."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mtmoe.checkpoint.expert_selection import ExpertSelection, balanced, select_experts

LAYERS = [("encoder", 1), ("encoder", 3), ("decoder", 1), ("decoder", 3)]


@st.composite
def layers_with_scores(draw, equal=False):
    layers = LAYERS[: draw(st.integers(1, 4))]
    size = draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return {layer: rng.random(size if equal else int(rng.integers(2, 10))) for layer in layers}


def least_of(scores, least=1):
    return dict.fromkeys(scores, least)


@given(scores=layers_with_scores(), share=st.floats(0, 1), rule=st.sampled_from(["layer", "threshold"]))
def test_exactly_the_budget_and_the_best_of_each_layer(scores, share, rule):
    total = sum(map(len, scores.values()))
    least = least_of(scores, 2)
    count = max(2 * len(scores), round(share * total))
    selection = select_experts(scores, count, least, rule=rule)
    assert selection.total == count
    for layer, kept in selection.kept.items():
        assert len(kept) >= 2
        assert list(kept) == sorted(set(kept))
        removed = selection.removed(layer)
        assert sorted(kept + removed) == list(range(len(scores[layer])))
        if removed:
            assert scores[layer][list(kept)].min() >= scores[layer][list(removed)].max()
    assert selection.is_all == (count == total)


@given(scores=layers_with_scores(equal=True), data=st.data())
def test_layers_keep_equally_many(scores, data):
    count = data.draw(st.integers(len(scores), sum(map(len, scores.values()))))
    counts = [len(kept) for kept in select_experts(scores, count, least_of(scores)).kept.values()]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)  # what does not divide goes to the first layers


def slow_threshold(scores, threshold, floor):
    """Experts of each layer that a threshold keeps, the paper's rule taken by its words."""
    counts = {}
    for layer, score in scores.items():
        ordered = sorted(score / score.sum(), reverse=True)
        kept, running = floor, 0.0
        for value in ordered[floor:]:
            running += value
            if running > threshold:
                break
            kept += 1
        counts[layer] = kept
    return counts


@given(scores=layers_with_scores(), threshold=st.floats(0, 1.01), floor=st.integers(1, 2))
def test_threshold_keeps_what_the_papers_rule_keeps(scores, threshold, floor):
    expected = slow_threshold(scores, threshold, floor)
    count = sum(expected.values())
    assume(count // len(scores) >= floor)
    selection = select_experts(scores, count, least_of(scores, floor), rule="threshold", minimum=floor)
    assert {layer: len(kept) for layer, kept in selection.kept.items()} == expected


def test_threshold_gives_a_flat_layer_more_than_a_peaked_one():
    scores = {("encoder", 1): np.array([0.97] + [0.01] * 3), ("decoder", 1): np.array([0.25] * 4)}
    selection = select_experts(scores, 5, least_of(scores), rule="threshold", minimum=1)
    assert [len(kept) for kept in selection.kept.values()] == [4, 1]  # sums 0.01, 0.02, 0.03 lie below 0.25
    selection = select_experts(scores, 4, least_of(scores), rule="threshold", minimum=2)
    assert [len(kept) for kept in selection.kept.values()] == [2, 2]


def test_budgets_of_both_sides_as_in_the_paper():
    rng = np.random.default_rng(1)
    layers = [(side, 4 * number + 3) for side in ("encoder", "decoder") for number in range(6)]
    scores = {layer: rng.random(128) for layer in layers}
    sizes, least = dict.fromkeys(layers, 128), least_of(scores, 2)
    budget = balanced(288, sizes, least, (3, 1))
    assert budget == {"encoder": 216, "decoder": 72}
    selection = select_experts(scores, budget, least)
    assert [len(kept) for kept in selection.kept.values()] == [36] * 6 + [12] * 6
    by_threshold = select_experts(scores, budget, least, rule="threshold")
    assert sum(len(by_threshold.kept[layer]) for layer in layers[:6]) == 216
    assert min(map(len, by_threshold.kept.values())) >= 4


@given(scores=layers_with_scores(), data=st.data())
def test_a_balance_keeps_the_total_and_the_limits(scores, data):
    sizes, least = {layer: len(score) for layer, score in scores.items()}, least_of(scores, 2)
    total = data.draw(st.integers(2 * len(scores), sum(sizes.values())))
    budget = balanced(total, sizes, least, data.draw(st.sampled_from([(3, 1), (1, 1), (0, 1), (5, 0)])))
    assert sum(budget.values()) == total
    assert select_experts(scores, budget, least).total == total


@given(scores=layers_with_scores(), rule=st.sampled_from(["layer", "threshold"]), data=st.data())
def test_more_experts_include_fewer(scores, rule, data):
    total = sum(map(len, scores.values()))
    small = data.draw(st.integers(len(scores), total))
    counts = (small, min(total, small + 2))
    one, more = (select_experts(scores, count, least_of(scores), rule=rule, minimum=1) for count in counts)
    for layer in scores:
        assert set(one.kept[layer]) <= set(more.kept[layer])


def test_share_kept():
    selection = ExpertSelection({("encoder", 1): (0, 2)}, {("encoder", 1): 3})
    assert selection.share_kept({("encoder", 1): np.array([0.5, 0.2, 0.3])}) == {("encoder", 1): pytest.approx(0.8)}


def test_errors():
    scores = {("encoder", 1): np.ones(4), ("decoder", 1): np.ones(4)}
    least = least_of(scores, 2)
    with pytest.raises(ValueError, match=r"keep=3 of 8 experts is too few: .* top_k of 2, that is 4 .*50\.0 %"):
        select_experts(scores, 3, least)
    with pytest.raises(ValueError, match="keep=9 experts, but there are only 8"):
        select_experts(scores, 9, least)
    with pytest.raises(ValueError, match="selection='best' is unknown; choose one of: layer, threshold"):
        select_experts(scores, 4, least, rule="best")
    with pytest.raises(ValueError, match="the budget says nothing of the decoder"):
        select_experts(scores, {"encoder": 4}, least)
    with pytest.raises(ValueError, match="keep of the decoder=1 of 4 experts is too few"):
        select_experts(scores, {"encoder": 4, "decoder": 1}, least)
    with pytest.raises(ValueError, match="balance=0:0"):
        balanced(4, dict.fromkeys(scores, 4), least, (0, 0))
