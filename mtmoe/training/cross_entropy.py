"""Label-smoothed cross entropy whose backward pass is already done when the forward pass ends.

The usual way keeps the logits, an fp32 copy, its log-softmax and the gradient of both: four arrays of (tokens,
vocabulary). Here the gradient is written over the logits while they are in the cache, in the dtype that the matrix
product uses, and nothing else of that size exists.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtmoe.kernels import extension

ROWS_IN_CACHE = 1 << 19
"""Elements of fp32 logits that the softmax works on at once on a CPU: 2 MiB, an L2 cache. For 1000 x 4096 logits on one
core with AVX-512 BF16 the time is flat from 2**17 to 2**19, and 5-10 % more on either side."""

WORTH_COPYING = 0.8
"""Share of real tokens below which they are copied together before the products, on a CPU."""

LOGITS_AT_ONCE = 1 << 27
"""Elements of logits that exist at once; above it (1024 tokens x 128k words) tokens are taken in several blocks."""


def label_smoothed_cross_entropy(
    features: Tensor, weight: Tensor, target: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Loss of a linear output layer, without its logits: same value as label smoothing on ``features @ weight.T``.

    ``loss = sum over tokens of (1 - eps - eps_i) * nll + eps_i * sum_v nll_v`` with ``eps_i = eps / (vocabulary - 1)``:
    fairseq's definition. Under autocast the matrix products run in its dtype; softmax and sums are always fp32.

    Args:
        features: (tokens, d_model) output of the decoder; gets a gradient.
        weight: (vocabulary, d_model) of the output layer; gets a gradient.
        target: (tokens,) int64.
        label_smoothing: eps, in [0, 1).
        ignore_index: a token with this target counts neither in the loss nor in a gradient.

    Returns:
        () fp32 loss, a sum over tokens; (tokens,) fp32 negative log likelihood in nats, 0 where ignored, no gradient.

    Raises:
        ValueError: shapes do not fit or eps is out of range.
    """
    _check(features, target, label_smoothing)
    if weight.shape[1] != features.shape[1]:
        raise ValueError(f"features have {features.shape[1]} columns, the output layer has {weight.shape[1]}")
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        loss, nll = _FromFeatures.apply(features, weight, target, label_smoothing, ignore_index)
    return loss, nll


def label_smoothed_cross_entropy_from_logits(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The same loss for a model that gives logits only; one gradient of their size and dtype is made, no fp32 copy.

    Args:
        logits: (tokens, vocabulary); gets a gradient.
        target: (tokens,) int64.
        label_smoothing: eps, in [0, 1).
        ignore_index: a token with this target counts neither in the loss nor in the gradient.

    Returns:
        As `label_smoothed_cross_entropy`.
    """
    _check(logits, target, label_smoothing)
    loss, nll = _FromLogits.apply(logits, target, label_smoothing, ignore_index)
    return loss, nll


class _FromFeatures(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = len(target), weight.shape[0]
        wants_grad = any(ctx.needs_input_grad[:2])
        kept = target.ne(ignore_index)
        # Leave padding out of the products where it is more than a little. Each new number of rows makes oneDNN compile
        # three kernels (1 ms), while whole batches come in few shapes; on a GPU the count would have to be waited for.
        sparse = features.device.type == "cpu" and int(kept.sum()) < WORTH_COPYING * tokens
        rows = kept.nonzero().squeeze(1) if sparse else None
        x, y, mask = (features, target, kept) if rows is None else (features[rows], target[rows], None)
        block = max(1, LOGITS_AT_ONCE // vocabulary)
        losses, nlls, grad_x = [], [], torch.empty_like(x) if wants_grad else None
        grad_weight: Tensor | None = None
        for start in range(0, len(y), block):
            part = slice(start, start + block)
            logits = x[part] @ weight.T  # (block, vocabulary)
            loss, nll = _loss_and_gradient(
                logits, y[part], None if mask is None else mask[part], label_smoothing, logits if wants_grad else None
            )
            losses.append(loss)
            nlls.append(nll)
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[part])
                product = logits.T @ x[part]  # (vocabulary, d_model)
                if len(y) <= block:
                    grad_weight = product
                else:  # sums of several blocks are kept in fp32
                    grad_weight = product.float() if grad_weight is None else grad_weight.add_(product)
        nll = torch.cat(nlls) if nlls else features.new_zeros(0, dtype=torch.float32)
        loss = torch.stack(losses).sum() if losses else features.new_zeros((), dtype=torch.float32)
        if grad_x is not None:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
            if rows is not None and len(rows) < tokens:
                grad_x = torch.zeros_like(features).index_copy_(0, rows, grad_x)
            ctx.grad_x, ctx.grad_weight = grad_x, grad_weight
        if rows is not None and len(rows) < tokens:
            nll = nll.new_zeros(tokens).index_copy_(0, rows, nll)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = _scaled(ctx, grad_loss, "grad_x"), _scaled(ctx, grad_loss, "grad_weight")
        return grad_x, grad_weight, None, None, None


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        loss, nll = _loss_and_gradient(logits, target, target.ne(ignore_index), label_smoothing, grad)
        ctx.grad_logits = grad
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, grad_loss, "grad_logits"), None, None, None


def _loss_and_gradient(
    logits: Tensor, target: Tensor, mask: Tensor | None, label_smoothing: float, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss of a block of tokens; its gradient goes into `grad`, which may be `logits` itself.

    Returns:
        () fp32 loss, (tokens,) fp32 negative log likelihood; both count only where `mask` is true (None: everywhere).
    """
    if _runs_triton(logits):
        from mtmoe.kernels.triton.cross_entropy import loss_and_gradient

        return loss_and_gradient(logits, target, mask, label_smoothing, grad)
    tokens, vocabulary = logits.shape
    eps_i = label_smoothing / (vocabulary - 1) if label_smoothing else 0.0
    on_target = 1.0 - label_smoothing - eps_i
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16) and extension.available():
        wanted = target if mask is None else target.masked_fill(~mask, -1)
        nll, smooth = torch.ops.mtmoe.cross_entropy(
            logits.contiguous(), wanted.contiguous(), -1, on_target, eps_i, grad
        )
        loss = on_target * nll.sum()
        return (loss + eps_i * smooth.sum() if eps_i else loss), nll
    rows = max(1, ROWS_IN_CACHE // vocabulary) if logits.device.type == "cpu" else max(tokens, 1)
    nll = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    smooth = torch.empty_like(nll)  # sum over the vocabulary of the negative log probabilities
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        # d loss / d logits = softmax - on_target * onehot - eps_i; the weights of onehot and eps_i sum to 1.
        log_probs = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        index = target[part].unsqueeze(1)
        if mask is not None:
            index = index.masked_fill(~mask[part].unsqueeze(1), 0)  # any valid column: the row is cleared below
        nll[part] = -log_probs.gather(1, index).squeeze(1)
        if eps_i:
            smooth[part] = -log_probs.sum(dim=-1)
        if grad is not None:
            probs = log_probs.exp_()
            if eps_i:
                probs.sub_(eps_i)
            probs.scatter_add_(1, index, probs.new_full(index.shape, -on_target))
            if mask is not None:
                probs.mul_(mask[part].unsqueeze(1))
            grad[part] = probs
    if mask is not None:
        nll, smooth = nll.masked_fill_(~mask, 0.0), smooth.masked_fill_(~mask, 0.0)
    loss = on_target * nll.sum()
    return (loss + eps_i * smooth.sum() if eps_i else loss), nll


def _runs_triton(logits: Tensor) -> bool:
    """Whether the Triton kernel, which keeps no fp32 copy of the logits, can take them."""
    fits = logits.dtype != torch.float64 and logits.stride(1) == 1
    return logits.is_cuda and fits and find_spec("triton") is not None


def _scaled(ctx: Any, grad_loss: Tensor, name: str) -> Tensor | None:
    """The stored gradient times that of the loss; it is handed out once, since it is scaled in place."""
    grad: Tensor | None = getattr(ctx, name, None)
    if grad is None:
        raise RuntimeError("the gradient of this loss was used up by the first backward; compute the loss again")
    setattr(ctx, name, None)
    # A pass over the gradient is spared where it costs nothing to ask.
    if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
        return grad
    return grad.mul_(grad_loss.to(grad.dtype))


def _check(rows: Tensor, target: Tensor, label_smoothing: float) -> None:
    if rows.dim() != 2 or target.shape != rows.shape[:1]:
        raise ValueError(f"need (tokens, columns) and (tokens,), got {tuple(rows.shape)} and {tuple(target.shape)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
