"""What the machine can do at best: large matrix products, and copies between buffers that no cache holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import Case
from benchmarks.timing import Times

GEMM_SIZE = {"cpu": 1536, "cuda": 8192}
"""Rows, columns and depth of the product: 7 GFLOP on a CPU, about as long as a forward pass of the headline shapes."""

COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Bytes of a buffer: four times the last-level cache of the machines this was written on."""


def limit_runs(case: Case) -> dict[str, Callable[[], object]]:
    """The two measurements, to be timed in turn with the peers."""
    size = GEMM_SIZE[case.device]
    left, right = (torch.randn(size, size, device=case.device).to(case.compute_dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(COPY_BYTES[case.device] // 4, device=case.device)
    target = torch.empty_like(source)
    return {"gemm": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}


def rates(case: Case, times: dict[str, Times]) -> dict[str, float]:
    """FLOP/s and bytes/s at the median, a copied byte counted as one read and one written."""
    size = GEMM_SIZE[case.device]
    return {
        "flops_per_second": 2 * size**3 / times["gemm"].median,
        "bytes_per_second": 2 * COPY_BYTES[case.device] / times["copy"].median,
    }


def limits(case: Case, which: str, touched: int, measured: dict[str, float]) -> dict[str, float]:
    """Seconds that a pass takes at least: its FLOPs at the measured rate, its bytes at the measured bandwidth."""
    return {
        "gemm": case.flops(which) / measured["flops_per_second"],
        "bandwidth": case.bytes_moved(which, touched) / measured["bytes_per_second"],
    }
