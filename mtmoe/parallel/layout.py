"""Which rank holds which experts, and which ranks hold the same: two numbers and a rank tell everything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mtmoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """World = data-parallel x expert-parallel, as one rank sees it.

    Expert-parallel groups are consecutive ranks, which torchrun and Slurm put on one host as far as they fit: there the
    exchange of tokens is cheap. The ranks with the same place in their groups hold the same experts. For 2 x 2::

        rank                    0  1  2  3
        expert-parallel group   0  0  1  1
        place, so experts       0  1  0  1
    """

    world_size: int
    """Processes of the run."""
    expert_parallel_size: int
    """Processes that share out one set of experts; 1 gives each rank all of them."""
    rank: int
    """This process, from 0."""
    hosts: tuple[int, ...] | None = None
    """Number of the host of each rank, to tell traffic inside a host from the rest; None: all are on one."""

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigError(f"world_size={self.world_size} must be at least 1")
        if not 1 <= self.expert_parallel_size <= self.world_size or self.world_size % self.expert_parallel_size:
            allowed = [str(size) for size in range(1, self.world_size + 1) if self.world_size % size == 0]
            raise ConfigError(
                f"expert_parallel_size={self.expert_parallel_size} must divide the {self.world_size} processes of the "
                f"run; choose one of: {', '.join(allowed)}, or start another number of processes"
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank={self.rank} must be from 0 to world_size - 1 = {self.world_size - 1}")
        if self.hosts is not None and len(self.hosts) != self.world_size:
            raise ConfigError(f"hosts names {len(self.hosts)} ranks; there are {self.world_size}")

    @property
    def data_parallel_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.expert_parallel_size

    @property
    def expert_parallel_rank(self) -> int:
        """Place in the expert-parallel group, which tells the experts."""
        return self.rank % self.expert_parallel_size

    @property
    def expert_parallel_ranks(self) -> range:
        """Ranks that share out the experts with this one, itself included."""
        first = self.rank - self.expert_parallel_rank
        return range(first, first + self.expert_parallel_size)

    @property
    def data_parallel_ranks(self) -> range:
        """Ranks that hold the same experts as this one, itself included."""
        return range(self.expert_parallel_rank, self.world_size, self.expert_parallel_size)

    def expert_parallel_groups(self) -> list[range]:
        """All groups of ranks that share out the experts."""
        return [range(i, i + self.expert_parallel_size) for i in range(0, self.world_size, self.expert_parallel_size)]

    def data_parallel_groups(self) -> list[range]:
        """All groups of ranks that hold the same experts."""
        return [range(i, self.world_size, self.expert_parallel_size) for i in range(self.expert_parallel_size)]

    @property
    def nodes(self) -> int:
        """Hosts that each expert-parallel group is spread over, for an exchange in two steps.

        Raises:
            ConfigError: a group's ranks on one host do not follow each other, or hosts have unequally many of them.
        """
        if self.hosts is None:
            return 1
        size, counts = self.expert_parallel_size, set()
        for group in self.expert_parallel_groups():
            hosts = [self.hosts[rank] for rank in group]
            nodes = len(set(hosts))
            expected = [host for host in dict.fromkeys(hosts) for _ in range(size // nodes)]
            counts.add(nodes if hosts == expected else 0)
        if len(counts) > 1 or 0 in counts:
            raise ConfigError(
                f"an exchange in two steps needs hosts with equally many consecutive ranks of each group of "
                f"{size}, but the hosts of the ranks are {', '.join(map(str, self.hosts))}; start equally many "
                "processes on each host, or exchange in one step"
            )
        return counts.pop()

    def across_groups(self) -> list[range]:
        """All groups of ranks with the same place on the hosts of an expert-parallel group."""
        size = self.expert_parallel_size
        places = size // self.nodes
        return [
            range(first + place, first + size, places)
            for first in range(0, self.world_size, size)
            for place in range(places)
        ]

    def within_groups(self) -> list[range]:
        """All groups of ranks of one expert-parallel group on one host."""
        places = self.expert_parallel_size // self.nodes
        return [range(first, first + places) for first in range(0, self.world_size, places)]

    def local_experts(self, num_experts: int) -> range:
        """Numbers of the experts that this rank holds: consecutive ones, equally many on each rank of a group.

        Raises:
            ConfigError: `num_experts` is not divisible by the expert-parallel size.
        """
        if num_experts % self.expert_parallel_size:
            raise ConfigError(
                f"num_experts={num_experts} must be a multiple of expert_parallel_size={self.expert_parallel_size}, so "
                "that each process holds equally many; change one of the two"
            )
        local = num_experts // self.expert_parallel_size
        return range(self.expert_parallel_rank * local, (self.expert_parallel_rank + 1) * local)

    def on_own_host(self, ranks: Iterable[int]) -> tuple[bool, ...]:
        """Of each of some ranks, whether it is on the host of this one."""
        hosts = self.hosts
        return tuple(hosts is None or hosts[member] == hosts[self.rank] for member in ranks)
