"""Collectives that gradients pass through: the ragged all-to-all of rows, and sums over ranks.

An all-to-all has two steps, a beginning and an end, so that other work can be done while the rows travel.

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
from torch.distributed import ProcessGroup, Work


@dataclass(slots=True)
class Traffic:
    """What a rank's all-to-alls have sent, forward, backward and recomputed alike; in bytes.

    That is rows and, in two steps, the numbers and weights of their experts; how many rows come is not counted.
    """

    calls: int = 0
    """All-to-alls."""
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


@dataclass(frozen=True, slots=True)
class Arriving:
    """Rows that an all-to-all has set out to bring."""

    work: Work
    buffer: Tensor
    """Where they arrive, in the type that they travel in."""
    source: Tensor
    """What is sent, which has to live until it has been."""
    dtype: torch.dtype
    """That the rows are wanted in."""

    def wait(self) -> Tensor:
        """The rows, all there. On a GPU it is its stream that waits, not the caller."""
        self.work.wait()
        return self.buffer.to(self.dtype)


class AllToAll:
    """The ragged all-to-all of a group; it counts what it sends by kind of link.

    Args:
        group: its ranks.
        rank: of the caller inside the group.
        on_own_host: of each rank of the group, whether it is on the caller's host.
        traffic: where to count.
        payload: type that rows and their gradients travel in if it is narrower than theirs: they are rounded to it when
            sent, also those that stay on their rank, so that no result depends on who holds what. None: their own.
    """

    def __init__(
        self,
        group: ProcessGroup,
        rank: int,
        on_own_host: Sequence[bool],
        traffic: Traffic,
        payload: torch.dtype | None = None,
    ) -> None:
        self.group, self.rank, self.on_own_host, self.traffic = group, rank, tuple(on_own_host), traffic
        self.payload = payload

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.on_own_host)

    def segments(self, rows_per_expert: Tensor) -> Segments:
        """Tell each rank how many rows it will get for its experts; waits for the device, once.

        Args:
            rows_per_expert: (num_experts,) int64, rows of this rank for each expert of the group.
        """
        mine = rows_per_expert.view(self.size, -1).contiguous()
        theirs = torch.empty_like(mine)
        distributed.all_to_all_single(theirs, mine, group=self.group)
        sent, received = torch.stack([mine, theirs]).sum(dim=-1).tolist()
        return Segments(sent, received, theirs)

    def start(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], payload: torch.dtype | None = None
    ) -> Arriving:
        """Set out to send consecutive rows to the ranks of the group in their order, and to take theirs.

        Args:
            rows: (sum of `send`, …), any type that the backend knows.
            send: rows for each rank; 0 is allowed, and all may be 0.
            receive: rows from each rank.
            payload: see `AllToAll`; this one's is what `begin` gives.

        Returns:
            What becomes (sum of `receive`, …): first rank's rows first.
        """
        narrow = payload is not None and payload.itemsize < rows.element_size()
        source = (rows.to(payload) if narrow else rows).contiguous()
        buffer = source.new_empty(sum(receive), *rows.shape[1:])
        work = distributed.all_to_all_single(
            buffer, source, list(receive), list(send), group=self.group, async_op=True
        )
        self._count(send, source[:1].numel() * source.element_size() if len(rows) else 0)
        return Arriving(work, buffer, source, rows.dtype)

    def begin(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], exact: bool = False
    ) -> Exchange:
        """Send rows as `start` does, with a gradient, which travels back by the same way; see `Exchange`.

        Args:
            rows: as in `start`.
            send: as in `start`.
            receive: as in `start`.
            exact: keep their type, whatever `payload` says.
        """
        return Exchange(self, rows, send, receive, None if exact else self.payload)

    def exchange(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], exact: bool = False
    ) -> Tensor:
        """`begin`, and wait for the rows."""
        return self.begin(rows, send, receive, exact).finish()

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


class Exchange:
    """Rows under way; what is computed before `finish` is computed while they travel.

    The same holds for the gradient: it sets out in the backward step of `finish` and is awaited in that of the
    beginning, and autograd runs what was computed in between in between. Made by `AllToAll.begin`.
    """

    def __init__(
        self,
        all_to_all: AllToAll,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        payload: torch.dtype | None,
    ) -> None:
        self.all_to_all, self.send, self.receive, self.payload = all_to_all, send, receive, payload
        self.arriving: Arriving | None = None
        self._link: Tensor | None = _Begin.apply(rows, self)

    def finish(self) -> Tensor:
        """The rows that have arrived: (sum of `receive`, …), of the type that was sent. To be called once."""
        # Let go of: the graph knows this object, and a circle would keep its tensors until the garbage collector comes.
        link, self._link = self._link, None
        return _Finish.apply(link, self)  # type: ignore[no-any-return]

    def start(self, rows: Tensor, back: bool = False) -> None:
        """Let rows set out, or gradients come back."""
        ways = (self.receive, self.send) if back else (self.send, self.receive)
        self.arriving = self.all_to_all.start(rows, *ways, self.payload)

    def wait(self) -> Tensor:
        """What set out last."""
        arriving, self.arriving = self.arriving, None
        assert arriving is not None
        return arriving.wait()


def sum_over(values: Tensor, group: ProcessGroup) -> Tensor:
    """Sum a tensor over the ranks of a group, each of which gets the sum, and a gradient through it.

    When each rank has a loss that depends on the sum, the gradient is that of all their losses together: it is summed
    over the ranks as well. So it is right for training that adds up what the ranks have found.
    """
    return _Sum.apply(values, group)  # type: ignore[no-any-return]


class _Begin(Function):
    # An empty tensor links the two steps in the graph: what travels is in nobody's hands until it has arrived.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _link: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(grad, back=True)
        return grad.new_empty(0), None


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
