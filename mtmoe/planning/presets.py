"""Shapes of models by name, from fairseq's options, and from a model folder's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mtmoe.errors import ConfigError
from mtmoe.planning.model import SIDES, ModelShape

BASE: dict[str, Any] = {
    "encoder_layers": 6, "decoder_layers": 6, "encoder_embed_dim": 512, "encoder_ffn_embed_dim": 2048,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "moe_freq": 2, "num_experts": 8, "top_k": 2,
    "share_all_embeddings": True, "encoder_normalize_before": True, "decoder_normalize_before": True,
}  # fmt: skip
"""Options of ``mtmoe_transformer`` that the shape depends on; tests compare them with the architectures."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mtmoe_transformer": BASE,
    "mtmoe_transformer_base": BASE,
    "mtmoe_transformer_tiny": BASE | {
        "encoder_layers": 3, "decoder_layers": 2, "encoder_embed_dim": 256, "encoder_ffn_embed_dim": 1024,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    },
    "mtmoe_transformer_big": BASE | {
        "encoder_layers": 12, "decoder_layers": 12, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096,
        "encoder_attention_heads": 16, "decoder_attention_heads": 16, "num_experts": 32,
    },
    "mtmoe_transformer_nllb": BASE | {
        "encoder_layers": 24, "decoder_layers": 24, "encoder_embed_dim": 2048, "encoder_ffn_embed_dim": 8192,
        "encoder_attention_heads": 16, "decoder_attention_heads": 16, "moe_freq": 4, "num_experts": 128,
        "capacity_factor": 1.0, "eom": 0.2,
    },
}  # fmt: skip
"""Name of an architecture -> fairseq's options."""

SWITCH_1_6T = ModelShape(
    name="switch-1.6t", vocabulary_size=32128, d_model=2080, encoder_layers=15, decoder_layers=15, encoder_heads=32,
    decoder_heads=32, encoder_d_ffn=6144, decoder_d_ffn=6144, encoder_expert_d_ffn=6144, decoder_expert_d_ffn=6144,
    encoder_moe_freq=1, decoder_moe_freq=1, num_experts=2048, top_k=1, capacity_factor=1.0,
)  # fmt: skip
"""The shape of Switch-C with 1,571 billion parameters (Fedus et al. 2021): 2,048 experts in each of 15 + 15 layers,
d_model 2080, d_ffn 6144, top-1. Attention here is as wide as d_model; Switch-C's has 32 heads of 64."""

SHAPES = {SWITCH_1_6T.name: SWITCH_1_6T}
"""Shapes that are no architecture of ours."""

VOCABULARY = 32_000
"""Rows of the embedding where nothing tells them."""

SAME_NAME = (
    "encoder_layers", "decoder_layers", "num_experts", "top_k", "gate", "cosine_gate_dim", "cmr", "cmr_d_ffn",
    "capacity_factor", "eom", "share_all_embeddings", "share_decoder_input_output_embed", "layernorm_embedding",
    "max_source_positions", "max_target_positions",
)  # fmt: skip
"""Options of fairseq that are called as fields of `ModelShape`."""


def names() -> list[str]:
    """Everything that `by_name` knows."""
    return [*ARCHITECTURES, *SHAPES]


def by_name(name: str, vocabulary_size: int | None = None) -> ModelShape:
    """The shape of an architecture, or of a model of the literature.

    Raises:
        ConfigError: the name is unknown; the text lists the known ones.
    """
    if name in SHAPES:
        shape = SHAPES[name]
        return replace(shape, vocabulary_size=vocabulary_size or shape.vocabulary_size)
    if name not in ARCHITECTURES:
        raise ConfigError(f"model {name!r} is unknown; choose one of: {', '.join(names())}, or a file or folder")
    return from_options({}, name, vocabulary_size)


def from_options(options: Mapping[str, Any], arch: str, vocabulary_size: int | None = None) -> ModelShape:
    """The shape that options of fairseq-train make.

    Args:
        options: by name, with dashes or underscores, as a preset of `mtmoe train` has them; false counts as not given.
        arch: the architecture whose values stand where no option is given.
        vocabulary_size: rows of the embedding; None takes `VOCABULARY`.

    Raises:
        ConfigError: the architecture is none of ours, or a value makes no sense.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(f"architecture {arch!r} is unknown; choose one of: {', '.join(ARCHITECTURES)}")
    values = ARCHITECTURES[arch] | plain_options(options)
    shape: dict[str, Any] = {key: values[key] for key in SAME_NAME if key in values}
    ffn = values["encoder_ffn_embed_dim"]
    for side, width in (("encoder", ffn), ("decoder", values.get("decoder_ffn_embed_dim", ffn))):
        frequency = values.get(f"{side}_moe_freq", -1)
        shape |= {
            f"{side}_heads": values[f"{side}_attention_heads"],
            f"{side}_d_ffn": width,
            f"{side}_expert_d_ffn": values.get("moe_ffn_embed_dim") or width,
            f"{side}_moe_freq": values["moe_freq"] if frequency < 0 else frequency,
            f"{side}_learned_positions": bool(values.get(f"{side}_learned_pos", False)),
            f"{side}_pre_norm": bool(values[f"{side}_normalize_before"]),
        }
    # fairseq's flag is off unless given; the field's default is on, and counts only beside share_all_embeddings.
    shape.setdefault("share_decoder_input_output_embed", bool(values["share_all_embeddings"]))
    try:
        return ModelShape(
            name=arch, vocabulary_size=vocabulary_size or VOCABULARY, d_model=values["encoder_embed_dim"], **shape
        )
    except TypeError as error:
        raise ConfigError(f"an option of {arch} is of the wrong type: {error}") from error


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of fairseq-train with underscores in their names, those that are not given left out."""
    return {key.replace("-", "_"): value for key, value in options.items() if value is not None and value is not False}


def from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that ``model`` of a ``config.json`` holds: the fields of `mtmoe.checkpoint.TransformerConfig`.

    Raises:
        ConfigError: a field is missing or makes no sense.
    """
    known = {field.name for field in fields(ModelShape)}
    try:
        shape = {key: value for key, value in config.items() if key in known}
        for side in SIDES:
            moe = config[f"{side}_moe"]
            shape[f"{side}_expert_d_ffn"] = (moe or {}).get("d_ffn", config[f"{side}_d_ffn"])
            shape |= {key: value for key, value in (moe or {}).items() if key in known - {"d_model", "name"}}
        return ModelShape(**(shape | {"name": name}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name} holds no model that can be planned: {error}") from error


def from_folder(folder: Path) -> ModelShape:
    """The shape of a model folder, from its ``config.json`` alone.

    Raises:
        ConfigError: the file cannot be read or is of another kind.
    """
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return from_config(document["model"], str(folder))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no config.json of a model folder: {error!r}") from error
