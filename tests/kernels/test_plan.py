import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtmoe.kernels import plan_dispatch
from mtmoe.kernels.plan import plan_on_device


@st.composite
def routings(draw):
    num_experts = draw(st.integers(1, 7))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=2, max_size=2)
    rows = draw(st.lists(row, max_size=20))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2), num_experts


@settings(max_examples=100)
@given(routing=routings())
def test_rows_are_the_routed_choices_by_expert_then_by_position(routing):
    expert_index, num_experts = routing
    plan = plan_dispatch(expert_index, num_experts)
    flat = expert_index.flatten().tolist()
    expected = sorted((expert, place) for place, expert in enumerate(flat) if expert >= 0)
    assert plan.assignment.tolist() == [place for _, place in expected]
    assert plan.token.tolist() == [place // 2 for _, place in expected]
    assert plan.tokens_per_expert.tolist() == [flat.count(expert) for expert in range(num_experts)]
    assert plan.complete == (-1 not in flat)
    assert (plan.tokens, plan.top_k, plan.routed, plan.num_experts) == (
        len(expert_index),
        2,
        len(expected),
        num_experts,
    )


@settings(max_examples=100)
@given(routing=routings())
def test_slot_is_the_inverse_of_assignment(routing):
    plan = plan_dispatch(*routing)
    for place, slot in enumerate(plan.slot.flatten().tolist()):
        assert (slot == -1) == (routing[0].flatten()[place] == -1)
        assert slot == -1 or plan.assignment[slot] == place


@settings(max_examples=100)
@given(routing=routings())
def test_segments_are_the_experts_with_rows(routing):
    expert_index, num_experts = routing
    plan = plan_dispatch(expert_index, num_experts)
    row_experts = expert_index.flatten()[plan.assignment].tolist()
    covered = [-1] * plan.routed
    for expert, start, end in plan.segments:
        assert start < end
        covered[start:end] = [expert] * (end - start)
    assert covered == row_experts
    assert [expert for expert, _, _ in plan.segments] == sorted(set(row_experts))


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="expert_index holds 4, but there are only 4 experts"):
        plan_dispatch(torch.tensor([[0, 4]]), 4)


@settings(max_examples=100)
@given(routing=routings())
def test_plan_of_a_device_has_the_unrouted_choices_behind_the_others(routing):
    trimmed, plan = plan_dispatch(*routing), plan_on_device(*routing)
    assert plan.assignment[: trimmed.routed].tolist() == trimmed.assignment.tolist()
    assert sorted(plan.assignment.tolist()) == list(range(routing[0].numel()))
    assert plan.token.tolist() == (plan.assignment // 2).tolist()
    for name in ("slot", "offsets", "tokens_per_expert"):
        assert torch.equal(getattr(plan, name), getattr(trimmed, name)), name
        assert getattr(plan, name).dtype == torch.int64
    assert (plan.segments, plan.complete) == (trimmed.segments, trimmed.complete)


def test_a_device_does_not_route_to_an_expert_that_does_not_exist():
    plan = plan_on_device(torch.tensor([[0, 9], [1, -1]]), 2)
    assert plan.slot.tolist() == [[0, -1], [1, -1]]
    assert plan.offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_experts", [2**15 - 1, 2**15, 40_000])
def test_many_experts(num_experts):
    plan = plan_dispatch(torch.tensor([[num_experts - 1, 0], [-1, num_experts - 2]]), num_experts)
    assert plan.assignment.tolist() == [1, 3, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_a_gpu():
    expert_index = torch.randint(-1, 8, (64, 2), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan_dispatch(expert_index, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
