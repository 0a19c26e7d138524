"""Tokens to grouped rows and back: row gathers, bound by memory.

Legend:
    T, R: tokens and rows of one program. D: d_model, in pieces of BLOCK_D. slot: (tokens, top_k), a choice's row or -1.

A sum over a token's choices gathers its rows through `slot`; nothing is added atomically, so results are the same bits
every time. Sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtmoe.kernels.plan import DispatchPlan
from mtmoe.kernels.triton.grouped_gemm import sum_type

LANES = 2048
"""Elements a program handles at once: 16 for each thread of 4 warps, two 16-byte loads of 16-bit values."""


@triton.jit
def gather_rows_kernel(x, token, y, rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """``y[row] = x[token[row]]``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = tl.load(token + row, mask=row < rows, other=0)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    tl.store(y + row[:, None] * D + d[None, :], tl.load(x + source[:, None] * D + d[None, :], mask=inside), mask=inside)


@triton.jit
def sum_choices_kernel(
    y,
    slot,
    weight,
    out,
    tokens,
    D,
    TOP_K: tl.constexpr,
    SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[token] = sum over routed choices of weight[token, choice] * y[slot[token, choice]]``."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=SUM)
    for choice in tl.static_range(TOP_K):
        row = tl.load(slot + token * TOP_K + choice, mask=token < tokens, other=-1)
        inside = (row >= 0)[:, None] & (d < D)[None, :]
        values = tl.load(y + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(SUM)
        if HAS_WEIGHT:
            # The weight of a choice that is not routed may be anything; it is not read.
            scale = tl.load(weight + token * TOP_K + choice, mask=row >= 0, other=0.0).to(SUM)
            values *= scale[:, None]
        total += values
    inside = (token < tokens)[:, None] & (d < D)[None, :]
    tl.store(out + token[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward_kernel(
    grad,
    y,
    slot,
    weight,
    grad_y,
    grad_weight,
    tokens,
    D,
    TOP_K: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both gradients in one pass: ``grad_y[row] = weight * grad[token]``, ``grad_weight = <grad[token], y[row]>``."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    for choice in tl.static_range(TOP_K):
        row = tl.load(slot + token * TOP_K + choice, mask=token < tokens, other=-1)
        scale = tl.load(weight + token * TOP_K + choice, mask=row >= 0, other=0.0).to(SUM)
        product = tl.zeros((BLOCK_T, BLOCK_D), dtype=SUM)
        for at in tl.range(0, D, BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            inside = (row >= 0)[:, None] & (d < D)[None, :]
            arriving = tl.load(grad + token[:, None] * D + d[None, :], mask=inside, other=0.0).to(SUM)
            place = row[:, None] * D + d[None, :]
            product += arriving * tl.load(y + place, mask=inside, other=0.0).to(SUM)
            tl.store(grad_y + place, (arriving * scale[:, None]).to(grad_y.dtype.element_ty), mask=inside)
        total = tl.sum(product, 1)
        tl.store(grad_weight + token * TOP_K + choice, total.to(grad_weight.dtype.element_ty), mask=token < tokens)


def block_shape(d_model: int) -> tuple[int, int]:
    """Tokens and columns of one program: whole rows as far as `LANES` reach."""
    columns = min(triton.next_power_of_2(d_model), LANES)
    return LANES // columns, columns


def _gather_rows(x: Tensor, plan: DispatchPlan) -> Tensor:
    """(tokens, d) -> (rows, d), rows of choices that are not routed included."""
    y = x.new_empty(plan.routed, x.shape[1])
    if y.numel():
        rows, columns = block_shape(x.shape[1])
        grid = triton.cdiv(len(y), rows), triton.cdiv(x.shape[1], columns)
        gather_rows_kernel[grid](x, plan.token, y, len(y), x.shape[1], BLOCK_R=rows, BLOCK_D=columns)
    return y


def _sum_choices(y: Tensor, plan: DispatchPlan, weight: Tensor | None) -> Tensor:
    """(rows, d) -> (tokens, d), each row times its weight if there are weights."""
    out = y.new_empty(plan.tokens, y.shape[1])
    if out.numel():
        block, columns = block_shape(y.shape[1])
        grid = triton.cdiv(plan.tokens, block), triton.cdiv(y.shape[1], columns)
        sum_choices_kernel[grid](
            y,
            plan.slot,
            weight,
            out,
            plan.tokens,
            y.shape[1],
            TOP_K=plan.top_k,
            SUM=sum_type(y.dtype),
            HAS_WEIGHT=weight is not None,
            BLOCK_T=block,
            BLOCK_D=columns,
        )
    return out


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """See `mtmoe.kernels.dispatch`."""
    return _Dispatch.apply(x, plan)  # type: ignore[no-any-return]


def combine(y: Tensor, plan: DispatchPlan, weight: Tensor) -> Tensor:
    """See `mtmoe.kernels.combine`."""
    return _Combine.apply(y, plan, weight)  # type: ignore[no-any-return]


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _gather_rows(x.contiguous(), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad.contiguous(), ctx.plan, None), None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: DispatchPlan, weight: Tensor) -> Tensor:
        y, weight = y.contiguous(), weight.contiguous()
        ctx.save_for_backward(y, weight)
        ctx.plan = plan
        return _sum_choices(y, plan, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        y, weight = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        grad_y, grad_weight = torch.empty_like(y), torch.empty_like(weight)
        if plan.tokens:
            block, columns = block_shape(y.shape[1])
            combine_backward_kernel[(triton.cdiv(plan.tokens, block),)](
                grad.contiguous(),
                y,
                plan.slot,
                weight,
                grad_y,
                grad_weight,
                plan.tokens,
                y.shape[1],
                TOP_K=plan.top_k,
                SUM=sum_type(y.dtype),
                BLOCK_T=block,
                BLOCK_D=columns,
            )
        return grad_y, None, grad_weight
