"""Transformer layers: fairseq's, with fused attention, quick dropout, and a MoE layer where the config wants one."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq_plugins.expert_parallel import Step
from fairseq_plugins.models.attention import FusedAttention
from fairseq_plugins.models.configuration import moe_config
from fairseq_plugins.models.recording import record
from mtmoe import kernels
from mtmoe.errors import ConfigError
from mtmoe.kernels.linear import autocast_dtype
from mtmoe.moe import MoELayer
from mtmoe.moe.clusters import surviving_experts


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


class Sublayers(nn.Module):
    """The sublayers of a layer in the order of its norms: what dense and MoE layers, encoder and decoder share."""

    normalize_before: bool
    dropout_module: FairseqDropout
    final_layer_norm: nn.LayerNorm

    def start(self, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The residual and the input of the first sublayer."""
        return kernels.residual_norm(x, None, norm, dtype=autocast_dtype(x)) if self.normalize_before else (x, x)

    def proceed(
        self, x: Tensor, branch: Tensor, norm: nn.LayerNorm, following: nn.LayerNorm, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Close a sublayer: the residual and the input of the next one.

        Args:
            x: (time, batch, d_model) residual.
            branch: what the sublayer made.
            norm: of the sublayer.
            following: of the next sublayer.
            dtype: of the next sublayer's input.
        """
        p = self.dropout_module.p if self.drops() else 0.0
        if self.normalize_before:
            return kernels.residual_norm(x, branch, following, p, dtype)
        x = kernels.residual_norm(x, branch, norm, p)[1]
        return x, x

    def drops(self) -> bool:
        """Whether dropout is on: in training, or where fairseq asks for it during inference."""
        return self.dropout_module.training or self.dropout_module.apply_during_inference

    def feed_forward_dtype(self, x: Tensor) -> torch.dtype | None:
        """The type that `feed_forward` reads."""
        return autocast_dtype(x)

    def feed_forward(self, x: Tensor, normed: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The dense feed-forward sublayer.

        Args:
            x: (time, batch, d_model) residual.
            normed: (time, batch, d_model) input.
            padding_mask: (batch, time) bool or None.
        """
        plain = (
            getattr(self.activation_fn, "__name__", "") == "relu"
            and type(self.fc1) is type(self.fc2) is nn.Linear
            and not (self.activation_dropout_module.p and self.training)
        )
        if plain:
            branch = kernels.feed_forward(normed, self.fc1, self.fc2)
        else:
            branch = self.fc2(self.activation_dropout_module(self.activation_fn(self.fc1(normed))))
        return self.close(x, branch, self.dropout_module.p if self.drops() else 0.0)

    def close(self, x: Tensor, branch: Tensor, p: float) -> Tensor:
        """Close the last sublayer of the layer."""
        if self.normalize_before:
            return kernels.residual_add(x, branch, p)
        return kernels.residual_norm(x, branch, self.final_layer_norm, p)[1]


class EncoderLayer(Sublayers, TransformerEncoderLayerBase):
    """fairseq's encoder layer with fused sublayers."""

    def build_self_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        """Make the attention; called by fairseq's constructor."""
        return _fused(super().build_self_attention(embed_dim, cfg))

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None) -> Any:
        """See fairseq's TransformerEncoderLayerBase.forward: (time, batch, d_model) in and out."""
        if self.return_fc:
            return super().forward(x, encoder_padding_mask, attn_mask)
        return self.sublayers(x, encoder_padding_mask, attn_mask)

    def sublayers(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """The layer without what surrounds it."""
        if attn_mask is not None:
            # Not -inf: a row that is masked whole would become NaN.
            attn_mask = attn_mask.masked_fill(attn_mask.to(torch.bool), -1e8 if x.dtype == torch.float32 else -1e4)
        x, normed = self.start(x, self.self_attn_layer_norm)
        branch, _ = self.self_attn(
            query=normed, key=normed, value=normed, key_padding_mask=encoder_padding_mask, need_weights=False,
            attn_mask=attn_mask,
        )  # fmt: skip
        x, normed = self.proceed(
            x, branch, self.self_attn_layer_norm, self.final_layer_norm, self.feed_forward_dtype(x)
        )
        return self.feed_forward(x, normed, encoder_padding_mask)


class DecoderLayer(Sublayers, TransformerDecoderLayerBase):
    """fairseq's decoder layer with fused sublayers."""

    def build_self_attention(self, embed_dim: int, cfg: Any, **options: Any) -> nn.Module:
        """Make the self-attention; called by fairseq's constructor."""
        return _fused(super().build_self_attention(embed_dim, cfg, **options))

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        """Make the attention over the encoder's output; called by fairseq's constructor."""
        return _fused(super().build_encoder_attention(embed_dim, cfg))

    def plain(self, prev_self_attn_state: Any, prev_attn_state: Any) -> bool:
        """Whether fairseq's options and arguments ask for nothing that `sublayers` leaves out."""
        return (
            prev_self_attn_state is None
            and prev_attn_state is None
            and not self.cross_self_attention
            and not self.onnx_trace
            and self.c_attn is None
            and self.attn_ln is None
            and self.ffn_layernorm is None
            and self.w_resid is None
        )

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
        if not self.plain(prev_self_attn_state, prev_attn_state):
            return super().forward(  # type: ignore[no-any-return]
                x, encoder_out, encoder_padding_mask, incremental_state, prev_self_attn_state, prev_attn_state,
                self_attn_mask, self_attn_padding_mask, need_attn, need_head_weights,
            )  # fmt: skip
        return self.sublayers(
            x, encoder_out, encoder_padding_mask, incremental_state, self_attn_mask, self_attn_padding_mask,
            need_attn, need_head_weights,
        )  # fmt: skip

    def sublayers(
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
        """The layer without what surrounds it."""
        across = self.encoder_attn is not None and encoder_out is not None
        x, normed = self.start(x, self.self_attn_layer_norm)
        branch, attention = self.self_attn(
            query=normed, key=normed, value=normed, key_padding_mask=self_attn_padding_mask,
            incremental_state=incremental_state, need_weights=False, attn_mask=self_attn_mask,
        )  # fmt: skip
        following = self.encoder_attn_layer_norm if across else self.final_layer_norm
        dtype = autocast_dtype(x) if across else self.feed_forward_dtype(x)
        x, normed = self.proceed(x, branch, self.self_attn_layer_norm, following, dtype)
        if across:
            branch, attention = self.encoder_attn(
                query=normed,
                key=encoder_out,
                value=encoder_out,
                key_padding_mask=encoder_padding_mask,
                incremental_state=incremental_state,
                static_kv=True,
                need_weights=need_attn or need_head_weights or (not self.training and self.need_attn),
                need_head_weights=need_head_weights,
            )
            x, normed = self.proceed(
                x, branch, self.encoder_attn_layer_norm, self.final_layer_norm, self.feed_forward_dtype(x)
            )
        return self.feed_forward(x, normed, self_attn_padding_mask), attention, None


class MoESublayer(nn.Module):
    """What both kinds of MoE layer share: `MoELayer` as the feed-forward sublayer, recorded under the layer's name."""

    moe: MoELayer
    layer_name: str
    seed = 1
    """Of the run, for what is drawn by update; fairseq's default until the model is built."""
    survivors: Tensor | None
    step: Step | None = None
    """Of the micro-batch in hand, also while its activations are recomputed; None leaves draws to torch."""

    def replace_feed_forward(self, cfg: Any, side: str, index: int) -> None:
        """Put a MoE layer in the place of the two linear maps that fairseq's constructor made."""
        if getattr(cfg.quant_noise, "pq", 0) > 0:
            raise ConfigError(f"quant_noise_pq={cfg.quant_noise.pq} does not reach MoE layers; set it to 0")
        del self.fc1, self.fc2
        backend = None if cfg.moe_kernel == "auto" else cfg.moe_kernel
        self.moe = MoELayer(moe_config(cfg, side), backend, getattr(cfg, "parallel", None))
        self.layer_name = f"{side}.{index}"
        self.layer_number = 2 * index + (side == "decoder")
        self.recompute = bool(cfg.checkpoint_activations)
        self.set_num_updates(0)

    def set_num_updates(self, num_updates: int) -> None:
        """Choose the experts that take part in the next update; called by fairseq before each."""
        self.survivors = surviving_experts(self.moe.config, self.seed, num_updates, self.layer_number)

    def feed_forward_dtype(self, x: Tensor) -> torch.dtype | None:
        """The gate reads what the norm makes, in its own type."""
        return None

    def feed_forward(self, x: Tensor, normed: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The MoE sublayer; see `Sublayers.feed_forward`."""
        mask, keys = None if padding_mask is None else padding_mask.t(), None
        if self.step is not None and self.training:
            mask, keys = self.step.padding(mask, len(normed)), self.step.keys(self.layer_number, len(normed))
        output = self.moe(normed, mask, self.survivors, keys)
        record(self.layer_name, output)
        return self.close(x, output.y, 0.0)


class MoEEncoderLayer(MoESublayer, EncoderLayer):
    """An encoder layer whose feed-forward network is a MoE layer."""

    def __init__(self, cfg: Any, index: int) -> None:
        super().__init__(cfg)
        self.replace_feed_forward(cfg, "encoder", index)

    def forward(self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        """See fairseq's TransformerEncoderLayerBase.forward: (time, batch, d_model) in and out."""
        if self.recompute and self.training:
            return _recomputed(self.sublayers, x, encoder_padding_mask, attn_mask)
        return self.sublayers(x, encoder_padding_mask, attn_mask)


class MoEDecoderLayer(MoESublayer, DecoderLayer):
    """A decoder layer whose feed-forward network is a MoE layer."""

    def __init__(self, cfg: Any, index: int, no_encoder_attn: bool = False) -> None:
        if cfg.cross_self_attention:
            raise ConfigError("cross_self_attention does not work with experts in the decoder; set decoder_moe_freq=0")
        super().__init__(cfg, no_encoder_attn)
        self.replace_feed_forward(cfg, "decoder", index)

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
            return _recomputed(self.sublayers, *arguments)
        return self.sublayers(*arguments)


def _recomputed(function: Any, *arguments: Any) -> Any:
    # Not fairseq's checkpoint_wrapper: it runs the forward pass without a graph, which would cut off routing losses.
    return checkpoint(function, *arguments, use_reentrant=False)
