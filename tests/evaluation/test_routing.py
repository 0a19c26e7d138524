"""Figures on routing against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mtmoe.evaluation.routing import (
    between_languages,
    cosine_similarity,
    expert_overlap,
    language_routing,
    own_experts,
    routing_entropy,
    similarity_order,
)
from mtmoe.routing_table import LayerRouting, RoutingTable


@st.composite
def shares(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    counts = draw(arrays(np.int64, shape, elements=st.integers(0, 9)))
    counts[counts.sum(axis=1) == 0, 0] = 1
    return counts / counts.sum(axis=1, keepdims=True)


def slow_own(row, covered=0.8):
    taken, own = 0.0, set()
    for expert in sorted(range(len(row)), key=lambda expert: -row[expert]):
        if taken >= covered - 1e-12:
            break
        own.add(expert)
        taken += row[expert]
    return own


@given(top1=shares())
def test_figures_equal_their_definitions(top1):
    own, overlap, similarity = own_experts(top1), expert_overlap(top1), cosine_similarity(top1)
    for i, row in enumerate(top1):
        assert set(np.flatnonzero(own[i])) == slow_own(row)
        assert row[own[i]].sum() >= 0.8 - 1e-9
        entropy = -sum(share * math.log2(share) for share in row if share > 0)
        assert math.isclose(routing_entropy(top1)[i], entropy, abs_tol=1e-9)
        for j, other in enumerate(top1):
            a, b = slow_own(row), slow_own(other)
            assert math.isclose(overlap[i, j], len(a & b) / len(a | b))
            cosine = row @ other / math.sqrt((row @ row) * (other @ other))
            assert math.isclose(similarity[i, j], cosine, abs_tol=1e-9)


@given(top1=shares(), seed=st.integers(0, 99))
def test_renumbering_experts_changes_no_similarity(top1, seed):
    renumbered = top1[:, np.random.default_rng(seed).permutation(top1.shape[1])]
    np.testing.assert_allclose(cosine_similarity(renumbered), cosine_similarity(top1), atol=1e-12)
    np.testing.assert_allclose(routing_entropy(renumbered), routing_entropy(top1), atol=1e-12)


def test_between_languages_leaves_the_diagonal_out():
    assert between_languages(np.array([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]])) == pytest.approx(0.4)
    assert math.isnan(between_languages(np.eye(1)))


def test_similar_languages_stand_side_by_side():
    similarity = np.eye(4)
    for a, b in ((0, 2), (1, 3)):
        similarity[a, b] = similarity[b, a] = 0.9
    similarity[0, 1] = similarity[1, 0] = 0.2
    order = list(similarity_order(similarity))
    assert abs(order.index(0) - order.index(2)) == 1
    assert abs(order.index(1) - order.index(3)) == 1


def test_encoders_go_by_source_and_decoders_by_target():
    def layer(side, first, gates):
        first = np.array(first)
        zeros = np.zeros(first.shape)
        return LayerRouting(side, 1, first.sum(axis=1), first, first * 0, zeros, zeros, zeros, gates)

    first = [[4, 0], [0, 8], [2, 2], [0, 0]]
    gates = np.array([1.0, 2.0, 4.0, 0.0])
    table = RoutingTable(
        ("de-en", "en-de", "mk-en", "en-mk"),
        (1, 1, 1, 0),
        (layer("encoder", first, gates), layer("decoder", first, None)),
    )
    encoder, decoder = language_routing(table)
    assert encoder.languages == ("de", "en", "mk")
    assert decoder.languages == ("de", "en")  # nothing was read in en-mk
    np.testing.assert_allclose(encoder.top1, [[1, 0], [0, 1], [0.5, 0.5]])
    np.testing.assert_allclose(decoder.top1, [[0, 1], [0.75, 0.25]])
    np.testing.assert_allclose(encoder.shared, [0.75, 0.75, 0.0])
    assert decoder.shared is None
