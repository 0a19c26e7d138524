"""fairseq's attention with one fused path for what training does nearly always."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor
from torch.nn import functional as F

from mtmoe import kernels


class FusedAttention(MultiheadAttention):
    """fairseq's MultiheadAttention: same parameters, same results, less work on whole sequences.

    Incremental decoding, attention weights, added key biases and quantisation noise take fairseq's own path.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See fairseq's MultiheadAttention.forward: (time, batch, d_model) in and out."""
        plain = (
            incremental_state is None
            and key is not None
            and not (need_weights or need_head_weights or before_softmax)
            and self.bias_k is None
            and not (self.add_zero_attn or self.use_xformers or self.skip_embed_dim_check or self.onnx_trace)
            and type(self.q_proj) is torch.nn.Linear
        )
        if not plain:
            return super().forward(
                query, key, value, key_padding_mask, incremental_state, need_weights, static_kv, attn_mask,
                before_softmax, need_head_weights,
            )  # fmt: skip
        assert key is not None
        length, batch, _ = query.shape
        keys = key.shape[0]
        heads, width = self.num_heads, self.head_dim
        if self.self_attention:
            weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
            bias = torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias))
            q, k, v = F.linear(query, weight, bias).view(length, batch, 3, heads, width).unbind(2)
        else:
            q = self.q_proj(query).view(length, batch, heads, width)
            weight = torch.cat((self.k_proj.weight, self.v_proj.weight))
            bias = torch.cat((self.k_proj.bias, self.v_proj.bias))
            k, v = F.linear(key, weight, bias).view(keys, batch, 2, heads, width).unbind(2)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))  # (batch, heads, time, width)

        mask = None  # (batch or 1, 1, length or 1, keys), added to the scores
        if key_padding_mask is not None:
            mask = torch.zeros(batch, 1, 1, keys, dtype=q.dtype, device=q.device)
            mask.masked_fill_(key_padding_mask[:, None, None, :].bool(), torch.finfo(q.dtype).min)
        if attn_mask is not None:
            causal = attn_mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
            mask = causal if mask is None else torch.maximum(mask + causal, causal.new_tensor(torch.finfo(q.dtype).min))
        attended = attend(q, k, v, mask, self.dropout_module.p if self.training else 0.0)
        attended = attended.permute(2, 0, 1, 3).reshape(length, batch, self.embed_dim)
        return self.out_proj(attended), None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: (batch, heads, length, width).
        k: (batch, heads, keys, width).
        v: (batch, heads, keys, width).
        mask: broadcasts to (batch, heads, length, keys), added to the scores.
        dropout: rate on the attention weights.

    Returns:
        (batch, heads, length, width).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # Written out on a CPU: the flash kernel's backward is slow on short sentences, and its dropout waits for
    # torch's serial generator.
    scores = torch.matmul(q * (q.shape[-1] ** -0.5), k.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    weights = kernels.dropout(scores.softmax(dim=-1).to(v.dtype), dropout)
    return torch.matmul(weights, v)
