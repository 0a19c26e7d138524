"""Positions as fairseq numbers and encodes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mtmoe.inference.vocabulary import PADDING


def number_positions(real: Tensor) -> Tensor:
    """Number positions as fairseq does: real tokens count from PADDING + 1, padding has PADDING.

    Args:
        real: (batch, length) bool.

    Returns:
        (batch, length) int64.
    """
    return real.long().cumsum(1) * real + PADDING


def sinusoidal_positions(rows: int, d_model: int) -> Tensor:
    """Make fairseq's table: the first half of a row are sines, the second cosines; the row of padding is 0.

    Args:
        rows: position numbers from 0.
        d_model: width; an odd one ends in a zero.

    Returns:
        (rows, d_model) fp32.
    """
    half = d_model // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / max(half - 1, 1)))
    angles = torch.arange(rows, dtype=torch.float)[:, None] * frequencies
    table = F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, d_model % 2))
    table[PADDING] = 0
    return table
