"""What the processes of one run have to agree on, so that none of them waits for the others for ever."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch

from mtmoe.errors import MtmoeError
from mtmoe.files import write_json

T = TypeVar("T")

COLLECTIVE_TIMEOUT = 600.0
"""Seconds that a process waits for the others before it ends with an error: torch's default with NCCL. A validation or
a checkpoint that takes longer on one process wants more."""


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


def record_errors() -> None:
    """Write the error that ends a process where torch's elastic launcher looks for it, as its decorator `record` does.

    That one wraps a function of the program; here the program is fairseq's.
    """
    path, hook = os.environ.get("TORCHELASTIC_ERROR_FILE"), sys.excepthook
    if not path:
        return

    def recording(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace))
        extra = {"py_callstack": lines, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # a full disk: the log has the error, perhaps
            write_json(path, {"message": {"message": f"{kind.__name__}: {error}", "extraInfo": extra}})
        hook(kind, error, trace)

    sys.excepthook = recording


def first_problem(text: str) -> str:
    """The `text` of the first process that gave one; "" = none did. All have to call this together."""
    if not distributed():
        return text
    texts: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return next(filter(None, texts), "")
