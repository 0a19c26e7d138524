"""Bytes that one GPU sends in an update, by class of link, and the time they take."""

from __future__ import annotations

from dataclasses import dataclass

from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.hardware import Gpu
from mtmoe.planning.layouts import Group, Layout
from mtmoe.planning.model import SIDES, ModelShape
from mtmoe.planning.parameters import Parameters
from mtmoe.planning.training import TrainingSetup


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that leave one GPU, by class of link."""

    in_node: float
    between_nodes: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.in_node + other.in_node, self.between_nodes + other.between_nodes)

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.in_node * factor, self.between_nodes * factor)


def exchange(rows: float, row_bytes: float, group: Group, top_k: int = 1, bilevel: bool = False) -> Traffic:
    """What one all-to-all sends, with destinations spread evenly over the group.

    Args:
        rows: that a GPU's tokens make, those for its own experts included.
        row_bytes: of one row.
        group: GPUs that exchange.
        top_k: rows that one token makes.
        bilevel: a token crosses to its node once, and fans out to its experts there.
    """
    if not bilevel:
        in_node = (group.in_node - 1) / group.size
        return Traffic(rows * row_bytes * in_node, rows * row_bytes * (group.size - group.in_node) / group.size)
    between = rows / top_k * (group.nodes - 1) / group.nodes
    return Traffic(rows * row_bytes * (group.in_node - 1) / group.in_node, between * row_bytes)


def exchange_seconds(
    traffic: Traffic, group: Group, gpu: Gpu, assumed: Assumptions, bilevel: bool = False
) -> float:
    """Time of one all-to-all: overhead for each peer, then bytes over bandwidth.

    Both classes of links work at once in a flat all-to-all; the two of a bi-level one come one after the other.
    """
    if group.size == 1:
        return 0.0
    in_node, between = _seconds(traffic, gpu, assumed)
    inside = (group.in_node - 1) * assumed.message_in_node
    if bilevel:
        outside = (group.nodes - 1) * assumed.message_between_nodes
        stages = (group.in_node > 1) + (group.nodes > 1)
        return (in_node + between) * assumed.rank_imbalance + inside + outside + stages * assumed.collective_latency
    outside = (group.size - group.in_node) * assumed.message_between_nodes
    return assumed.collective_latency + max(in_node, between) * assumed.rank_imbalance + inside + outside


def exchanges_of(setup: TrainingSetup) -> tuple[int, int]:
    """All-to-alls of a MoE layer in forward passes and in the backward pass; recomputation goes forward twice."""
    return (4 if setup.recompute else 2), 2


def all_to_all_bytes(model: ModelShape, setup: TrainingSetup, layout: Layout) -> Traffic:
    """What one GPU sends in all all-to-alls of an update, in the mean over steps with gating dropout."""
    row_bytes = model.d_model * setup.payload_bytes
    rows = setup.tokens * model.routed_a_token
    once = exchange(rows, row_bytes, layout.expert_group, model.top_k, setup.bilevel)
    layers = sum(model.moe_layers(side) for side in SIDES)
    return once * (layers * sum(exchanges_of(setup)) * setup.accumulate * setup.exchange_share)


def all_reduce(values_bytes: float, group: Group) -> Traffic:
    """What one GPU sends to sum `values_bytes` over a group: within nodes, between them, and back, each as a ring."""
    in_node = 2 * (group.in_node - 1) / group.in_node * values_bytes
    return Traffic(in_node, 2 * (group.nodes - 1) / group.nodes * values_bytes / group.in_node)


def all_reduce_bytes(parameters: Parameters, setup: TrainingSetup, layout: Layout) -> tuple[Traffic, Traffic]:
    """Traffic of gradients: of what is replicated over all GPUs, of experts over those that hold the same ones.

    With ZeRO-1 the updated weights are gathered besides, which is half of an all-reduce.
    """
    dense = all_reduce(parameters.replicated * setup.bytes.gradient, layout.world_group)
    if setup.zero1:
        dense += all_reduce(parameters.replicated * setup.bytes.weight, layout.world_group) * 0.5
    experts = parameters.experts / layout.expert_parallel * setup.bytes.gradient
    return dense, all_reduce(experts, layout.replica_group)


def all_reduce_seconds(traffic: Traffic, gpu: Gpu, assumed: Assumptions) -> float:
    """Time of an all-reduce whose stages come one after the other."""
    if traffic.in_node == traffic.between_nodes == 0:
        return 0.0
    return sum(_seconds(traffic, gpu, assumed)) + assumed.collective_latency


def _seconds(traffic: Traffic, gpu: Gpu, assumed: Assumptions) -> tuple[float, float]:
    share = assumed.network_share
    return (
        traffic.in_node / (gpu.network_in_node * share),
        traffic.between_nodes / (gpu.network_between_nodes * share),
    )
