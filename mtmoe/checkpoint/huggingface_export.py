"""Write a model as Hugging Face's NllbMoe or, if it is dense, M2M100 of transformers 4.57."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.folder import PART_BYTES, put_in_place, write_parts
from mtmoe.checkpoint.huggingface import (
    DENSE,
    LANGUAGES_KEY,
    MOE,
    SENTENCEPIECE,
    SPECIAL_IDS,
    expert_name,
    is_huggingface,
    their_name,
    transformer_config,
)
from mtmoe.checkpoint.huggingface_tokens import SPECIALS, tokenizer_files
from mtmoe.checkpoint.stored import StoredModel, check_tensors, expected_shapes
from mtmoe.checkpoint.tensors import ComputedTensors, Recipe, dtype_of, dtypes_of, rows_of, shape_of
from mtmoe.errors import CheckpointError
from mtmoe.files import write_json
from mtmoe.moe import MoEConfig

OF_BOTH_SIDES = (
    "num_experts", "gate_bias", "normalize_weights", "eval_capacity", "eval_capacity_token_fraction", "eom",
    "batch_prioritized", "second_expert_policy",
)  # fmt: skip
"""Fields of MoEConfig that NllbMoe has once for encoder and decoder."""

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def write_huggingface(path: Path, model: StoredModel, *, part_bytes: int = PART_BYTES) -> bool:
    """Write a folder that `AutoModelForSeq2SeqLM.from_pretrained` reads; whole or not at all.

    Args:
        path: the folder to make or replace.
        model: what to write.
        part_bytes: most bytes of a file of weights.

    Returns:
        Whether a tokeniser was written too: NllbTokenizer where the dictionary is SentencePiece's own order with the
        tags behind it, M2M100Tokenizer for M2M-100's vocabulary, none otherwise.

    Raises:
        CheckpointError: the model has something that these classes lack (the text lists all of it), or `path` is
            something else.
    """
    if path.exists() and not (path.is_dir() and (is_huggingface(path) or not any(path.iterdir()))):
        raise CheckpointError(f"{path} exists and is no Hugging Face model; it is left as it is. Choose another name")
    check_tensors(model.config, model.tensors, path)
    lacking = list(_unsupported(model.config))
    if lacking:
        raise CheckpointError(f"{path}: Hugging Face's NllbMoe and M2M100 have no {'; no '.join(lacking)}")
    values = huggingface_config(model)
    if expected_shapes(transformer_config(values, path)) != expected_shapes(model.config):
        raise CheckpointError(f"{path}: Hugging Face's NllbMoe has as many experts in each layer, this model has not")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    try:
        write_json(staging / "config.json", values)
        write_json(staging / "generation_config.json", {**SPECIAL_IDS, "max_length": 200})
        tensors = _their_tensors(model, values["model_type"] == MOE)
        write_parts(staging, tensors, list(tensors), part_bytes)
        shutil.copyfile(model.sentencepiece, staging / SENTENCEPIECE)
        tokenizer = _tokenizer_files(model)
        for name, content in tokenizer.items():
            write_json(staging / name, content)
        put_in_place(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return bool(tokenizer)


def huggingface_config(model: StoredModel) -> dict[str, Any]:
    """The content of config.json."""
    config = model.config
    layers = [moe for moe in (config.encoder_moe, config.decoder_moe) if moe is not None]
    dtype = next(iter(dtypes_of(model.tensors)))
    values: dict[str, Any] = {
        "architectures": ["NllbMoeForConditionalGeneration" if layers else "M2M100ForConditionalGeneration"],
        "model_type": MOE if layers else DENSE,
        "dtype": TORCH_NAMES.get(dtype, dtype),
        "vocab_size": config.vocabulary_size,
        "d_model": config.d_model,
        "max_position_embeddings": min(config.max_source_positions, config.max_target_positions),
        "activation_function": config.activation,
        "scale_embedding": config.scale_embedding,
        "tie_word_embeddings": config.share_all_embeddings,
        "is_encoder_decoder": True,
        **SPECIAL_IDS,
    }
    for side in ("encoder", "decoder"):
        values |= {
            f"{side}_layers": getattr(config, f"{side}_layers"),
            f"{side}_attention_heads": getattr(config, f"{side}_heads"),
            f"{side}_ffn_dim": getattr(config, f"{side}_d_ffn"),
        }
    values["num_hidden_layers"] = config.encoder_layers
    if model.languages.decoder_start != "eos_tag":  # nothing of Hugging Face's tells so
        values[LANGUAGES_KEY] = model.languages.to_json()
    return values | _moe_values(config, layers[0]) if layers else values


def _moe_values(config: TransformerConfig, moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "encoder_sparse_step": config.encoder_moe_freq,
        "decoder_sparse_step": config.decoder_moe_freq,
        "router_bias": moe.gate_bias,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "second_expert_policy": moe.second_expert_policy,
        "normalize_router_prob_before_dropping": moe.normalize_weights == "before_drop",
        "batch_prioritized_routing": moe.batch_prioritized,
        # A fraction of 1 never drops a token, as ours does without any capacity; none leaves a fixed one.
        "moe_eval_capacity_token_fraction": 0.0
        if moe.eval_capacity and not moe.eval_capacity_token_fraction
        else moe.eval_capacity_token_fraction or 1.0,
        "expert_capacity": moe.eval_capacity or 64,
        "moe_token_dropout": moe.eom,
        "dropout": moe.dropout,
        "activation_dropout": moe.activation_dropout,
    }


def _unsupported(config: TransformerConfig) -> Iterator[str]:
    """What the model has and Hugging Face's classes have not."""
    for side in ("encoder", "decoder"):
        if not getattr(config, f"{side}_pre_norm"):
            yield f"layer norm after sublayers ({side}_pre_norm=False)"
        if getattr(config, f"{side}_learned_positions"):
            yield f"learned positions ({side}_learned_positions=True)"
    if config.layernorm_embedding:
        yield "layer norm on embeddings (layernorm_embedding=True)"
    if not config.share_all_embeddings:
        yield "embeddings of encoder, decoder and output apart (share_all_embeddings=False)"
    layers = {side: getattr(config, f"{side}_moe") for side in ("encoder", "decoder")}
    given = {side: moe for side, moe in layers.items() if moe is not None}
    for side, moe in given.items():
        if counts := getattr(config, f"{side}_layer_experts"):
            yield f"layers with different numbers of experts ({side}_layer_experts={counts})"
        yield from _unsupported_moe(config, side, moe)
    if len(given) == 2:
        (_, first), (_, second) = given.items()
        for name in OF_BOTH_SIDES:
            if getattr(first, name) != getattr(second, name):
                yield f"{name} of its own on each side ({getattr(first, name)} and {getattr(second, name)})"


def _unsupported_moe(config: TransformerConfig, side: str, moe: MoEConfig) -> Iterator[str]:
    only: dict[str, tuple[object, ...]] = {
        "gate": ("topk",),
        "top_k": (2,),
        "cmr": (False,),
        "fom": (0.0,),
        "eval_capacity_factor": (0.0,),
        "normalize_weights": ("before_drop", "after_drop"),
        "second_expert_policy": ("all", "sampling", "random"),
        "activation": (config.activation,),
        "d_ffn": (getattr(config, f"{side}_d_ffn"),),
    }
    if moe.eom:
        only["masking_scale"] = ("eval",)
    for name, allowed in only.items():
        if getattr(moe, name) not in allowed:
            yield f"{side}_moe.{name}={getattr(moe, name)!r} (only {' or '.join(map(repr, allowed))})"


def _their_tensors(model: StoredModel, moe: bool) -> ComputedTensors:
    """The weights by Hugging Face's names, each expert apart."""
    tensors, recipes = model.tensors, dict[str, Recipe]()
    for ours in tensors:
        shape, dtype = shape_of(tensors, ours), dtype_of(tensors, ours)
        if ".moe.experts." not in ours:
            recipes[their_name(ours, moe)] = Recipe(
                shape, dtype, lambda begin, end, ours=ours: rows_of(tensors, ours, begin, end)  # type: ignore[misc]
            )
            continue
        for expert in range(shape[0]):
            recipes[expert_name(ours, expert)] = Recipe(
                shape[1:],
                dtype,
                lambda begin, end, ours=ours, expert=expert: rows_of(tensors, ours, expert, expert + 1)[0][begin:end],  # type: ignore[misc]
            )
    return ComputedTensors(recipes)


def _tokenizer_files(model: StoredModel) -> dict[str, Any]:
    lines = model.dictionary.read_text(encoding="utf-8").split("\n")
    pieces = [*SPECIALS, *(line.rpartition(" ")[0] for line in lines if line)]
    tags = {code: model.languages.tag(code) for code in model.languages.languages}
    return tokenizer_files(pieces, model.sentencepiece, tags)
