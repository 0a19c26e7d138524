"""Linear maps whose weights are kept in another type than they are multiplied in.

Under autocast torch casts each weight, bias, input and gradient in an operation of its own. Here the weights of maps
that read one input are cast straight into one matrix, and their gradients are cast as they are split again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that products of `x` run in: autocast's, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(x: Tensor, *maps: nn.Linear) -> Tensor:
    """Apply linear maps with biases to one input.

    Args:
        x: (..., d_in); gets a gradient.
        maps: each from d_in; weights and biases get gradients of their own type.

    Returns:
        (..., sum of d_out), in the autocast type, or that of `x`: the maps' results behind each other.
    """
    weights, biases = [each.weight for each in maps], [each.bias for each in maps]
    return _Linear.apply(x.to(autocast_dtype(x)), len(maps), *weights, *biases)  # type: ignore[no-any-return]


def feed_forward(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """``second(relu(first(x)))``.

    Args:
        x: (..., d_model); gets a gradient.
        first: from d_model to d_ffn, with bias.
        second: from d_ffn to d_model, with bias.

    Returns:
        (..., d_model), in the autocast type, or that of `x`.
    """
    return _FeedForward.apply(  # type: ignore[no-any-return]
        x.to(autocast_dtype(x)), first.weight, first.bias, second.weight, second.bias
    )


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts behind each other, in another type: each is read once."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    joined = parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=dtype)
    for target, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        target.copy_(part)
    return joined


def _parameter_gradients(
    grad: Tensor, x: Tensor, weight_dtype: torch.dtype, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from (rows, d_out) and (rows, d_in)."""
    return (grad.t() @ x).to(weight_dtype), grad.sum(dim=0, dtype=bias_dtype)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, maps: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:maps], parameters[maps:]
        flat = x.reshape(-1, x.shape[-1])
        weight = _joined(weights, x.dtype)
        ctx.save_for_backward(flat, weight)
        ctx.sizes, ctx.types, ctx.shape = [len(each) for each in weights], (weights[0].dtype, biases[0].dtype), x.shape
        return torch.addmm(_joined(biases, x.dtype), flat, weight.t()).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = (grad @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_weight, grad_bias = _parameter_gradients(grad, x, *ctx.types)
        return grad_x, None, *grad_weight.split(ctx.sizes), *grad_bias.split(ctx.sizes)


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        dtype = x.dtype
        ctx.types = weight1.dtype, bias1.dtype, weight2.dtype, bias2.dtype
        flat, weight1, weight2 = x.reshape(-1, x.shape[-1]), weight1.to(dtype), weight2.to(dtype)
        hidden = torch.addmm(bias1.to(dtype), flat, weight1.t()).relu_()
        ctx.save_for_backward(flat, hidden, weight1, weight2)
        return torch.addmm(bias2.to(dtype), hidden, weight2.t()).view(*x.shape[:-1], len(weight2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        shape = grad.shape[:-1]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_weight2, grad_bias2 = _parameter_gradients(grad, hidden, *ctx.types[2:])
        grad_hidden = torch.ops.aten.threshold_backward(grad @ weight2, hidden, 0.0)
        grad_weight1, grad_bias1 = _parameter_gradients(grad_hidden, x, *ctx.types[:2])
        grad_x = (grad_hidden @ weight1).view(*shape, x.shape[-1]) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2
