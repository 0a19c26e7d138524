"""The compiled kernels' random numbers, written out in torch: what a mask must be for a seed."""

import torch
from torch import Tensor

_WORD = (1 << 32) - 1


def _row_key(seed: int, row: int) -> int:
    mask = (1 << 64) - 1
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & _WORD


def keep_mask(seed: int, rows: int, columns: int, p: float) -> Tensor:
    """(rows, columns) fp64: 0 where an element is dropped, else 1 / (1 - p)."""
    key = torch.tensor([_row_key(seed, row) for row in range(rows)], dtype=torch.int64)[:, None]
    x = (torch.arange(columns, dtype=torch.int64) * 0x9E3779B1) & _WORD ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    x = x ^ (x >> 16)
    threshold = int(p * 2.0**32 + 0.5)
    return (x >= threshold).double() / (1.0 - p)
