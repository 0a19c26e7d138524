"""fairseq's attention with one fused path for what training does nearly always."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor

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
            and self.q_proj.bias is not None
        )
        if not plain:
            return super().forward(
                query, key, value, key_padding_mask, incremental_state, need_weights, static_kv, attn_mask,
                before_softmax, need_head_weights,
            )  # fmt: skip
        assert key is not None
        length, batch, _ = query.shape
        heads, width = self.num_heads, self.head_dim
        if self.self_attention:
            q = kernels.linear(query, self.q_proj, self.k_proj, self.v_proj).view(length, batch, 3, heads, width)
            kv = None
        else:
            q = kernels.linear(query, self.q_proj).view(length, batch, 1, heads, width)
            kv = kernels.linear(key, self.k_proj, self.v_proj).view(key.shape[0], batch, 2, heads, width)
        dropout = self.dropout_module.p if self.training else 0.0
        attended = kernels.attend(q, kv, attn_mask, key_padding_mask, dropout)
        return kernels.linear(attended.reshape(length, batch, self.embed_dim), self.out_proj), None
