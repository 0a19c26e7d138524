"""What the processes of one run have to agree on, so that none of them waits for the others for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mtmoe.errors import MtmoeError

T = TypeVar("T")


def distributed() -> bool:
    """Whether this run has several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def largest(number: int) -> int:
    """The largest `number` that a process of the run gave; all have to call this together."""
    if not distributed():
        return number
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def from_first(choose: Callable[[], T]) -> T:
    """What `choose` returns, or the `MtmoeError` that it raises, in the first process: the same in all of them."""
    if not distributed():
        return choose()
    box: list[T | MtmoeError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = choose()
        except MtmoeError as error:
            box[0] = error
    torch.distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], MtmoeError):
        raise box[0]
    return box[0]  # type: ignore[return-value]


def first_problem(text: str) -> str:
    """The `text` of the first process that gave one; "" = none did. All have to call this together."""
    if not distributed():
        return text
    texts: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return next(filter(None, texts), "")
