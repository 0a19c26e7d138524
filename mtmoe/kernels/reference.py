"""The obvious implementation: plain torch, gradients by autograd, any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mtmoe.kernels.plan import DispatchPlan

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}
"""Name of an activation that a backend may fuse -> what it computes."""


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """See `mtmoe.kernels.dispatch`."""
    return _with_rows_of_nobody(x[plan.token[: _routed(plan)]], plan)


def grouped_linear(
    x: Tensor, plan: DispatchPlan, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """See `mtmoe.kernels.grouped_linear`."""
    groups = x[: _routed(plan)].split(plan.tokens_per_expert.tolist())
    weight = weight.to(x.dtype)
    biases = bias.to(x.dtype) if bias is not None else [None] * plan.num_experts
    y = torch.cat([F.linear(group, w, b) for group, w, b in zip(groups, weight, biases, strict=True)])
    return _with_rows_of_nobody(y if activation is None else ACTIVATIONS[activation](y), plan)


def combine(y: Tensor, plan: DispatchPlan, weight: Tensor) -> Tensor:
    """See `mtmoe.kernels.combine`."""
    rows = slice(_routed(plan))
    # (routed, d_model) in the wider of the two types
    scaled = y[rows] * weight.reshape(-1)[plan.assignment[rows], None]
    total = scaled.new_zeros(plan.tokens, y.shape[1])
    return total.index_add(0, plan.token[rows], scaled).to(y.dtype)


def _routed(plan: DispatchPlan) -> int:
    """Rows that belong to an expert; waits for the device."""
    return plan.segments[-1][2] if plan.segments else 0


def _with_rows_of_nobody(y: Tensor, plan: DispatchPlan) -> Tensor:
    """Append zeros up to the plan's number of rows, which on a GPU counts choices that are not routed."""
    return F.pad(y, (0, 0, 0, plan.routed - len(y)))
