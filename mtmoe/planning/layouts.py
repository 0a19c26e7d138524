"""Ways to lay experts over GPUs: how many GPUs share one set of them, and which links that uses."""

from __future__ import annotations

from dataclasses import dataclass

from mtmoe.errors import ConfigError
from mtmoe.planning.hardware import Cluster
from mtmoe.planning.model import SIDES, ModelShape


@dataclass(frozen=True, slots=True)
class Group:
    """How the GPUs of one process group lie on nodes."""

    size: int
    """GPUs."""
    in_node: int
    """Of these on the node of a member, the member included."""

    @property
    def nodes(self) -> int:
        """Nodes that the group reaches."""
        return self.size // self.in_node


@dataclass(frozen=True, slots=True)
class Layout:
    """`expert_parallel` GPUs with consecutive numbers hold one set of all experts; the rest is on every GPU."""

    cluster: Cluster
    expert_parallel: int

    @property
    def replicas(self) -> int:
        """Sets of all experts."""
        return self.cluster.gpus // self.expert_parallel

    @property
    def expert_group(self) -> Group:
        """GPUs that exchange tokens."""
        return Group(self.expert_parallel, min(self.expert_parallel, self.cluster.node_size))

    @property
    def replica_group(self) -> Group:
        """GPUs that hold the same experts, and average their gradients."""
        inside = max(1, self.cluster.node_size // self.expert_parallel)
        return Group(self.replicas, min(self.replicas, inside))

    @property
    def world_group(self) -> Group:
        """All GPUs."""
        return Group(self.cluster.gpus, self.cluster.node_size)


def expert_parallel_sizes(model: ModelShape, cluster: Cluster) -> list[int]:
    """Sizes that divide the GPUs and the experts, and fill nodes evenly; a dense model has one, 1."""
    if not any(model.moe_layers(side) for side in SIDES):
        return [1]
    return [
        size
        for size in range(1, cluster.gpus + 1)
        if cluster.gpus % size == 0
        and model.num_experts % size == 0
        and (size % cluster.node_size == 0 or cluster.node_size % size == 0)
    ]


def layouts(model: ModelShape, cluster: Cluster, expert_parallel: int | None = None) -> list[Layout]:
    """All layouts, or the one of a given size.

    Raises:
        ConfigError: the size does not fit; the text lists those that do.
    """
    sizes = expert_parallel_sizes(model, cluster)
    if expert_parallel is not None:
        if expert_parallel not in sizes:
            allowed = ", ".join(map(str, sizes))
            raise ConfigError(
                f"expert-parallel size {expert_parallel} must divide {cluster.gpus} GPUs and {model.num_experts} "
                f"experts, and divide or be a multiple of the {cluster.node_size} GPUs of a node: {allowed}"
            )
        sizes = [expert_parallel]
    return [Layout(cluster, size) for size in sizes]
