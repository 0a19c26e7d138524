"""Attention over projected queries, keys and values that lie packed in memory, as one matrix product makes them.

On a CPU with the compiled extension a head of a sentence stays in the cache from its scores to its output, backward
computes the weights again, and gradients are written where the product's backward reads them. Elsewhere it is written
out in plain torch: torch's flash kernel has a slow backward on short sentences, and its dropout waits for a serial
generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mtmoe.kernels import extension
from mtmoe.kernels.dropout import draw_seed
from mtmoe.kernels.dropout import dropout as drop

LONGEST = 256
"""Sentences up to this length take the compiled kernel, which multiplies in fp32."""


def attend(q: Tensor, kv: Tensor | None, mask: Tensor | None, padding: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (length, batch, 1 or 3, heads, width): queries alone, or queries, keys and values; gets a gradient.
        kv: (keys, batch, 2, heads, width): keys and values; None takes those of `q`; gets a gradient.
        mask: (length, keys), added to the scores; -inf and all below the type's least value count as that.
        padding: (batch, keys) bool: keys to leave out.
        dropout: rate on the attention weights.

    Returns:
        (length, batch, heads, width).
    """
    if padding is not None:
        padding = padding.bool()
    keys = (q if kv is None else kv).shape[0]
    small = max(q.shape[0], keys) <= LONGEST and q.numel() > 0
    if q.device.type == "cpu" and small and q.dtype in (torch.float32, torch.bfloat16) and extension.available():
        seed = draw_seed() if dropout else 0
        mask = None if mask is None else mask.to(torch.float32).contiguous()
        padding = None if padding is None else padding.contiguous()
        return _Attention.apply(q, kv, mask, padding, dropout, seed)  # type: ignore[no-any-return]
    return _attend(q, kv, mask, padding, dropout)


def _attend(q: Tensor, kv: Tensor | None, mask: Tensor | None, padding: Tensor | None, dropout: float) -> Tensor:
    parts = q.unbind(2) if kv is None else (q.select(2, 0), *kv.unbind(2))
    query, key, value = (part.permute(1, 2, 0, 3) for part in parts)  # (batch, heads, time, width)
    least = torch.finfo(query.dtype).min
    added = None  # (batch or 1, 1, length or 1, keys)
    if padding is not None:
        added = query.new_zeros(*padding.shape).masked_fill_(padding, least)[:, None, None, :]
    if mask is not None:
        causal = mask.to(query.dtype).clamp(min=least)
        added = causal if added is None else (added + causal).clamp(min=least)
    if query.device.type != "cpu":
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=added, dropout_p=dropout)
    else:
        scores = torch.matmul(query * (query.shape[-1] ** -0.5), key.transpose(-2, -1))
        if added is not None:
            scores = scores + added
        attended = torch.matmul(drop(scores.softmax(dim=-1).to(value.dtype), dropout), value)
    return attended.permute(2, 0, 1, 3)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor | None, mask: Tensor | None, padding: Tensor | None, p: float, seed: int
    ) -> Tensor:
        q, kv = q.contiguous(), None if kv is None else kv.contiguous()
        out, lse = torch.ops.mtmoe.attention(*_parts(q, kv), mask, padding, p, seed)
        ctx.save_for_backward(q, kv, mask, padding, lse)
        ctx.p, ctx.seed = p, seed
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, mask, padding, lse = ctx.saved_tensors
        grad_q, grad_kv = torch.empty_like(q), None if kv is None else torch.empty_like(kv)
        torch.ops.mtmoe.attention_backward(
            grad.contiguous(), *_parts(q, kv), lse, mask, padding, ctx.p, ctx.seed, *_parts(grad_q, grad_kv)
        )
        return grad_q, grad_kv, None, None, None, None


def _parts(q: Tensor, kv: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(q.unbind(2)) if kv is None else (q.select(2, 0), *kv.unbind(2))
