"""Initial weights with which attention looks at the right position from the first update on.

A drawn attention is uniform, and finding out where to look costs a small model most of a short training. Sinusoidal
positions make the alignment of two sequences a linear map: the position `offset` further on is a rotation of the
position itself, so query and key projections can be written down with which a head looks there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def positional_projections(
    d_model: int, num_heads: int, offsets: Sequence[int | None], gain: float
) -> tuple[Tensor, Tensor]:
    """Query and key weights with which heads look at a position relative to their own.

    A head reads the sinusoids of highest frequency, as many as fit into it: 16 pairs in a head of width 32. Two
    positions apart, their product falls to a third; the lower frequencies hardly tell neighbours apart.

    Args:
        d_model: width of a token, even; positions are fairseq's sinusoids, all sines before all cosines.
        num_heads: heads of the attention.
        offsets: what each head looks at: 1 = the position after its own; None leaves a head at zero. Cyclic.
        gain: of both projections; the scores grow with its square.

    Returns:
        query, key: (d_model, d_model) weights, to be added to drawn ones.

    Raises:
        ValueError: the width of a head is odd, or there are no offsets.

    Source: the rotation is that of Vaswani et al. 2017, section 3.5; to start from it is ours.
    """
    head_width = d_model // num_heads
    if head_width % 2 or d_model % num_heads:
        raise ValueError(f"d_model={d_model} must be {num_heads} heads of an even width, got {d_model / num_heads:g}")
    if not offsets:
        raise ValueError("offsets must name at least one position, such as 1, or None for a head without")
    sine, cosine = position_columns(d_model, num_heads)
    pairs = len(sine)
    frequency = torch.exp(torch.arange(pairs) * (-math.log(10000) / (d_model // 2 - 1)))
    query, key = torch.zeros(d_model, d_model), torch.zeros(d_model, d_model)
    for head in range(num_heads):
        offset = offsets[head % len(offsets)]
        if offset is None:
            continue
        rows = head * head_width + torch.arange(pairs)
        key[rows, sine] = key[rows + pairs, cosine] = gain
        # sin(a + b) = sin a cos b + cos a sin b; cos(a + b) = cos a cos b - sin a sin b
        query[rows, sine] = query[rows + pairs, cosine] = gain * torch.cos(frequency * offset)
        query[rows, cosine] = gain * torch.sin(frequency * offset)
        query[rows + pairs, sine] = -gain * torch.sin(frequency * offset)
    return query, key


def position_columns(d_model: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """The dimensions of a token that `positional_projections` reads: (pairs,) of the sines, (pairs,) of the cosines."""
    pairs = torch.arange(d_model // num_heads // 2)
    return pairs, d_model // 2 + pairs


def copying_projections(d_model: int, gain: float) -> tuple[Tensor, Tensor]:
    """Value and output weights that pass on what attention looks at, whichever heads look there.

    Args:
        d_model: width of a token.
        gain: of what is passed on.

    Returns:
        value, output: (d_model, d_model), ``output @ value`` is `gain` times the identity, and each head carries a
        random subspace.
    """
    value = torch.nn.init.orthogonal_(torch.empty(d_model, d_model))
    return value, gain * value.t()
