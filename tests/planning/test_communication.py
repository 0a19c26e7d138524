"""Bytes by class of link against a count over all pairs of GPUs."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import ConfigError
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.communication import (
    Traffic,
    all_reduce,
    all_reduce_bytes,
    all_reduce_seconds,
    all_to_all_bytes,
    exchange,
    exchange_seconds,
)
from mtmoe.planning.hardware import GPUS, Cluster
from mtmoe.planning.layouts import Group, Layout, expert_parallel_sizes, layouts
from mtmoe.planning.model import ModelShape
from mtmoe.planning.parameters import count_parameters
from mtmoe.planning.training import TrainingSetup

MODEL = ModelShape(vocabulary_size=100, d_model=16, num_experts=16)
A100 = GPUS["a100-80"]

nodes_of_gpus = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 8]))


def members(layout, rank):
    """Ranks of the expert-parallel group of a rank, and of those that hold its experts."""
    size = layout.expert_parallel
    own = rank // size * size
    return range(own, own + size), range(rank % size, layout.cluster.gpus, size)


@given(cluster=nodes_of_gpus, data=st.data())
def test_groups_and_flat_exchange_by_counting_pairs(cluster, data):
    nodes, per_node = cluster
    gpus = Cluster(A100, nodes * per_node, per_node)
    layout = Layout(gpus, data.draw(st.sampled_from(expert_parallel_sizes(MODEL, gpus))))
    rows = 96.0
    for rank in range(gpus.gpus):
        group, replicas = members(layout, rank)
        node = rank // per_node
        assert layout.expert_group.size == len(group)
        assert layout.expert_group.in_node == sum(other // per_node == node for other in group)
        assert layout.replica_group.size == len(replicas)
        assert layout.replica_group.in_node == sum(other // per_node == node for other in replicas)
        sent = {True: 0.0, False: 0.0}
        for other in group:
            if other != rank:
                sent[other // per_node == node] += rows / len(group) * 32
        assert exchange(rows, 32, layout.expert_group) == Traffic(
            pytest.approx(sent[True]), pytest.approx(sent[False])
        )


@given(nodes=st.integers(1, 4), per_node=st.sampled_from([1, 2, 4]), top_k=st.integers(1, 3))
def test_bilevel_exchange_by_counting_tokens(nodes, per_node, top_k):
    tokens = nodes * per_node * 6
    sent = {"in": 0.0, "between": 0.0}
    for token in range(tokens):  # each node and each GPU of it alike; the tokens' own GPU is the first of node 0
        node = token % nodes
        sent["between"] += node != 0
        for choice in range(top_k):
            gpu = (token // nodes + choice) % per_node
            sent["in"] += gpu != 0  # the same place in the other node takes what crosses
    found = exchange(tokens * top_k, 1, Group(nodes * per_node, per_node), top_k, bilevel=True)
    assert found.in_node == pytest.approx(sent["in"], abs=top_k * per_node)
    assert found.between_nodes == pytest.approx(sent["between"])


def test_bilevel_is_flat_where_there_is_one_node_and_saves_top_k_between_nodes():
    one, four = Group(8, 8), Group(32, 8)
    assert exchange(100, 4, one, 2, bilevel=True) == exchange(100, 4, one, 2)
    assert exchange(100, 4, four, 2, True).between_nodes == exchange(100, 4, four, 2).between_nodes / 2
    assert exchange(100, 4, four, 1, True).between_nodes == exchange(100, 4, four, 1).between_nodes


def test_an_update_exchanges_four_times_in_each_moe_layer():
    layout = Layout(Cluster(A100, 16, 8), 16)
    setup = TrainingSetup(tokens=1000, length=10, dtype="autocast", accumulate=3)
    found = all_to_all_bytes(MODEL, setup, layout)
    once = 1000 * 2 * 16 * 2  # tokens, top-2, d_model, bf16
    assert found.in_node == pytest.approx(6 * 4 * 3 * once * 7 / 16)
    assert found.between_nodes == pytest.approx(6 * 4 * 3 * once * 8 / 16)
    recomputed = all_to_all_bytes(MODEL, replace(setup, recompute=True), layout)
    assert recomputed.between_nodes == pytest.approx(1.5 * found.between_nodes)
    dropped = all_to_all_bytes(MODEL, replace(setup, gating_dropout=0.3), layout)
    assert dropped.between_nodes == pytest.approx(0.7 * found.between_nodes)
    wide = all_to_all_bytes(MODEL, replace(setup, payload="fp32"), layout)
    assert wide.in_node == 2 * found.in_node
    narrow = all_to_all_bytes(MODEL, replace(setup, dtype="fp32", payload="bf16"), layout)
    assert narrow == found
    masked = all_to_all_bytes(replace(MODEL, eom=0.2), setup, layout)
    assert masked.in_node == pytest.approx(0.8 * found.in_node)
    assert all_to_all_bytes(MODEL, setup, Layout(layout.cluster, 1)) == Traffic(0, 0)


def ring(values, size):
    """Bytes that a member of a ring sends: reduce-scatter, then all-gather, in pieces of 1 / size."""
    return sum(values / size for _ in itertools.chain(range(size - 1), range(size - 1)))


@given(nodes=st.integers(1, 5), per_node=st.sampled_from([1, 2, 4, 8]))
def test_all_reduce_is_a_ring_in_each_node_and_one_between(nodes, per_node):
    found = all_reduce(1000, Group(nodes * per_node, per_node))
    assert found.in_node == pytest.approx(ring(1000, per_node))
    assert found.between_nodes == pytest.approx(ring(1000 / per_node, nodes))


def test_gradients_of_experts_are_averaged_over_their_replicas_only():
    parameters = count_parameters(MODEL)
    setup = TrainingSetup(tokens=100, length=10, dtype="fp32")
    dense, experts = all_reduce_bytes(parameters, setup, Layout(Cluster(A100, 16, 8), 16))
    assert experts == Traffic(0, 0)
    assert dense.in_node == pytest.approx(ring(4 * parameters.replicated, 8))
    _, experts = all_reduce_bytes(parameters, setup, Layout(Cluster(A100, 16, 8), 8))
    assert experts == Traffic(0, pytest.approx(ring(4 * parameters.experts / 8, 2)))
    gathered, _ = all_reduce_bytes(parameters, replace(setup, zero1=True), Layout(Cluster(A100, 16, 8), 16))
    assert gathered.in_node == pytest.approx(1.5 * dense.in_node)


def test_time_grows_with_peers_bytes_and_imbalance():
    assumed = Assumptions()
    group, traffic = Group(32, 8), Traffic(1e9, 1e9)
    seconds = exchange_seconds(traffic, group, A100, assumed)
    between = 1e9 / (25e9 * assumed.network_share)
    latency = assumed.collective_latency + 7 * assumed.message_in_node + 24 * assumed.message_between_nodes
    assert seconds == pytest.approx(between + latency)
    fullest = exchange_seconds(traffic, group, A100, replace(assumed, rank_imbalance=2.0))
    assert fullest == pytest.approx(2 * between + latency)
    assert exchange_seconds(traffic, Group(1, 1), A100, assumed) == 0
    assert all_reduce_seconds(Traffic(0, 0), A100, assumed) == 0
    assert all_reduce_seconds(Traffic(1e9, 0), A100, assumed) == pytest.approx(
        1e9 / (300e9 * assumed.network_share) + assumed.collective_latency
    )
    few = exchange_seconds(Traffic(0, 0), Group(256, 8), A100, assumed, bilevel=True)
    assert few < exchange_seconds(Traffic(0, 0), Group(256, 8), A100, assumed) / 5


def test_layouts_divide_gpus_experts_and_nodes():
    assert expert_parallel_sizes(MODEL, Cluster(A100, 32, 8)) == [1, 2, 4, 8, 16]
    assert expert_parallel_sizes(replace(MODEL, num_experts=12), Cluster(A100, 24, 8)) == [1, 2, 4]
    assert expert_parallel_sizes(MODEL, Cluster(A100, 4, 8)) == [1, 2, 4]
    assert expert_parallel_sizes(replace(MODEL, num_experts=6), Cluster(A100, 12, 6)) == [1, 2, 3, 6]
    dense = replace(MODEL, encoder_moe_freq=0, decoder_moe_freq=0)
    assert expert_parallel_sizes(dense, Cluster(A100, 32, 8)) == [1]
    with pytest.raises(ConfigError, match=r"size 3 must divide 32 GPUs and 16 experts.*: 1, 2, 4, 8, 16$"):
        layouts(MODEL, Cluster(A100, 32, 8), 3)


@pytest.mark.parametrize(("gpus", "per_node", "text"), [
    (12, 8, "12 GPUs do not fill nodes of 8"), (0, 8, "gpus=0 must be at least 1"),
    (8, 0, "gpus-per-node=0 must be at least 1"),
])  # fmt: skip
def test_clusters_that_cannot_be(gpus, per_node, text):
    with pytest.raises(ConfigError, match=text):
        Cluster(A100, gpus, per_node)
