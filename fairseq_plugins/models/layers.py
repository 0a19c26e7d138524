"""Transformer layers: fairseq's, with fused attention, quick dropout, and a MoE layer where the config wants one."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq_plugins.models.attention import FusedAttention
from fairseq_plugins.models.configuration import moe_config
from fairseq_plugins.models.recording import record
from mtmoe import kernels
from mtmoe.errors import ConfigError
from mtmoe.moe import MoELayer


class QuickDropout(FairseqDropout):
    """fairseq's dropout module over `mtmoe.kernels.dropout`."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Drop elements in training, or when fairseq asks for it during inference; never in place."""
        return kernels.dropout(x, self.p, self.training or self.apply_during_inference)


def use_quick_dropout(model: nn.Module) -> None:
    """Replace each of fairseq's dropout modules in a model; they hold no parameters."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is FairseqDropout:
                setattr(module, name, QuickDropout(child.p, child.module_name))


def _fused(attention: nn.Module) -> nn.Module:
    # The class adds no state, so fairseq's constructor, with all its options, stays the only one.
    attention.__class__ = FusedAttention
    return attention


class EncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer with fused attention."""

    def build_self_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        """Make the attention; called by fairseq's constructor."""
        return _fused(super().build_self_attention(embed_dim, cfg))


class DecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer with fused attention."""

    def build_self_attention(self, embed_dim: int, cfg: Any, **options: Any) -> nn.Module:
        """Make the self-attention; called by fairseq's constructor."""
        return _fused(super().build_self_attention(embed_dim, cfg, **options))

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        """Make the attention over the encoder's output; called by fairseq's constructor."""
        return _fused(super().build_encoder_attention(embed_dim, cfg))


class MoESublayer(nn.Module):
    """What both kinds of MoE layer share: the residual sublayer around `MoELayer`, recorded under the layer's name."""

    moe: MoELayer
    final_layer_norm: nn.Module
    normalize_before: bool
    layer_name: str

    def replace_feed_forward(self, cfg: Any, side: str, index: int) -> None:
        """Put a MoE layer in the place of the two linear maps that fairseq's constructor made."""
        if getattr(cfg.quant_noise, "pq", 0) > 0:
            raise ConfigError(f"quant_noise_pq={cfg.quant_noise.pq} does not reach MoE layers; set it to 0")
        del self.fc1, self.fc2
        self.moe = MoELayer(moe_config(cfg, side), backend=None if cfg.moe_kernel == "auto" else cfg.moe_kernel)
        self.layer_name = f"{side}.{index}"

    def feed_forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The sublayer with norm and residual: x (time, batch, d_model), padding_mask (batch, time)."""
        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        output = self.moe(x, None if padding_mask is None else padding_mask.t())
        record(self.layer_name, output)
        x = residual + output.y
        return x if self.normalize_before else self.final_layer_norm(x)


class MoEEncoderLayer(EncoderLayer, MoESublayer):
    """An encoder layer whose feed-forward network is a MoE layer."""

    def __init__(self, cfg: Any, index: int) -> None:
        super().__init__(cfg)
        self.replace_feed_forward(cfg, "encoder", index)
        self.recompute = bool(cfg.checkpoint_activations)

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """See fairseq's TransformerEncoderLayerBase.forward: (time, batch, d_model) in and out."""
        if self.recompute and self.training:
            return _recomputed(self._forward, x, encoder_padding_mask, attn_mask)
        return self._forward(x, encoder_padding_mask, attn_mask)

    def _forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        if attn_mask is not None:
            # Not -inf: a row that is masked whole would become NaN.
            attn_mask = attn_mask.masked_fill(attn_mask.to(torch.bool), -1e8 if x.dtype == torch.float32 else -1e4)
        x, _ = self.self_attn(
            query=x, key=x, value=x, key_padding_mask=encoder_padding_mask, need_weights=False, attn_mask=attn_mask
        )
        x = residual + self.dropout_module(x)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)
        return self.feed_forward(x, encoder_padding_mask)


class MoEDecoderLayer(DecoderLayer, MoESublayer):
    """A decoder layer whose feed-forward network is a MoE layer."""

    def __init__(self, cfg: Any, index: int, no_encoder_attn: bool = False) -> None:
        if cfg.cross_self_attention:
            raise ConfigError("cross_self_attention does not work with experts in the decoder; set decoder_moe_freq=0")
        super().__init__(cfg, no_encoder_attn)
        self.replace_feed_forward(cfg, "decoder", index)
        self.recompute = bool(cfg.checkpoint_activations)

    def forward(
        self,
        x: Tensor,
        encoder_out: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        prev_self_attn_state: list[Tensor] | None = None,
        prev_attn_state: list[Tensor] | None = None,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_attn: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, None]:
        """See fairseq's TransformerDecoderLayerBase.forward: (time, batch, d_model) in and out."""
        if prev_self_attn_state is not None or prev_attn_state is not None:
            raise ConfigError("MoE layers take their decoding state from incremental_state only")
        arguments = (
            x, encoder_out, encoder_padding_mask, incremental_state, self_attn_mask, self_attn_padding_mask,
            need_attn, need_head_weights,
        )  # fmt: skip
        if self.recompute and self.training and incremental_state is None:
            return _recomputed(self._forward, *arguments)
        return self._forward(*arguments)

    def _forward(
        self,
        x: Tensor,
        encoder_out: Tensor | None,
        encoder_padding_mask: Tensor | None,
        incremental_state: Any,
        self_attn_mask: Tensor | None,
        self_attn_padding_mask: Tensor | None,
        need_attn: bool,
        need_head_weights: bool,
    ) -> tuple[Tensor, Tensor | None, None]:
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, attention = self.self_attn(
            query=x,
            key=x,
            value=x,
            key_padding_mask=self_attn_padding_mask,
            incremental_state=incremental_state,
            need_weights=False,
            attn_mask=self_attn_mask,
        )
        x = residual + self.dropout_module(x)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)

        if self.encoder_attn is not None and encoder_out is not None:
            residual = x
            if self.normalize_before:
                x = self.encoder_attn_layer_norm(x)
            x, attention = self.encoder_attn(
                query=x,
                key=encoder_out,
                value=encoder_out,
                key_padding_mask=encoder_padding_mask,
                incremental_state=incremental_state,
                static_kv=True,
                need_weights=need_attn or need_head_weights or (not self.training and self.need_attn),
                need_head_weights=need_head_weights,
            )
            x = residual + self.dropout_module(x)
            if not self.normalize_before:
                x = self.encoder_attn_layer_norm(x)
        return self.feed_forward(x, self_attn_padding_mask), attention, None


def _recomputed(function: Any, *arguments: Any) -> Any:
    # Not fairseq's checkpoint_wrapper: it runs the forward pass without a graph, which would cut off routing losses.
    return checkpoint(function, *arguments, use_reentrant=False)
