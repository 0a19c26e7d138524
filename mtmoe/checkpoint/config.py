"""The shape of a trained Transformer: what ``config.json`` of a model folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mtmoe.errors import CheckpointError
from mtmoe.moe import MoEConfig
from mtmoe.moe.config import LATER_FIELDS

ACTIVATIONS = ("relu", "gelu")

MOST_LAYERS = 1000
"""More on a side is taken for a damaged file: reading it would only fill memory."""

PRUNED_FIELDS = ("encoder_layer_experts", "decoder_layer_experts")
"""Fields of pruned models only: left out of ``config.json`` where they are None, so that earlier versions read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """An encoder–decoder Transformer whose layers are dense or MoE.

    A model knows its shape: only what pruning adds has a default.
    """

    vocabulary_size: int
    """Rows of the embedding: four special symbols, the pieces, the language tags."""
    d_model: int
    """Width of a token."""
    encoder_layers: int
    """Layers of the encoder."""
    decoder_layers: int
    """Layers of the decoder."""
    encoder_heads: int
    """Attention heads of an encoder layer; they divide d_model."""
    decoder_heads: int
    """Attention heads of a decoder layer; they divide d_model."""
    encoder_d_ffn: int
    """Width inside a dense feed-forward sublayer of the encoder."""
    decoder_d_ffn: int
    """Width inside a dense feed-forward sublayer of the decoder."""
    encoder_pre_norm: bool
    """Layer norm before each sublayer and after the last layer (True) or after each sublayer (False)."""
    decoder_pre_norm: bool
    """As encoder_pre_norm, for the decoder."""
    encoder_learned_positions: bool
    """Positions of the encoder are weights (True) or sinusoids (False)."""
    decoder_learned_positions: bool
    """As encoder_learned_positions, for the decoder."""
    max_source_positions: int
    """Longest source, in tokens with tag and end symbol."""
    max_target_positions: int
    """Longest target, in tokens with the end symbol."""
    activation: str
    """Between the two matrices of a dense feed-forward sublayer: relu or gelu."""
    scale_embedding: bool
    """Multiply embeddings by sqrt(d_model)."""
    layernorm_embedding: bool
    """Layer norm on embedding plus position."""
    share_all_embeddings: bool
    """Encoder, decoder and output use one matrix."""
    share_decoder_input_output_embed: bool
    """Decoder input and output use one matrix; true whenever share_all_embeddings is."""
    encoder_moe_freq: int
    """Encoder layer i (from 0) is MoE iff (i + 1) % encoder_moe_freq == 0; 0 makes all dense."""
    decoder_moe_freq: int
    """As encoder_moe_freq, for the decoder."""
    encoder_moe: MoEConfig | None
    """The MoE layers of the encoder; None iff it has none."""
    decoder_moe: MoEConfig | None
    """The MoE layers of the decoder; None iff it has none."""
    encoder_layer_experts: tuple[int, ...] | None = None
    """Experts of each MoE layer of the encoder, in order, where pruning has left fewer in some; the greatest is
    encoder_moe.num_experts. None: all have encoder_moe.num_experts."""
    decoder_layer_experts: tuple[int, ...] | None = None
    """As encoder_layer_experts, for the decoder."""

    def __post_init__(self) -> None:
        for name in (
            "vocabulary_size",
            "d_model",
            "encoder_layers",
            "decoder_layers",
            "encoder_heads",
            "decoder_heads",
        ):
            self._require_at_least(name, 1)
        for name in ("encoder_d_ffn", "decoder_d_ffn", "max_source_positions", "max_target_positions"):
            self._require_at_least(name, 1)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of: {', '.join(ACTIVATIONS)}")
        if self.share_all_embeddings and not self.share_decoder_input_output_embed:
            raise ValueError("share_all_embeddings shares the output too: set share_decoder_input_output_embed")
        for side in ("encoder", "decoder"):
            self._require_at_least(f"{side}_moe_freq", 0)
            heads, moe = getattr(self, f"{side}_heads"), getattr(self, f"{side}_moe")
            layers = getattr(self, f"{side}_layers")
            if layers > MOST_LAYERS:
                raise ValueError(f"{side}_layers={layers} must be at most {MOST_LAYERS}")
            if self.d_model % heads:
                raise ValueError(f"{side}_heads={heads} must divide d_model={self.d_model}")
            if any(self.is_moe(side, layer) for layer in range(layers)) != (moe is not None):
                raise ValueError(f"{side}_moe must be given exactly when {side}_moe_freq makes a layer of it MoE")
            if moe is not None and moe.d_model != self.d_model:
                raise ValueError(f"{side}_moe.d_model={moe.d_model} must be d_model={self.d_model}")
            self._check_layer_experts(side)

    def is_moe(self, side: str, layer: int) -> bool:
        """Whether a layer has experts.

        Args:
            side: "encoder" or "decoder".
            layer: its number, from 0.
        """
        frequency: int = getattr(self, f"{side}_moe_freq")
        return frequency > 0 and (layer + 1) % frequency == 0

    def moe_layers(self, side: str) -> tuple[int, ...]:
        """Numbers of the layers of a side that have experts, rising."""
        return tuple(layer for layer in range(getattr(self, f"{side}_layers")) if self.is_moe(side, layer))

    def moe_of(self, side: str, layer: int) -> MoEConfig:
        """The configuration of one MoE layer, with its own number of experts.

        Args:
            side: "encoder" or "decoder".
            layer: its number, from 0; it must be MoE.
        """
        moe: MoEConfig | None = getattr(self, f"{side}_moe")
        if moe is None or not self.is_moe(side, layer):
            raise ValueError(f"{side} layer {layer} is dense")
        counts: tuple[int, ...] | None = getattr(self, f"{side}_layer_experts")
        if counts is None:
            return moe
        # Layer i is MoE iff (i + 1) % frequency == 0, so the MoE layers before it are i // frequency.
        return replace(moe, num_experts=counts[layer // getattr(self, f"{side}_moe_freq")])

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values, the MoE layers as dictionaries of their own."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in PRUNED_FIELDS or value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """Rebuild what `to_json` gave, or gave before the fields of MoE layers that came later.

        Raises:
            CheckpointError: a key is missing or unknown, or a value is of the wrong type or out of range.
        """
        plain = _strict(cls, values, "model", optional=PRUNED_FIELDS)
        for name in PRUNED_FIELDS:
            if plain.get(name) is not None:
                plain[name] = _counts(plain[name], f"model.{name}")
        for side in ("encoder_moe", "decoder_moe"):
            if plain[side] is not None:
                given = _strict(MoEConfig, plain[side], f"model.{side}", optional=LATER_FIELDS)
                plain[side] = _build(MoEConfig, given, f"model.{side}")
        config: TransformerConfig = _build(cls, plain, "model")
        return config

    def _check_layer_experts(self, side: str) -> None:
        counts, moe = getattr(self, f"{side}_layer_experts"), getattr(self, f"{side}_moe")
        if counts is None:
            return
        name, layers = f"{side}_layer_experts", len(self.moe_layers(side))
        if moe is None or len(counts) != layers:
            raise ValueError(f"{name} has {len(counts)} numbers, but the {side} has {layers} MoE layers")
        if max(counts) != moe.num_experts:
            raise ValueError(f"{name}={counts}: the greatest must be {side}_moe.num_experts={moe.num_experts}")
        for layer in self.moe_layers(side):
            self.moe_of(side, layer)  # raises where top_k, clusters or ranks do not fit

    def _require_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def _strict(kind: type, values: Any, where: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a dataclass, refused unless names and plain types are its fields'; optional ones may lack."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where} must be an object with the fields of {kind.__name__}, not {values!r}")
    names = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in values and name not in optional]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(
            unknown
        )
        raise CheckpointError(f"{where} {' and '.join(problems)}")
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}
    for field in fields(kind):
        if field.name not in values:
            continue
        value, types = values[field.name], allowed.get(str(field.type))
        # JSON's true is an int in Python; as a size it is a mistake.
        if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise CheckpointError(f"{where}.{field.name} must be of type {field.type}, not {value!r}")
    return dict(values)


def _counts(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not value or not all(type(count) is int for count in value):
        raise CheckpointError(f"{where} must be a list of whole numbers, not {value!r}")
    return tuple(value)


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
