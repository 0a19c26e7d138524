"""Collectives that gradients pass through: the ragged all-to-all of rows, and sums over ranks.

Backward runs them in the reverse order of forward. Autograd goes through its nodes in the reverse order of their
creation, so ranks whose forward passes call the same collectives in the same order never wait for each other for ever,
whatever else differs between them: a batch without tokens, say, or without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


@dataclass(slots=True)
class Traffic:
    """Rows that a rank's all-to-alls have sent, forward, backward and recomputed ones alike; in bytes."""

    calls: int = 0
    """All-to-alls of rows."""
    to_itself: int = 0
    """Rows of this rank for its own experts, which use no link."""
    same_host: int = 0
    """To other ranks on its host."""
    other_hosts: int = 0
    """To ranks on other hosts."""


@dataclass(frozen=True, slots=True)
class Segments:
    """How many rows go from each rank to each expert of a group, as one of its ranks sees it."""

    sent: list[int]
    """Of each rank of the group: rows for its experts."""
    received: list[int]
    """Of each rank of the group: its rows for the experts here."""
    received_per_expert: Tensor
    """(ranks, local experts) int64: the same by expert."""


class AllToAll:
    """The ragged all-to-all of a group; it counts what it sends by kind of link.

    Args:
        group: its ranks.
        rank: of the caller inside the group.
        on_own_host: of each rank of the group, whether it is on the caller's host.
        traffic: where to count.
    """

    def __init__(self, group: ProcessGroup, rank: int, on_own_host: Sequence[bool], traffic: Traffic) -> None:
        self.group, self.rank, self.on_own_host, self.traffic = group, rank, tuple(on_own_host), traffic

    def segments(self, rows_per_expert: Tensor) -> Segments:
        """Tell each rank how many rows it will get for its experts; waits for the device, once.

        Args:
            rows_per_expert: (num_experts,) int64, rows of this rank for each expert of the group.
        """
        ranks = len(self.on_own_host)
        mine = rows_per_expert.view(ranks, -1).contiguous()
        theirs = torch.empty_like(mine)
        distributed.all_to_all_single(theirs, mine, group=self.group)
        sent, received = torch.stack([mine, theirs]).sum(dim=-1).tolist()
        return Segments(sent, received, theirs)

    def __call__(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send consecutive rows to the ranks of the group in their order, and take theirs.

        Args:
            rows: (sum of `send`, …), contiguous, any type that the backend knows.
            send: rows for each rank; 0 is allowed, and all may be 0.
            receive: rows from each rank.

        Returns:
            (sum of `receive`, …): first rank's rows first.
        """
        arrived = rows.new_empty(sum(receive), *rows.shape[1:])
        distributed.all_to_all_single(arrived, rows, list(receive), list(send), group=self.group)
        self._count(send, rows[:1].numel() * rows.element_size() if len(rows) else 0)
        return arrived

    def _count(self, send: Sequence[int], row_bytes: int) -> None:
        traffic = self.traffic
        traffic.calls += 1
        for member, (rows, near) in enumerate(zip(send, self.on_own_host, strict=True)):
            if member == self.rank:
                traffic.to_itself += rows * row_bytes
            elif near:
                traffic.same_host += rows * row_bytes
            else:
                traffic.other_hosts += rows * row_bytes


def exchange(rows: Tensor, send: Sequence[int], receive: Sequence[int], all_to_all: AllToAll) -> Tensor:
    """`AllToAll` with a gradient, which travels back by the same way."""
    return _Exchange.apply(rows, send, receive, all_to_all)  # type: ignore[no-any-return]


def sum_over(values: Tensor, group: ProcessGroup) -> Tensor:
    """Sum a tensor over the ranks of a group, each of which gets the sum, and a gradient through it.

    When each rank has a loss that depends on the sum, the gradient is that of all their losses together: it is summed
    over the ranks as well. So it is right for training that adds up what the ranks have found.
    """
    return _Sum.apply(values, group)  # type: ignore[no-any-return]


class _Exchange(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int], all_to_all: AllToAll
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.all_to_all = send, receive, all_to_all
        return all_to_all(rows.contiguous(), send, receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.all_to_all(grad.contiguous(), ctx.receive, ctx.send), None, None, None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


def _summed(values: Tensor, group: ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group)
    return total
