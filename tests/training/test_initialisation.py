"""Initial weights of attention: where heads look, and what they pass on."""

from __future__ import annotations

import math

import pytest
import torch
from fairseq.modules import SinusoidalPositionalEmbedding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mtmoe.training.initialisation import copying_projections, position_columns, positional_projections


def scores_of(query: torch.Tensor, key: torch.Tensor, x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(heads, length, length) scores of (length, d_model) vectors, as attention computes them."""
    q, k = ((x @ weight.T).view(len(x), num_heads, -1).transpose(0, 1) for weight in (query, key))
    return q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    width=st.sampled_from([16, 32, 64]),
    offsets=st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=1, max_size=8),
    length=st.integers(1, 30),
)
def test_each_head_looks_at_its_offset(heads, width, offsets, length):
    d_model = max(heads * width, 64)
    heads = d_model // width
    positions = SinusoidalPositionalEmbedding.get_embedding(length + 2, d_model, 1)[2:]
    scores = scores_of(*positional_projections(d_model, heads, offsets, gain=2.0), positions, heads)
    for head in range(heads):
        offset = offsets[head % len(offsets)]
        if offset is None:
            assert not scores[head].any()
            continue
        wanted = torch.arange(length) + offset
        inside = (wanted >= 0) & (wanted < length)
        assert_close(scores[head].argmax(dim=1)[inside], wanted[inside])
        # the product of a position with itself: a pair of sine and cosine counts 1
        best = torch.full((int(inside.sum()),), 2.0**2 * (width // 2) / math.sqrt(width))
        assert_close(scores[head, torch.arange(length)[inside], wanted[inside]], best, atol=1e-3, rtol=1e-4)


def test_only_the_columns_of_positions_are_read():
    query, key = positional_projections(64, 4, [1, 0], gain=1.5)
    columns = torch.cat(position_columns(64, 4))
    others = torch.ones(64, dtype=torch.bool)
    others[columns] = False
    assert len(columns) == 16
    assert query[:, columns].any() and key[:, columns].any()
    assert not query[:, others].any() and not key[:, others].any()


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_what_is_looked_at_is_passed_on(gain):
    value, output = copying_projections(32, gain)
    assert_close(output @ value, gain * torch.eye(32), atol=1e-5, rtol=0.0)
    assert (value.abs() > 0.01).float().mean() > 0.5  # mixed over heads, not a slice of the token each


def test_impossible_shapes_are_explained():
    with pytest.raises(ValueError, match="d_model=30 must be 2 heads of an even width, got 15"):
        positional_projections(30, 2, [1], 1.0)
    with pytest.raises(ValueError, match="offsets must name at least one position"):
        positional_projections(32, 2, [], 1.0)
