import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.moe import seat

from mtmoe.moe import MoEConfig, RoutingDecision
from mtmoe.moe.capacity import apply_capacity, capacity_of, limit


def config(**options) -> MoEConfig:
    return MoEConfig(**({"d_model": 4, "d_ffn": 4, "num_experts": 4} | options))


@st.composite
def routings(draw, max_tokens=40):
    """expert_index with distinct experts a token and some choices not routed."""
    num_experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, min(3, num_experts)))
    tokens = draw(st.integers(0, max_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    skew = draw(st.sampled_from([0.0, 1.0, 4.0])) * torch.arange(num_experts)
    scores = torch.randn(tokens, num_experts, generator=generator) - skew
    expert_index = scores.topk(top_k, dim=-1).indices
    unrouted = torch.rand(expert_index.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    priority = torch.rand(tokens, generator=generator)
    return expert_index.masked_fill(unrouted, -1), priority, num_experts


def as_lists(expert_index):
    return [[None if number < 0 else number for number in row] for row in expert_index.tolist()]


@settings(max_examples=150)
@given(routing=routings(), capacity=st.integers(1, 12), prioritized=st.booleans())
def test_seats_as_a_walk_through_the_choices(routing, capacity, prioritized):
    expert_index, priority, num_experts = routing
    slot, keep = apply_capacity(expert_index, priority if prioritized else None, capacity)
    order = list(range(len(expert_index)))
    if prioritized:
        order.sort(key=lambda token: -priority[token].item())
    expected = seat(as_lists(expert_index), order, num_experts, capacity)
    assert as_lists(expert_index.masked_fill(~keep, -1)) == expected
    # Within an expert the slots are 0, 1, 2, … in the order of the walk.
    taken = [0] * num_experts
    for choice in range(expert_index.shape[1]):
        for token in order:
            number = expected[token][choice]
            if number is None:
                assert slot[token, choice] == -1
            else:
                assert slot[token, choice] == taken[number]
                taken[number] += 1


@settings(max_examples=60)
@given(routing=routings(), capacity=st.integers(1, 12))
def test_slots_are_gshards_cumulative_sums(routing, capacity):
    expert_index, _, num_experts = routing
    slot, keep = apply_capacity(expert_index, None, capacity)
    before = torch.zeros(num_experts, dtype=torch.int64)
    for choice in range(expert_index.shape[1]):
        mask = torch.stack([expert_index[:, choice] == number for number in range(num_experts)], dim=1).long()
        location = mask.cumsum(dim=0) - 1 + before
        before = before + mask.sum(dim=0)
        routed = expert_index[:, choice] >= 0
        expected = location.gather(1, expert_index[:, choice, None].clamp(min=0))[:, 0].masked_fill(~routed, -1)
        expected = expected.masked_fill(expected >= capacity, -1)
        assert torch.equal(slot[:, choice], expected)
        assert torch.equal(keep[:, choice], expected >= 0)


@settings(max_examples=60)
@given(routing=routings(), capacity=st.integers(1, 12), prioritized=st.booleans())
def test_no_slot_is_used_twice(routing, capacity, prioritized):  # T3
    expert_index, priority, num_experts = routing
    slot, keep = apply_capacity(expert_index, priority if prioritized else None, capacity)
    places = (expert_index * capacity + slot)[keep]
    assert len(places.unique()) == len(places)
    assert (slot[keep] < capacity).all()
    assert (torch.bincount(expert_index[keep], minlength=num_experts) <= capacity).all()


@settings(max_examples=60)
@given(routing=routings(), capacity=st.integers(1, 12))
def test_priority_changes_who_is_dropped_but_not_how_many(routing, capacity):  # T7
    expert_index, priority, num_experts = routing
    _, by_position = apply_capacity(expert_index, None, capacity)
    _, by_priority = apply_capacity(expert_index, priority, capacity)
    for number in range(num_experts):
        assert (by_position & (expert_index == number)).sum() == (by_priority & (expert_index == number)).sum()
        wanted = expert_index[:, 0] == number
        if wanted.any():
            best = priority[wanted].topk(min(capacity, int(wanted.sum()))).values
            kept = priority[wanted & by_priority[:, 0]].sort(descending=True).values
            assert torch.equal(kept, best)


def test_a_late_first_choice_comes_before_an_early_second_choice():  # T8
    expert_index = torch.tensor([[1, 0], [1, 0], [0, 1]])
    _, keep = apply_capacity(expert_index, None, 2)
    assert keep.tolist() == [[True, True], [True, False], [True, False]]


@pytest.mark.parametrize(
    ("options", "tokens", "training", "expected"),
    [
        ({"capacity_factor": 1.0}, 10, True, 6),  # 2 * ceil(10 / 4): rounded up before it is doubled
        ({"capacity_factor": 1.0}, 8, True, 4),
        ({"capacity_factor": 1.0}, 10, False, None),
        ({"capacity_factor": 1.25, "top_k": 1, "normalize_weights": "none"}, 10, True, 3),  # int(1.25 * 3)
        ({"capacity_factor": 1.0, "top_k": 3}, 9, True, 9),
        ({"capacity_factor": 0.7, "top_k": 3}, 40, True, 21),  # 20.999… in floating point
        ({"capacity_factor": 1.0}, 0, True, 1),
        ({"capacity_factor": 0.01}, 10, True, 1),
        ({}, 10, True, None),
        ({}, 10, False, None),
        ({"eval_capacity_factor": 0.5}, 10, False, 3),
        ({"eval_capacity_factor": 0.5}, 10, True, None),
        ({"eval_capacity_token_fraction": 0.25}, 10, False, 3),
        ({"eval_capacity_token_fraction": 0.25, "eval_capacity_factor": 5.0}, 10, False, 3),
        ({"eval_capacity_token_fraction": 1.0}, 10, False, 10),
        ({"eval_capacity_token_fraction": 0.25, "capacity_factor": 1.0}, 10, True, 6),
        ({"eval_capacity_token_fraction": 0.01}, 1, False, 1),
        ({"eval_capacity": 3}, 100, False, 3),
        ({"eval_capacity": 3}, 100, True, None),
        ({"eval_capacity": 3, "eval_capacity_factor": 5.0}, 100, False, 3),
        ({"eval_capacity": 3, "eval_capacity_token_fraction": 0.25}, 100, False, 25),
    ],
)
def test_capacity(options, tokens, training, expected):
    assert capacity_of(config(**options), tokens, training) == expected


def decision_of(expert_index, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(len(expert_index), num_experts, generator=generator).softmax(dim=-1)
    weight = probs.gather(1, expert_index.clamp(min=0)).masked_fill(expert_index < 0, 0)
    return RoutingDecision(expert_index, weight, probs, {})


@settings(max_examples=60)
@given(routing=routings())
def test_a_full_token_fraction_never_drops(routing):  # T4
    expert_index, _, num_experts = routing
    full = config(
        num_experts=num_experts,
        top_k=expert_index.shape[1],
        normalize_weights="none",
        eval_capacity_token_fraction=1.0,
    )
    decision = decision_of(expert_index, num_experts)
    assert torch.equal(limit(decision, full, training=False).expert_index, expert_index)


@settings(max_examples=60)
@given(routing=routings(), factor=st.sampled_from([0.0, 0.5, 1.0]))
def test_weights_sum_to_one_or_nothing_after_dropping(routing, factor):  # T2
    expert_index, _, num_experts = routing
    top_k = expert_index.shape[1]
    if top_k == 1:
        return
    seated = limit(
        decision_of(expert_index, num_experts),
        config(num_experts=num_experts, top_k=top_k, capacity_factor=factor),
        True,
    )
    total = seated.weight.sum(dim=-1)
    expected = (seated.expert_index >= 0).any(dim=-1).float()
    torch.testing.assert_close(total, expected)
    assert (seated.weight[seated.expert_index < 0] == 0).all()


def test_weights_normalised_before_dropping_stay():  # T2
    expert_index = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])
    before = config(normalize_weights="before_drop", capacity_factor=0.5)  # one slot an expert
    share = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1], [0.8, 0.2]])
    decision = dataclasses.replace(decision_of(expert_index, 4), weight=share)
    seated = limit(decision, before, training=True)
    assert seated.weight.tolist() == [pytest.approx(row) for row in ([0.7, 0.3], [0.0, 0.4], [0.0, 0.0], [0.8, 0.0])]
    assert seated.expert_index.tolist() == [[0, 1], [-1, 2], [-1, -1], [3, -1]]
    assert torch.equal(decision.expert_index, expert_index)  # the gate's own decision is left alone
