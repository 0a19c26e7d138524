"""What a MoE layer is given to work with others: who holds which experts, how to reach them, sums over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from mtmoe.parallel.exchange import AllToAll, Traffic, sum_over
from mtmoe.parallel.groups import Groups
from mtmoe.parallel.layout import Layout


class ExpertParallel:
    """The experts of a model, shared out over the ranks of each expert-parallel group.

    One object serves all layers of a model. All ranks have to run their layers equally often and in the same order; a
    rank whose batch has no tokens runs them too.

    Args:
        groups: of `build_groups`.
        payload: type that rows and their gradients travel in if it is narrower than theirs; see `AllToAll`. None: that
            of the computation.
        overlap: compute what does not wait for rows, CMR's shared network, while they travel. The numbers stay the
            same.
    """

    def __init__(self, groups: Groups, payload: torch.dtype | None = None, overlap: bool = False) -> None:
        self.groups, self.overlap = groups, overlap
        self.traffic = Traffic()
        """What the exchange of rows has sent, for all layers."""

        def link(group: ProcessGroup) -> AllToAll:
            ranks = distributed.get_process_group_ranks(group)
            layout = groups.layout
            return AllToAll(group, ranks.index(layout.rank), layout.on_own_host(ranks), self.traffic, payload)

        self.whole = link(groups.expert_parallel)
        """Between all ranks that share out the experts, in one step."""
        self.by_hosts: tuple[AllToAll, AllToAll] | None = None
        """Between hosts and inside one, where rows go in two steps."""
        if groups.across is not None and groups.within is not None:
            self.by_hosts = link(groups.across), link(groups.within)

    def __deepcopy__(self, memo: Any) -> ExpertParallel:
        # A copy of a model talks to the same processes; process groups cannot be copied.
        return self

    @property
    def layout(self) -> Layout:
        """Where this rank stands."""
        return self.groups.layout

    @property
    def size(self) -> int:
        """Ranks that share out the experts."""
        return self.layout.expert_parallel_size

    def local_experts(self, num_experts: int) -> range:
        """The experts of this rank; see `Layout.local_experts`."""
        return self.layout.local_experts(num_experts)

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Sum tensors over all ranks of the world, with a gradient (see `sum_over`), in one step and in fp64.

        Args:
            values: of any shapes and types; whole numbers stay exact up to 2^53.

        Returns:
            Tensors of the same shapes and types.
        """
        if self.layout.world_size == 1:
            return values
        total = sum_over(torch.cat([each.reshape(-1).double() for each in values]), self.groups.world)
        parts = total.split([each.numel() for each in values])
        return tuple(
            part.view(each.shape).to(each.dtype) for part, each in zip(parts, values, strict=True)
        )

    def gather_experts(self, rows: Tensor) -> Tensor | None:
        """Bring the rows of all experts together; all ranks of the group have to call this.

        Args:
            rows: (local experts, …).

        Returns:
            (num_experts, …) on the first rank of the expert-parallel group, None on the others.
        """
        rows = rows.contiguous()
        first = self.layout.expert_parallel_rank == 0
        parts = [torch.empty_like(rows) for _ in range(self.size)] if first else None
        distributed.gather(rows, parts, dst=self.layout.expert_parallel_ranks[0], group=self.groups.expert_parallel)
        return None if parts is None else torch.cat(parts)
