"""Linear maps whose weights are kept in another type than they are multiplied in.

Under autocast torch casts each weight, bias, input and gradient in an operation of its own. Here the weights of maps
that read one input are cast straight into one matrix, and their gradients are cast as they are split again.

bf16 products on a CPU take the compiled kernels of the experts, as a bank of one, where they are available. On a shape
that came before, their forward pass is up to a quarter slower than torch.mm and their backward pass as fast; they spare
the 0.4 ms that oneDNN compiles for each number of rows that did not come before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtmoe.kernels import extension


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


def _compiled(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the compiled kernels can do these products: bf16 rows, and parameters of one type and of even sizes."""
    types = {parameter.dtype for parameter in parameters}
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(types) > 1 or not types <= {x.dtype, torch.float32}:
        return False
    return all(size % 2 == 0 for parameter in parameters for size in parameter.shape) and extension.available()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    """A compiled product of (rows, d_in) with (d_out, d_in), whose type may be another than that of `x`."""
    rows = torch.tensor((0, len(x)))
    return torch.ops.mtmoe.grouped_linear_forward(x, rows, weight[None], bias[None], relu)  # type: ignore[no-any-return]


def _multiply_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the rows, the weight and the bias; `y` is the output where it went through relu."""
    rows = torch.tensor((0, len(x)))
    grad_x, grad_weight, grad_bias = torch.ops.mtmoe.grouped_linear_backward(
        grad.contiguous(), x, y, rows, weight[None], need_x, True, True
    )
    return grad_x if need_x else None, grad_weight[0], grad_bias[0]


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, maps: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:maps], parameters[maps:]
        flat = x.reshape(-1, x.shape[-1])
        ctx.sizes, ctx.types, ctx.shape = [len(each) for each in weights], (weights[0].dtype, biases[0].dtype), x.shape
        ctx.compiled = _compiled(flat, *parameters)
        if ctx.compiled:
            flat, dtype = flat.contiguous(), weights[0].dtype
            weight = _joined(weights, dtype).contiguous()
            y = _multiply(flat, weight, _joined(biases, dtype).contiguous())
        else:
            weight = _joined(weights, x.dtype)
            y = torch.addmm(_joined(biases, x.dtype), flat, weight.t())
        ctx.save_for_backward(flat, weight)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        if ctx.compiled:
            grad_x, grad_weight, grad_bias = _multiply_backward(grad, x, None, weight, ctx.needs_input_grad[0])
        else:
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
            grad_weight, grad_bias = _parameter_gradients(grad, x, *ctx.types)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, *grad_weight.split(ctx.sizes), *grad_bias.split(ctx.sizes)


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        dtype = x.dtype
        ctx.types = weight1.dtype, bias1.dtype, weight2.dtype, bias2.dtype
        flat = x.reshape(-1, x.shape[-1])
        ctx.compiled = _compiled(flat, weight1, bias1, weight2, bias2)
        if ctx.compiled:
            flat, weight1, weight2 = flat.contiguous(), weight1.contiguous(), weight2.contiguous()
            hidden = _multiply(flat, weight1, bias1.contiguous(), relu=True)
            y = _multiply(hidden, weight2, bias2.contiguous())
        else:
            weight1, weight2 = weight1.to(dtype), weight2.to(dtype)
            hidden = torch.addmm(bias1.to(dtype), flat, weight1.t()).relu_()
            y = torch.addmm(bias2.to(dtype), hidden, weight2.t())
        ctx.save_for_backward(flat, hidden, weight1, weight2)
        return y.view(*x.shape[:-1], len(weight2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight1, weight2 = ctx.saved_tensors
        shape, need_x = grad.shape[:-1], ctx.needs_input_grad[0]
        grad = grad.reshape(-1, grad.shape[-1])
        if ctx.compiled:
            grad_hidden, grad_weight2, grad_bias2 = _multiply_backward(grad, hidden, None, weight2, True)
            assert grad_hidden is not None
            grad_x, grad_weight1, grad_bias1 = _multiply_backward(grad_hidden, x, hidden, weight1, need_x)
        else:
            grad_weight2, grad_bias2 = _parameter_gradients(grad, hidden, *ctx.types[2:])
            grad_hidden = torch.ops.aten.threshold_backward(grad @ weight2, hidden, 0.0)
            grad_weight1, grad_bias1 = _parameter_gradients(grad_hidden, x, *ctx.types[:2])
            grad_x = grad_hidden @ weight1 if need_x else None
        grad_x = None if grad_x is None else grad_x.view(*shape, x.shape[-1])
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2
