"""A trained model in memory, as any format on disk gives it: shape, weights, vocabulary and languages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtmoe import __version__
from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.tensors import dtype_of, shape_of
from mtmoe.errors import CheckpointError
from mtmoe.moe import MoELayer

LANGUAGE_TAG_SIDES = ("src", "tgt")
DECODER_STARTS = ("tag", "eos_tag")


@dataclass(frozen=True, slots=True)
class LanguageSet:
    """What a model translates."""

    languages: tuple[str, ...]
    """Codes, sorted; each has a tag in the vocabulary."""
    directions: tuple[str, ...]
    """Trained or evaluated directions, as "en-de"."""
    encoder_langtok: str
    """Whose tag stands before the source: "src" or "tgt"."""
    decoder_start: str = "tag"
    """What the decoder begins with: "tag", the target's, as in mtmoe's training; "eos_tag", the end symbol and then the
    target's tag, as in NLLB and M2M-100."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Code -> its tag in the dictionary, where that is not ``__code__``."""

    def __post_init__(self) -> None:
        if not self.languages:
            raise ValueError("a model needs at least one language")
        if self.encoder_langtok not in LANGUAGE_TAG_SIDES:
            raise ValueError(
                f"encoder_langtok={self.encoder_langtok!r} must be one of: {', '.join(LANGUAGE_TAG_SIDES)}"
            )
        if self.decoder_start not in DECODER_STARTS:
            raise ValueError(f"decoder_start={self.decoder_start!r} must be one of: {', '.join(DECODER_STARTS)}")
        strangers = sorted(self.tags.keys() - set(self.languages))
        if strangers:
            raise ValueError(f"tags names {', '.join(strangers)}, not among: {', '.join(self.languages)}")
        known = set(self.languages)
        for direction in self.directions:
            if not known.issuperset(direction.split("-")) or direction.count("-") != 1:
                raise ValueError(f"direction {direction!r} must join two of: {', '.join(self.languages)}")

    def tag(self, language: str) -> str:
        """The piece that stands for a language."""
        return self.tags.get(language, f"__{language}__")

    @classmethod
    def from_json(cls, values: Any, *, encoder_langtok: str | None = None, where: Path) -> LanguageSet:
        """Read the content of a ``languages.json``.

        Args:
            values: the parsed file.
            encoder_langtok: for a file of prepared data, which does not tell it.
            where: the file, for errors.

        Raises:
            CheckpointError: something is missing or of the wrong type.
        """
        try:
            languages, directions = values["languages"], values["directions"]
            side = values["encoder_langtok"] if encoder_langtok is None else encoder_langtok
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{where} lacks {error}" if isinstance(error, KeyError) else f"{where}: {error}"
            ) from None
        for name, value in (("languages", languages), ("directions", directions)):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise CheckpointError(f"{where}: {name} must be a list of strings, not {value!r}")
        start, tags = values.get("decoder_start", "tag"), values.get("tags", {})
        if not isinstance(tags, dict) or not all(isinstance(item, str) for item in tags.values()):
            raise CheckpointError(f"{where}: tags must be an object of strings, not {tags!r}")
        try:
            return cls(tuple(languages), tuple(directions), side, start, tags)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """What a model folder's ``languages.json`` holds."""
        return {
            "languages": list(self.languages),
            "directions": list(self.directions),
            "encoder_langtok": self.encoder_langtok,
            "decoder_start": self.decoder_start,
            **({"tags": dict(self.tags)} if self.tags else {}),
        }


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Everything that translation needs, independent of the format it was read from."""

    config: TransformerConfig
    tensors: Mapping[str, Tensor]
    """fairseq's names; tied copies and buffers are left out, see `expected_shapes`. May be a
    `mtmoe.checkpoint.tensors.LazyTensors`, which reads or computes a weight when it is asked for."""
    dictionary: Path
    """dict.txt: a piece and its count in each line, in the order of the embedding's rows."""
    sentencepiece: Path
    """spm.model."""
    languages: LanguageSet
    history: tuple[Mapping[str, Any], ...] = ()
    """What was done to the model, oldest first: each has ``operation`` and what else tells about it."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What it was trained on, as far as known: recipe, source, licence, attribution, fingerprint, train_pairs."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """How it translates: ``mean_chrf++``, ``mean_bleu``, and both under ``directions`` for each; see
    `mtmoe.checkpoint.card.read_figures`."""

    def after(self, operation: str, **details: Any) -> StoredModel:
        """The model with one more line of history, and without figures: they were measured before.

        Args:
            operation: what has been done, as "averaged" or "pruned".
            details: plain values that tell how.
        """
        entry = {"operation": operation, **details, "mtmoe": __version__}
        return replace(self, history=(*self.history, entry), figures={})


def read_json(path: Path) -> Any:
    """Parse a JSON file of a model.

    Raises:
        CheckpointError: it is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def check_tensors(config: TransformerConfig, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse weights that do not fit the shape of the model.

    Raises:
        CheckpointError: names every weight that is missing or too many, or the first of a wrong shape or type.
    """
    expected = expected_shapes(config)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise CheckpointError(f"{where} {' and '.join(parts)}")
    for name, shape in expected.items():
        found, dtype = shape_of(tensors, name), dtype_of(tensors, name)
        if found != shape:
            raise CheckpointError(f"{where}: {name} has shape {found}, the configuration says {shape}")
        if not dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name} must hold floating-point numbers, not {dtype}")


def expected_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The weights that a model of this shape has, by fairseq's names.

    A matrix that is shared is listed once, at its first place: encoder, then decoder input, then output.
    """
    d_model = config.d_model
    shapes: dict[str, tuple[int, ...]] = {"encoder.embed_tokens.weight": (config.vocabulary_size, d_model)}
    if not config.share_all_embeddings:
        shapes["decoder.embed_tokens.weight"] = (config.vocabulary_size, d_model)
    if not config.share_decoder_input_output_embed:
        shapes["decoder.output_projection.weight"] = (config.vocabulary_size, d_model)
    for side, positions in (("encoder", config.max_source_positions), ("decoder", config.max_target_positions)):
        if getattr(config, f"{side}_learned_positions"):
            # fairseq numbers positions from padding_idx + 1 = 2.
            shapes[f"{side}.embed_positions.weight"] = (positions + 2, d_model)
        norms = ["layernorm_embedding"] * config.layernorm_embedding
        norms += ["layer_norm"] * getattr(config, f"{side}_pre_norm")
        shapes |= {f"{side}.{norm}.{part}": (d_model,) for norm in norms for part in ("weight", "bias")}
        for layer in range(getattr(config, f"{side}_layers")):
            prefix = f"{side}.layers.{layer}"
            shapes |= {f"{prefix}.{name}": shape for name, shape in _layer_shapes(config, side, layer).items()}
    return shapes


def _layer_shapes(config: TransformerConfig, side: str, layer: int) -> dict[str, tuple[int, ...]]:
    d_model = config.d_model
    attentions = ["self_attn"] + ["encoder_attn"] * (side == "decoder")
    shapes: dict[str, tuple[int, ...]] = {}
    for attention in attentions:
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{attention}.{projection}", d_model, d_model)
    for norm in [f"{attention}_layer_norm" for attention in attentions] + ["final_layer_norm"]:
        shapes |= {f"{norm}.weight": (d_model,), f"{norm}.bias": (d_model,)}
    if not config.is_moe(side, layer):
        d_ffn = getattr(config, f"{side}_d_ffn")
        return shapes | _linear("fc1", d_ffn, d_model) | _linear("fc2", d_model, d_ffn)
    # Asked of the layer itself, without memory, so that a new gate's parameters are known here from the start.
    with torch.device("meta"):
        moe = MoELayer(config.moe_of(side, layer))
    return shapes | {f"moe.{name}": tuple(tensor.shape) for name, tensor in moe.state_dict().items()}


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
