"""The process groups of a layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed
from torch.distributed import ProcessGroup

from mtmoe.errors import ConfigError
from mtmoe.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups that one rank belongs to."""

    layout: Layout
    """Where this rank stands."""
    world: ProcessGroup
    """All ranks."""
    expert_parallel: ProcessGroup
    """The ranks that share out the experts with this one."""
    data_parallel: ProcessGroup
    """The ranks that hold the same experts."""
    across: ProcessGroup | None = None
    """Those that share out the experts, one on each host, in the place of this one; None: no exchange in two steps."""
    within: ProcessGroup | None = None
    """Those that share out the experts and are on this host; None with `across`."""


def build_groups(layout: Layout, timeout: timedelta | None = None, hierarchical: bool = False) -> Groups:
    """Make the groups of a layout; all ranks have to call this, with the same two sizes.

    Every rank makes every group, in the same order, as torch.distributed demands. That of all ranks is new as well, so
    that nothing here mixes with what the trainer sends over torch's own.

    Args:
        layout: of the calling rank.
        timeout: after which a collective of these groups fails; None takes torch's.
        hierarchical: exchange between hosts first, then inside each; where a group is on one host, nothing changes.

    Raises:
        ConfigError: torch.distributed has not been started, or with another world than the layout's, or its hosts are
            too unlike for `hierarchical`.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        raise ConfigError("expert parallelism needs torch.distributed: start the processes with torchrun or Slurm")
    actual = distributed.get_rank(), distributed.get_world_size()
    if actual != (layout.rank, layout.world_size):
        raise ConfigError(
            f"the layout is for rank {layout.rank} of {layout.world_size}, torch.distributed says {actual[0]} of "
            f"{actual[1]}"
        )
    two_steps = hierarchical and layout.nodes > 1
    return Groups(
        layout,
        _own([range(layout.world_size)], layout.rank, timeout),
        _own(layout.expert_parallel_groups(), layout.rank, timeout),
        _own(layout.data_parallel_groups(), layout.rank, timeout),
        _own(layout.across_groups(), layout.rank, timeout) if two_steps else None,
        _own(layout.within_groups(), layout.rank, timeout) if two_steps else None,
    )


def _own(members: Iterable[Sequence[int]], rank: int, timeout: timedelta | None) -> ProcessGroup:
    own: ProcessGroup | None = None
    for ranks in members:
        group = distributed.new_group(list(ranks), timeout=timeout)
        own = group if rank in ranks else own
    assert own is not None  # each rank is in one of them
    return own
