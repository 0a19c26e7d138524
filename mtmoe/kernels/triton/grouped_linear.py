"""The experts' linear maps with a fused activation: which products forward and backward need, and what is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtmoe.kernels.plan import DispatchPlan
from mtmoe.kernels.triton.grouped_gemm import multiply_columns, multiply_rows, sum_rows


def grouped_linear(
    x: Tensor, plan: DispatchPlan, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """See `mtmoe.kernels.grouped_linear`."""
    return _GroupedLinear.apply(x, plan, weight, bias, activation)  # type: ignore[no-any-return]


class _GroupedLinear(Function):
    # relu's gradient is read off its output, which the next layer keeps anyway; gelu and silu keep their input.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: DispatchPlan, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        x, matrices = x.contiguous(), weight.to(x.dtype)
        vectors = None if bias is None else bias.contiguous()
        save = activation in ("gelu", "silu") and any(ctx.needs_input_grad)
        product = "forward_saved" if save else "forward"
        y, before = multiply_rows(product, x, plan.offsets, matrices, vectors, activation, save=save)
        ctx.save_for_backward(x, matrices, y if activation == "relu" else before)
        ctx.offsets, ctx.activation = plan.offsets, activation
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, matrices, kept = ctx.saved_tensors
        offsets: Tensor = ctx.offsets
        grad = _activation_backward(grad, kept, ctx.activation).contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            transposed = matrices.transpose(1, 2)  # (num_experts, d_in, d_out)
            grad_x, _ = multiply_rows("rows_gradient", grad, offsets, transposed, None, None, save=False)
        if ctx.needs_input_grad[2]:
            grad_weight = multiply_columns(grad, x, offsets, ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            grad_bias = sum_rows(grad, offsets, ctx.bias_dtype)
        return grad_x, None, grad_weight, grad_bias, None


def _activation_backward(grad: Tensor, kept: Tensor | None, activation: str | None) -> Tensor:
    """The gradient before the activation: one pass over memory, which torch's own kernels do as well as ours could.

    Not fused into the loads of the two products behind it: they copy asynchronously from memory into shared memory,
    and would have to compute in between.
    """
    if activation is None or kept is None:
        return grad
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, kept, 0)  # type: ignore[no-any-return]
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, kept)  # type: ignore[no-any-return]
    return torch.ops.aten.silu_backward(grad, kept)  # type: ignore[no-any-return]
