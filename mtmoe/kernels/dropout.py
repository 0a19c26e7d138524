"""Dropout that does not wait for the CPU's random number generator.

torch draws one 64-bit Mersenne number for each element on a CPU: 1.5 ms for 256,000 elements, as long as a bf16 GEMM of
1000 × 256 × 1024. The compiled kernel draws one seed: an element's random number follows from it and from its place,
on all threads, and backward draws it again instead of reading a mask. Elsewhere one draw serves four elements, 16 bits
each, in a third of torch's time; the rate is rounded to 1/65,536 there and the scale uses the rounded rate, so that the
expectation is right to the precision of the type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mtmoe.kernels import extension

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability `p` and scale the others by ``1 / (1 - p)``.

    Args:
        x: any shape, float; gets a gradient.
        p: rate in [0, 1].
        training: False returns `x` itself and draws nothing; so does ``p == 0``.

    Returns:
        A tensor like `x`.

    Raises:
        ValueError: `p` is outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout p={p} must be between 0 and 1")
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p, training=True)
    if x.dtype in (torch.float32, torch.bfloat16) and extension.available():
        return _CompiledDropout.apply(x, p, draw_seed())  # type: ignore[no-any-return]
    return _Dropout.apply(x, round(p * _LEVELS))  # type: ignore[no-any-return]


def draw_seed() -> int:
    """A seed for masks, from torch's own generator of the CPU."""
    return int(torch.empty((), dtype=torch.int64).random_(-(1 << 63), None))


def keep_mask(shape: torch.Size | tuple[int, ...], dropped_levels: int) -> Tensor:
    """Draw a bool mask on the CPU: False with probability ``dropped_levels / 65536``, from torch's own generator."""
    elements = 1
    for size in shape:
        elements *= size
    words = torch.empty((elements + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    if dropped_levels == _LEVELS:  # past the largest int16, so that a comparison with it would wrap around
        return torch.zeros(shape, dtype=torch.bool)
    return (words.view(torch.int16)[:elements] >= dropped_levels - _LEVELS // 2).view(shape)


class _CompiledDropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return torch.ops.mtmoe.dropout(x.contiguous(), p, seed)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.mtmoe.dropout(grad.contiguous(), ctx.p, ctx.seed), None, None


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped_levels: int) -> Tensor:
        # All dropped: the scale has no meaning, and 0 keeps the result free of NaN.
        scale = _LEVELS / (_LEVELS - dropped_levels) if dropped_levels < _LEVELS else 0.0
        # A mask of x's type, scale included: one plain product in each direction, twice as fast as one with bools.
        mask = keep_mask(x.shape, dropped_levels).to(x.dtype).mul_(scale)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None
