"""Several processes on this machine that run one function together over gloo, forked so that torch is there already."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def run_world(size: int, work: Callable[..., Any], *args: Any, seconds: float = 240.0) -> list[Any]:
    """Call ``work(rank, *args)`` in `size` processes of one torch.distributed world; none outlives this call.

    Returns:
        What each of them returned, by rank.

    Raises:
        AssertionError: one of them failed, with its traceback, or they are not done after so many seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        links = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_member, args=(rank, size, store, links[rank][1], seconds, work, args), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for _, sender in links:
            sender.close()  # else the end of a killed process would not be seen
        try:
            return _collect([receiver for receiver, _ in links], time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = {receivers[rank]: rank for rank in range(len(receivers)) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} are not done: they wait for others, or are slow")
        for receiver in ready:
            rank = waiting[receiver]
            try:
                failure, results[rank] = receiver.recv()
            except EOFError:
                failure = "ended without a word"
            if failure:
                raise AssertionError(f"rank {rank}: {failure}")
    return [results[rank] for rank in range(len(receivers))]


def _member(
    rank: int, size: int, store: Path, sender: Any, seconds: float, work: Callable[..., Any], args: tuple
) -> None:
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        result = work(rank, *args)
        distributed.barrier()  # nobody leaves while others still talk to it
        sender.send(("", result))
    except BaseException:
        sender.send((traceback.format_exc(), None))
