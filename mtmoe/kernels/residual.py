"""A residual connection: dropout of the branch, sum and layer norm in one pass over the rows.

On a CPU with the compiled extension the mask of dropout is never stored: its random numbers follow from one seed and
the element's place, and backward draws them again. Elsewhere plain torch does the same, with other random numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mtmoe.kernels import extension
from mtmoe.kernels.dropout import draw_seed, dropout


def residual_add(x: Tensor, branch: Tensor, p: float = 0.0) -> Tensor:
    """``x + dropout(branch)``.

    Args:
        x: (..., d), float; gets a gradient.
        branch: like `x`, maybe of a narrower type; gets a gradient.
        p: rate of dropout on the branch.

    Returns:
        Like `x`, in the wider type of both.
    """
    if _fits(x, branch):
        return _Add.apply(x, branch, p, draw_seed() if p else 0)  # type: ignore[no-any-return]
    return x + dropout(branch, p)


def residual_norm(
    x: Tensor, branch: Tensor | None, norm: torch.nn.LayerNorm, p: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``x + dropout(branch)``, and the layer norm of that.

    Args:
        x: (..., d), float; gets a gradient.
        branch: like `x`, maybe of a narrower type; gets a gradient. None = nothing to add.
        norm: over the last dimension; its parameters get gradients.
        p: rate of dropout on the branch.
        dtype: type of the normalised result; by default that of `x`. Mean and deviation are of at least fp32.

    Returns:
        The sum and its norm.
    """
    weight, bias = norm.weight, norm.bias
    fast = _fits(x, branch) and weight is not None and bias is not None and weight.dtype == torch.float32
    if fast and norm.normalized_shape == x.shape[-1:] and dtype in (None, torch.float32, torch.bfloat16):
        seed = draw_seed() if p and branch is not None else 0
        total, normed = _AddNorm.apply(x, branch, weight, bias, norm.eps, p, seed, dtype or x.dtype)
        return (x if branch is None else total), normed
    total = x if branch is None else x + dropout(branch, p)
    normed = F.layer_norm(total, norm.normalized_shape, weight, bias, norm.eps)
    return total, normed if dtype is None else normed.to(dtype)


def _fits(x: Tensor, branch: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return False
    if branch is not None and (branch.shape != x.shape or branch.dtype not in (torch.float32, torch.bfloat16)):
        return False
    return extension.available()


class _Add(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, p: float, seed: int) -> Tensor:
        ctx.dtype, ctx.p, ctx.seed = branch.dtype, p, seed
        return torch.ops.mtmoe.residual_add(x.contiguous(), branch.contiguous(), p, seed)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad = grad.contiguous()
        return grad, torch.ops.mtmoe.residual_add_backward(grad, ctx.dtype, ctx.p, ctx.seed), None, None


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, p: float, seed: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        total = x.contiguous()
        if branch is not None:
            total = torch.ops.mtmoe.residual_add(total, branch.contiguous(), p, seed)
        normed, mean, rstd = torch.ops.mtmoe.layer_norm(total, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.branch, ctx.p, ctx.seed = None if branch is None else branch.dtype, p, seed
        ctx.set_materialize_grads(False)
        return (None if branch is None else total), normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        grad_weight = grad_bias = grad_branch = None
        grad_x = None if grad_total is None else grad_total.contiguous()
        if grad_normed is not None:
            grad_x, grad_weight, grad_bias = torch.ops.mtmoe.layer_norm_backward(
                grad_normed.contiguous(), grad_x, total, weight, mean, rstd
            )
        if grad_x is not None and ctx.branch is not None:
            grad_branch = torch.ops.mtmoe.residual_add_backward(grad_x, ctx.branch, ctx.p, ctx.seed)
        return grad_x, grad_branch, grad_weight, grad_bias, None, None, None, None
