"""What the processes of one run have to agree on, so that none of them waits for the others for ever."""

from __future__ import annotations

import torch


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
