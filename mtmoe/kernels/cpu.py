"""The CPU implementation: compiled kernels where they are available, else one GEMM a non-empty expert.

Either way results are written straight into their place, and nothing is scattered: a token's rows are found through
`DispatchPlan.slot`, so both sums over choices (combine, and the backward of dispatch) are gathers; ``index_add`` on a
CPU walks the rows one by one. Sums over rows have one order, whatever the number of threads: same inputs, same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtmoe.kernels import extension
from mtmoe.kernels.plan import DispatchPlan
from mtmoe.kernels.reference import ACTIVATIONS


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """See `mtmoe.kernels.dispatch`."""
    return _Dispatch.apply(x, plan)  # type: ignore[no-any-return]


def grouped_linear(
    x: Tensor, plan: DispatchPlan, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """See `mtmoe.kernels.grouped_linear`."""
    relu = activation == "relu"
    y: Tensor = _GroupedLinear.apply(x, plan, weight, bias, relu)
    return y if relu or activation is None else ACTIVATIONS[activation](y)


def combine(y: Tensor, plan: DispatchPlan, weight: Tensor) -> Tensor:
    """See `mtmoe.kernels.combine`."""
    return _Combine.apply(y, plan, weight)  # type: ignore[no-any-return]


COMPILED = {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)}
"""Types of rows and weights that the compiled kernels take; the last is autocast, which casts weights in the cache."""


def _compiled(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernels can do this product, or (with the routing weights, fp32) this sum."""
    even = weight.dim() < 3 or (weight.shape[1] % 2 == 0 and weight.shape[2] % 2 == 0)  # bf16 pairs share a word
    return (x.dtype, weight.dtype) in COMPILED and even and extension.available()


def _sum_choices(grouped: Tensor, plan: DispatchPlan, weight: Tensor | None) -> Tensor:
    """Sum each token's rows, times their weights if given: (routed, d) -> (tokens, d), at least fp32 inside."""
    if _compiled(grouped, grouped if weight is None else weight):
        grouped = grouped.contiguous()
        weight = None if weight is None else weight.contiguous()
        return torch.ops.mtmoe.sum_choices(grouped, plan.slot, weight)  # type: ignore[no-any-return]
    dtype = torch.promote_types(grouped.dtype, torch.float32)
    if not plan.routed:
        return grouped.new_zeros(plan.tokens, grouped.shape[1])
    if weight is not None:
        weight = weight.to(dtype)
    slot = plan.slot
    if not plan.complete:
        missing = slot < 0
        own = slot.amax(dim=1, keepdim=True)  # (tokens, 1): some row of the token, -1 if it goes nowhere
        # A missing choice reads a row of its own token, times 0: another token's may be infinite, and 0 x inf is NaN.
        slot = torch.where(missing, own.clamp(min=0), slot)
        weight = torch.ones(slot.shape, dtype=dtype) if weight is None else weight
        weight = weight.masked_fill(missing, 0)
    total = None
    for choice in range(plan.top_k):
        rows = grouped.index_select(0, slot[:, choice])  # (tokens, d)
        if weight is None:
            total = rows.to(dtype) if total is None else total.add_(rows)
        else:
            column = weight[:, choice, None]
            total = rows * column if total is None else total.addcmul_(rows.to(dtype), column)
    assert total is not None  # top_k is at least 1
    if not plan.complete:
        total.index_fill_(0, (own[:, 0] < 0).nonzero()[:, 0], 0)
    return total.to(grouped.dtype)


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad, ctx.plan, None), None


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: DispatchPlan, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        ctx.plan, ctx.has_bias = plan, bias is not None
        if _compiled(x, weight) and (bias is None or bias.dtype == weight.dtype):
            x, weight = x.contiguous(), weight.contiguous()
            bias = None if bias is None else bias.contiguous()
            y: Tensor = torch.ops.mtmoe.grouped_linear_forward(x, plan.offsets, weight, bias, relu)
        else:
            y = _forward_by_expert(x, plan, weight, bias)
            if relu:
                y.relu_()
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, weight, y = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.has_bias and ctx.needs_input_grad[3]
        grad = grad.contiguous()
        if _compiled(x, weight):
            found = torch.ops.mtmoe.grouped_linear_backward(grad, x, y, ctx.plan.offsets, weight, *needs)
            grad_x, grad_weight, grad_bias = (value if need else None for value, need in zip(found, needs, strict=True))
        else:
            if y is not None:
                grad = torch.ops.aten.threshold_backward(grad, y, 0)
            grad_x, grad_weight, grad_bias = _backward_by_expert(grad, x, ctx.plan, weight, *needs)
        return grad_x, None, grad_weight, grad_bias, None


# Under autocast x is bf16 and the weights fp32. Each expert's matrix is cast when its turn comes and its gradient is
# cast back at once: both stay in the cache. Casting the whole bank costs nearly as much as its GEMMs (8 experts of
# 256 x 512, 1000 tokens, top-2).
def _forward_by_expert(x: Tensor, plan: DispatchPlan, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One GEMM for each expert that has rows."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    for expert, start, end in plan.segments:
        matrix = weight[expert].to(x.dtype).t()
        vector = None if bias is None else bias[expert].to(x.dtype)
        _multiply_rows(x, start, end, matrix, vector, y)
    return y


def _backward_by_expert(
    grad: Tensor, x: Tensor, plan: DispatchPlan, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Two GEMMs for each expert that has rows."""
    grad_x = torch.empty_like(x) if need_x else None
    # Empty experts keep zeros; when every expert has tokens each gradient is written exactly once.
    new = torch.empty if len(plan.segments) == plan.num_experts else torch.zeros
    grad_weight = new(weight.shape, dtype=weight.dtype) if need_weight else None
    grad_bias = new(weight.shape[:2], dtype=weight.dtype) if need_bias else None
    same_type = x.dtype == weight.dtype
    for expert, start, end in plan.segments:
        if grad_x is not None:
            _multiply_rows(grad, start, end, weight[expert].to(x.dtype), None, grad_x)
        if grad_weight is not None:
            size = _rounded(end - start, x.dtype)
            left, right = _zero_padded(grad, start, end, size).t(), _zero_padded(x, start, end, size)
            if same_type:
                torch.mm(left, right, out=grad_weight[expert])
            else:
                grad_weight[expert] = torch.mm(left, right)
        if grad_bias is not None:
            torch.sum(grad[start:end], 0, dtype=weight.dtype, out=grad_bias[expert])
    return grad_x, grad_weight, grad_bias


ROWS = 32
"""Rows of a 16-bit GEMM are rounded up to a multiple of this. oneDNN compiles a kernel for each new shape, which takes
0.35 ms, twice the product of 250 x 256 x 512 itself, and an expert's number of tokens is new nearly every time."""


def _rounded(rows: int, dtype: torch.dtype) -> int:
    """The number of rows to multiply; fp32 and fp64 products need no compiled kernel for their shape."""
    return -(-rows // ROWS) * ROWS if dtype.itemsize == 2 else rows


def _multiply_rows(x: Tensor, start: int, end: int, matrix: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write ``x[start:end] @ matrix + bias`` to ``y[start:end]``, and what it likes behind it.

    Rounding takes rows of the next experts along, and overwrites their results: experts must come in rising order, so
    that each is written after the one that spills over it.
    """
    stop = start + _rounded(end - start, x.dtype)
    fits = stop <= len(x)
    rows = x[start:stop] if fits else _zero_padded(x, start, end, stop - start)
    out = y[start:stop] if fits else None
    product = torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)
    if not fits:
        y[start:end] = product[: end - start]


def _zero_padded(x: Tensor, start: int, end: int, size: int) -> Tensor:
    """Rows `start` to `end`, and rows of zeros up to `size`: a view if there are none of those."""
    if size == end - start:
        return x[start:end]
    padded = x.new_zeros(size, x.shape[1])
    padded[: end - start] = x[start:end]
    return padded


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: DispatchPlan, weight: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.plan = plan
        return _sum_choices(y, plan, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        y, weight = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        if _compiled(y, weight):
            grad, y, weight = grad.contiguous(), y.contiguous(), weight.contiguous()
            grad_y, grad_weight = torch.ops.mtmoe.combine_backward(grad, y, weight, plan.assignment)
            return grad_y, None, grad_weight
        rows = grad.index_select(0, plan.token)  # (routed, d_model)
        grad_weight = torch.zeros_like(weight)
        dtype = torch.promote_types(y.dtype, torch.float32)
        grad_weight.view(-1)[plan.assignment] = torch.linalg.vecdot(rows.to(dtype), y.to(dtype)).to(weight.dtype)
        grad_y = rows.mul_(weight.reshape(-1)[plan.assignment, None].to(rows.dtype))
        return grad_y, None, grad_weight
