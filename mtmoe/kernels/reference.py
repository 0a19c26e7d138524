"""The obvious implementation: plain torch, gradients by autograd, any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mtmoe.kernels.plan import DispatchPlan


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """See `mtmoe.kernels.dispatch`."""
    return x[plan.token]


def grouped_linear(x: Tensor, plan: DispatchPlan, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `mtmoe.kernels.grouped_linear`."""
    groups = x.split(plan.tokens_per_expert.tolist())
    weight = weight.to(x.dtype)
    biases = bias.to(x.dtype) if bias is not None else [None] * plan.num_experts
    return torch.cat([F.linear(group, w, b) for group, w, b in zip(groups, weight, biases, strict=True)])


def combine(y: Tensor, plan: DispatchPlan, weight: Tensor) -> Tensor:
    """See `mtmoe.kernels.combine`."""
    scaled = y * weight.reshape(-1)[plan.assignment, None]  # (routed, d_model) in the wider of the two types
    total = scaled.new_zeros(plan.tokens, y.shape[1])
    return total.index_add(0, plan.token, scaled).to(y.dtype)
