"""Options of the architecture: fairseq's Transformer, each field of MoEConfig, and where the MoE layers are."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any

from fairseq.dataclass import ChoiceEnum
from fairseq.models.transformer import TransformerConfig

from mtmoe.field_texts import field_texts
from mtmoe.kernels import BACKENDS
from mtmoe.moe.config import MoEConfig

# These fields of MoEConfig come from fairseq's own options of the side that the layer is on.
FROM_FAIRSEQ = ("d_model", "d_ffn", "dropout", "activation", "activation_dropout")


def _placement_fields() -> list[tuple[str, Any, Any]]:
    def option(kind: Any, default: Any, text: str) -> tuple[Any, Any]:
        return kind, field(default=default, metadata={"help": text})

    options = {
        "moe_freq": option(int, 0, "every how many layers the feed-forward network is a MoE layer (2: layers 1, 3, 5 "
                           "counted from 0); 0 makes the model dense"),
        "encoder_moe_freq": option(int, -1, "moe_freq of the encoder; -1 takes moe_freq"),
        "decoder_moe_freq": option(int, -1, "moe_freq of the decoder; -1 takes moe_freq"),
        "moe_ffn_embed_dim": option(int, 0, "width inside an expert; 0 takes the side's ffn_embed_dim"),
        "moe_dropout": option(float, -1.0, "dropout inside MoE layers, on expert outputs; -1 takes dropout"),
        "moe_kernel": option(ChoiceEnum(["auto", *BACKENDS]), "auto", "implementation of the experts; auto takes cpu "
                             "or triton by device, reference is plain torch for any"),
        "attention_init": option(str, "drawn", "drawn: as fairseq draws it; aligned: attention starts at positions "
                                 "near its own, and the decoder's passes on the source words that it sees"),
    }  # fmt: skip
    return [(name, kind, made) for name, (kind, made) in options.items()]


def _moe_fields() -> list[tuple[str, Any, Any]]:
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    texts = field_texts(MoEConfig)
    return [
        (item.name, kinds[str(item.type)], field(default=item.default, metadata={"help": texts[item.name]}))
        for item in fields(MoEConfig)
        if item.name not in FROM_FAIRSEQ
    ]


MtmoeTransformerConfig: Any = make_dataclass(
    "MtmoeTransformerConfig",
    _placement_fields() + _moe_fields(),
    bases=(TransformerConfig,),
    namespace={"__doc__": "fairseq's TransformerConfig with the MoE options, whose defaults are those of MoEConfig."},
)


def set_defaults(args: Namespace) -> None:
    """Give every MoE option that neither the user nor a preset has set its default."""
    for item in fields(MtmoeTransformerConfig):
        if item.name not in {base.name for base in fields(TransformerConfig)} and not hasattr(args, item.name):
            assert item.default is not MISSING
            setattr(args, item.name, item.default)


def is_moe_layer(index: int, freq: int) -> bool:
    """Whether layer `index` (from 0) is a MoE layer: each freq-th is, none if `freq` is 0."""
    return freq > 0 and (index + 1) % freq == 0


def moe_freq(cfg: Any, side: str) -> int:
    """The frequency of MoE layers on a side, ``encoder`` or ``decoder``."""
    # fairseq's TransformerConfig sends what is set as encoder_x to its part encoder as x.
    own = getattr(cfg, side).moe_freq
    return int(cfg.moe_freq if own < 0 else own)


def moe_config(cfg: Any, side: str) -> MoEConfig:
    """The one place where fairseq's options become ours; a missing one is an error, not a default.

    Args:
        cfg: a MtmoeTransformerConfig.
        side: ``encoder`` or ``decoder``.
    """
    own = {item.name: getattr(cfg, item.name) for item in fields(MoEConfig) if item.name not in FROM_FAIRSEQ}
    dimensions = getattr(cfg, side)
    return MoEConfig(
        d_model=dimensions.embed_dim,
        d_ffn=cfg.moe_ffn_embed_dim or dimensions.ffn_embed_dim,
        dropout=cfg.dropout if cfg.moe_dropout < 0 else cfg.moe_dropout,
        activation=str(cfg.activation_fn),
        activation_dropout=float(cfg.activation_dropout or cfg.relu_dropout or 0.0),
        **own,
    )
