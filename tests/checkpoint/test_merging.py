"""Alignment against all permutations and scipy, and averages against a plain loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.models import toy_model

from mtmoe.checkpoint.expert_selection import ExpertSelection
from mtmoe.checkpoint.merging import aligned, average, match_units, merge_experts, nearest_kept
from mtmoe.checkpoint.pruning import EXPERTS, drop_experts, experts_of
from mtmoe.moe import MoEConfig


def random_expert(seed, d_model=5, d_ffn=6):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((d_ffn, d_model), (d_ffn,), (d_model, d_ffn), (d_model,))
    return {name: torch.randn(shape, generator=generator) for name, shape in zip(EXPERTS, shapes, strict=True)}


def output(expert, x):
    w_in, b_in, w_out, b_out = (expert[name] for name in EXPERTS)
    return torch.relu(x @ w_in.T + b_in) @ w_out.T + b_out


def similarity(anchor, other):
    """Scalar product of all weights of two units, unit by unit."""
    w_in, b_in, w_out, _ = EXPERTS
    size = len(anchor[b_in])
    return torch.tensor(
        [
            [
                float(anchor[w_in][i] @ other[w_in][j] + anchor[b_in][i] * other[b_in][j]
                      + anchor[w_out][:, i] @ other[w_out][:, j])
                for j in range(size)
            ]
            for i in range(size)
        ]
    )  # fmt: skip


def slow_greedy(values):
    """The best pair first."""
    partner, rows, columns = {}, set(range(len(values))), set(range(len(values)))
    while rows:
        row, column = max(itertools.product(rows, columns), key=lambda pair: float(values[pair]))
        partner[row] = column
        rows.remove(row)
        columns.remove(column)
    return [partner[row] for row in range(len(values))]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), d_ffn=st.integers(1, 9))
def test_matching_is_greedy(seed, d_ffn):
    anchor, other = random_expert(seed, d_ffn=d_ffn), random_expert(seed + 1, d_ffn=d_ffn)
    assert match_units(anchor, other).tolist() == slow_greedy(similarity(anchor, other))


def test_ties_do_not_stop_the_matching():
    same = {name: torch.ones_like(tensor) for name, tensor in random_expert(1).items()}
    assert sorted(match_units(same, same).tolist()) == list(range(6))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), noise=st.sampled_from([0.0, 0.05]))
def test_a_permuted_copy_is_found_as_scipy_finds_it(seed, noise):
    optimal = pytest.importorskip("scipy.optimize").linear_sum_assignment
    anchor = random_expert(seed, d_model=16, d_ffn=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    other = aligned(anchor, order)
    other = {name: tensor + noise * random_expert(seed + 1, 16, 12)[name] for name, tensor in other.items()}
    unit = match_units(anchor, other)
    assert torch.equal(order[unit], torch.arange(12))
    assert unit.tolist() == optimal(similarity(anchor, other).numpy(), maximize=True)[1].tolist()


@given(seed=st.integers(0, 99))
def test_alignment_changes_nothing_that_an_expert_computes(seed):
    expert = random_expert(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(output(aligned(expert, order), x), output(expert, x))


def test_the_average_of_permuted_copies_is_the_expert():
    experts = [random_expert(1), random_expert(2)]
    experts += [aligned(experts[0], torch.tensor([3, 1, 2, 0, 5, 4]))]
    weights = {name: torch.stack([expert[name] for expert in experts]) for name in EXPERTS}
    merged = average(weights, [0, 2], [0.3, 0.1])
    for name in EXPERTS:
        torch.testing.assert_close(merged[name], experts[0][name])
    assert torch.equal(average(weights, [0, 1], [0.4, 0.0])[EXPERTS[0]], experts[0][EXPERTS[0]])
    assert torch.equal(average(weights, [0, 1], [0.0, 0.0])[EXPERTS[0]], experts[0][EXPERTS[0]])
    halves = average(weights, [0, 1], [0.1, 0.1])
    other = aligned(experts[1], match_units(experts[0], experts[1]))
    for name in EXPERTS:
        torch.testing.assert_close(halves[name], (experts[0][name] + other[name]) / 2)


def test_experts_go_where_their_tokens_will():
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 5.0], [3.0, 0.2]])
    assert nearest_kept(gate, (0, 1), (2, 3)) == [1, 0]
    assert nearest_kept(gate, (0, 1, 2, 3), ()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_has_the_shape_of_the_dropped_one(vocabulary, dtype):
    moe = MoEConfig(d_model=16, d_ffn=8, num_experts=5, top_k=2)
    stored = toy_model(vocabulary, encoder_moe=moe, encoder_moe_freq=1)
    stored.tensors.update({name: tensor.to(dtype) for name, tensor in stored.tensors.items()})
    selection = ExpertSelection({("encoder", 0): (0, 2, 3), ("encoder", 1): (0, 1, 2, 3, 4)}, experts_of(stored.config))
    usage = {layer: torch.linspace(0.1, 0.5, 5).numpy() for layer in experts_of(stored.config)}
    merged, dropped = merge_experts(stored, selection, usage), drop_experts(stored, selection)
    assert merged.config == dropped.config
    different = []
    for name, tensor in dropped.tensors.items():
        assert merged.tensors[name].shape == tensor.shape
        assert merged.tensors[name].dtype == dtype
        if not torch.equal(merged.tensors[name], tensor):
            different.append(name)
    assert sorted(different) == sorted(f"encoder.layers.0.moe.{name}" for name in EXPERTS)
