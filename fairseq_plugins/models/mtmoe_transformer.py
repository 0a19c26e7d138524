"""The architecture ``mtmoe_transformer`` and its sizes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed import fsdp_wrap
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase, TransformerModelBase
from fairseq.models.transformer.transformer_config import DEFAULT_MAX_SOURCE_POSITIONS, DEFAULT_MAX_TARGET_POSITIONS
from fairseq.models.transformer.transformer_legacy import base_architecture
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from fairseq_plugins.expert_parallel import Step
from fairseq_plugins.models.alignment import align_attention
from fairseq_plugins.models.configuration import MtmoeTransformerConfig, is_moe_layer, moe_freq, set_defaults
from fairseq_plugins.models.layers import (
    DecoderLayer,
    EncoderLayer,
    MoEDecoderLayer,
    MoEEncoderLayer,
    MoESublayer,
    use_quick_dropout,
)
from fairseq_plugins.models.recording import recording


class MoETransformerEncoder(TransformerEncoderBase):
    """fairseq's encoder; each `encoder_moe_freq`-th layer has experts."""

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Embedding, return_fc: bool = False) -> None:
        self._built = 0
        super().__init__(cfg, dictionary, embed_tokens, return_fc)

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        """Make the next layer; called by fairseq's constructor, in order."""
        index = self._built
        self._built += 1
        if is_moe_layer(index, moe_freq(cfg, "encoder")):
            return MoEEncoderLayer(cfg, index)
        return _dense(EncoderLayer(cfg, return_fc=self.return_fc), cfg)


class MoETransformerDecoder(TransformerDecoderBase):
    """fairseq's decoder; each `decoder_moe_freq`-th layer has experts."""

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Embedding, no_encoder_attn: bool = False) -> None:
        self._built = 0
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        """Make the next layer; called by fairseq's constructor, in order."""
        index = self._built
        self._built += 1
        if is_moe_layer(index, moe_freq(cfg, "decoder")):
            return MoEDecoderLayer(cfg, index, no_encoder_attn)
        return _dense(DecoderLayer(cfg, no_encoder_attn), cfg)


def _dense(layer: nn.Module, cfg: Any) -> nn.Module:
    """Wrap a dense layer as fairseq does, for recomputed activations and fully sharded training."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


@register_model("mtmoe_transformer")
class MtmoeTransformerModel(TransformerModelBase):
    """fairseq's Transformer with experts in every `moe_freq`-th layer, on either side.

    All options of fairseq's ``transformer`` work; ``net_output[1]["routing"]`` holds what the MoE layers computed, for
    the criterion.
    """

    def __init__(self, cfg: Any, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__(cfg, encoder, decoder)
        use_quick_dropout(self)
        align_attention(self, cfg)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the options of the architecture; their defaults come from the preset."""
        gen_parser_from_dataclass(parser, MtmoeTransformerConfig(), delete_default=True, with_prefix="")

    @classmethod
    def build_model(cls, args: Namespace, task: Any) -> MtmoeTransformerModel:
        """Make a model; called by fairseq."""
        mtmoe_transformer(args)  # a checkpoint of an older version may lack newer options
        cfg = MtmoeTransformerConfig.from_namespace(args)
        cfg.parallel = getattr(task, "parallel", None)
        model = super().build_model(cfg, task)
        for layer in model.modules():
            if isinstance(layer, MoESublayer):
                layer.seed = getattr(args, "seed", MoESublayer.seed)
        model.set_num_updates(0)
        return model

    def set_step(self, step: Step) -> None:
        """Tell the MoE layers which sentences come next; called by the task before each micro-batch."""
        for layer in self.modules():
            if isinstance(layer, MoESublayer):
                layer.step = step

    @classmethod
    def build_encoder(cls, cfg: Any, src_dict: Any, embed_tokens: nn.Embedding) -> MoETransformerEncoder:
        """Make the encoder; called by fairseq."""
        return MoETransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: Any, tgt_dict: Any, embed_tokens: nn.Embedding) -> MoETransformerDecoder:
        """Make the decoder; called by fairseq."""
        return MoETransformerDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor,
        return_all_hiddens: bool = True,
        features_only: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run encoder and decoder with teacher forcing.

        Args:
            src_tokens: (batch, source length) int64.
            src_lengths: (batch,) int64.
            prev_output_tokens: (batch, target length) int64.
            return_all_hiddens: also return the encoder's hidden states.
            features_only: leave out the projection to the vocabulary.
            alignment_layer: decoder layer whose attention to return; by default the last, and none in training.
            alignment_heads: average only over that many heads.

        Returns:
            (batch, target length, vocabulary or d_model), and a dict whose ``routing`` lists ``(layer, MoEOutput)``.
        """
        if alignment_layer is None and self.training:
            alignment_layer = -1  # attention weights would take the last layer off its fused path
        with recording() as records:
            output, extra = super().forward(
                src_tokens, src_lengths, prev_output_tokens, return_all_hiddens, features_only, alignment_layer,
                alignment_heads,
            )  # fmt: skip
        return output, {**extra, "routing": records}


def _preset(args: Namespace, **values: Any) -> None:
    for name, value in values.items():
        if not hasattr(args, name):
            setattr(args, name, value)


@register_model_architecture("mtmoe_transformer", "mtmoe_transformer")
def mtmoe_transformer(args: Namespace) -> None:
    """The base size: 6 + 6 layers, d_model 512, 8 experts in every second layer, top-2."""
    _preset(
        args,
        encoder_normalize_before=True,
        decoder_normalize_before=True,
        share_all_embeddings=True,
        moe_freq=2,
        max_source_positions=DEFAULT_MAX_SOURCE_POSITIONS,
        max_target_positions=DEFAULT_MAX_TARGET_POSITIONS,
    )
    set_defaults(args)
    base_architecture(args)


@register_model_architecture("mtmoe_transformer", "mtmoe_transformer_base")
def mtmoe_transformer_base(args: Namespace) -> None:
    """Another name of the base size."""
    mtmoe_transformer(args)


@register_model_architecture("mtmoe_transformer", "mtmoe_transformer_tiny")
def mtmoe_transformer_tiny(args: Namespace) -> None:
    """3 + 2 layers, d_model 256: trains in minutes on a CPU."""
    _preset(
        args,
        encoder_layers=3,
        decoder_layers=2,
        encoder_embed_dim=256,
        encoder_ffn_embed_dim=1024,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    mtmoe_transformer(args)


@register_model_architecture("mtmoe_transformer", "mtmoe_transformer_big")
def mtmoe_transformer_big(args: Namespace) -> None:
    """12 + 12 layers, d_model 1024, 32 experts in every second layer, stronger dropout."""
    _preset(
        args,
        encoder_layers=12,
        decoder_layers=12,
        encoder_embed_dim=1024,
        encoder_ffn_embed_dim=4096,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        num_experts=32,
        dropout=0.3,
    )
    mtmoe_transformer(args)


@register_model_architecture("mtmoe_transformer", "mtmoe_transformer_nllb")
def mtmoe_transformer_nllb(args: Namespace) -> None:
    """The shape and the regularisation of NLLB-200's 54B model: 24 + 24 layers, 128 experts in every fourth."""
    _preset(
        args,
        encoder_layers=24,
        decoder_layers=24,
        encoder_embed_dim=2048,
        encoder_ffn_embed_dim=8192,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        moe_freq=4,
        num_experts=128,
        capacity_factor=1.0,
        eval_capacity_token_fraction=1.0,
        dropout=0.3,
        attention_dropout=0.1,
        eom=0.2,
        max_source_positions=512,
        max_target_positions=512,
    )
    mtmoe_transformer(args)
