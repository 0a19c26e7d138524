"""Read Hugging Face's NLLB-MoE, NLLB and M2M-100 (transformers 4.57's NllbMoe and M2M100), without transformers.

Both are fairseq's Transformer with pre-norm, sinusoids and one embedding; what differs is names, and the form of the
tokeniser. Experts are one weight each there and rows of one weight here, so they are joined when they are asked for.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.huggingface_tokens import read_pieces, read_tags
from mtmoe.checkpoint.stored import LanguageSet, StoredModel, check_tensors, expected_shapes, read_json
from mtmoe.checkpoint.tensors import ComputedTensors, FileTensors, Recipe, dtype_of, rows_of, shape_of
from mtmoe.errors import CheckpointError
from mtmoe.files import write_text
from mtmoe.moe import MoEConfig

logger = logging.getLogger(__name__)

MOE, DENSE = "nllb-moe", "m2m_100"
"""The model types that are read; NLLB's dense models are of M2M-100's."""

SPECIAL_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
"""What must be so: fairseq's ids, and a decoder that begins with the end symbol."""

DEFAULTS: dict[str, Any] = {
    "activation_function": "relu", "scale_embedding": True, "tie_word_embeddings": True, "dropout": 0.1,
    "activation_dropout": 0.0, **SPECIAL_IDS,
}  # fmt: skip
"""transformers' defaults of what a config.json may leave out."""

MOE_DEFAULTS: dict[str, Any] = {
    "router_bias": False, "router_dtype": "float32", "router_ignore_padding_tokens": False, "expert_capacity": 64,
    "encoder_sparse_step": 4, "decoder_sparse_step": 4, "second_expert_policy": "all",
    "normalize_router_prob_before_dropping": False, "batch_prioritized_routing": False,
    "moe_eval_capacity_token_fraction": 1.0, "moe_token_dropout": 0.2,
}  # fmt: skip

LANGUAGES_KEY = "mtmoe_languages"
"""In config.json: languages.json of a model whose decoder does not begin as NLLB's."""

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SENTENCEPIECE = "sentencepiece.bpe.model"

EXPERT_PARTS = {"w_in": "fc1.weight", "b_in": "fc1.bias", "w_out": "fc2.weight", "b_out": "fc2.bias"}
"""Our stacked weight of the experts -> theirs of one expert."""

MOE_NAMES = {
    "encoder_attn": "cross_attention",
    "encoder_attn_layer_norm": "cross_attention_layer_norm",
    "final_layer_norm": "ff_layer_norm",
    "fc1": "ffn.fc1",
    "fc2": "ffn.fc2",
}
"""fairseq's name of a layer's part, which M2M100 keeps -> NllbMoe's."""


def is_huggingface(path: Path) -> bool:
    """Whether a folder holds a model of a kind that `reading` takes."""
    if not (path / "config.json").is_file():
        return False
    try:
        values = read_json(path / "config.json")
    except CheckpointError:
        return False
    return isinstance(values, dict) and values.get("model_type") in (MOE, DENSE)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[StoredModel]:
    """Give the model of a Hugging Face folder; weights are read when they are asked for.

    Args:
        path: with config.json, the weights as safetensors or pytorch_model.bin, whole or in parts, and the tokeniser's
            sentencepiece.bpe.model, tokenizer_config.json or special_tokens_map.json, and M2M-100's vocab.json. Pickled
            weights are read by torch's weights-only loader.

    Yields:
        The model; its dictionary is a temporary file that goes with the block.

    Raises:
        CheckpointError: something is missing, damaged, or not as mtmoe's model can compute it.
    """
    path_of_config = path / "config.json"
    values = read_json(path_of_config)
    config = transformer_config(values, path_of_config)
    tensors = _our_tensors(config, _read_weights(path), path)
    check_tensors(config, tensors, path)
    if not (path / SENTENCEPIECE).is_file():
        raise CheckpointError(f"{path} lacks {SENTENCEPIECE}, the tokeniser's SentencePiece model; fetch it too")
    pieces = read_pieces(path, config.vocabulary_size)
    if LANGUAGES_KEY in values:
        languages = LanguageSet.from_json(values[LANGUAGES_KEY], where=path_of_config)
    else:
        languages = _languages(read_tags(pieces), path)
    with tempfile.TemporaryDirectory() as folder:
        dictionary = Path(folder) / "dict.txt"
        write_text(dictionary, "".join(f"{piece} 1\n" for piece in pieces[4:]))
        model = StoredModel(config, tensors, dictionary, path / SENTENCEPIECE, languages)
        yield model.after("converted", source=f"Hugging Face {values['model_type']} {path.resolve().name}")


def _languages(tags: Mapping[str, str], path: Path) -> LanguageSet:
    """All directions between the languages of NLLB's or M2M-100's tags."""
    if not tags:
        raise CheckpointError(
            f"{path} has no language tags, as deu_Latn or __de__, in tokenizer_config.json, tokenizer.json or "
            "special_tokens_map.json; fetch the tokeniser's files too"
        )
    codes = sorted(tags)
    directions = tuple(f"{source}-{target}" for source in codes for target in codes if source != target)
    own = {code: tag for code, tag in tags.items() if tag != f"__{code}__"}
    return LanguageSet(tuple(codes), directions, "src", "eos_tag", own)


def transformer_config(values: Any, where: Path) -> TransformerConfig:
    """Map the content of a Hugging Face config.json to ours; the one place where that happens.

    Raises:
        CheckpointError: a key is missing, or asks for something that mtmoe does not compute.
    """
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in (MOE, DENSE):
        raise CheckpointError(f"{where}: model_type {kind!r} is none of {MOE}, {DENSE}")
    option = _Options(DEFAULTS | (MOE_DEFAULTS if kind == MOE else {}) | values, where)
    for name, only in SPECIAL_IDS.items():
        if option[name] != only:
            raise CheckpointError(f"{where}: {name}={option[name]!r} is not supported, only {only}")
    tied = bool(option["tie_word_embeddings"])
    moe = {side: _moe_config(option, side) if kind == MOE else None for side in ("encoder", "decoder")}
    try:
        return TransformerConfig(
            vocabulary_size=option["vocab_size"],
            d_model=option["d_model"],
            encoder_layers=option["encoder_layers"],
            decoder_layers=option["decoder_layers"],
            encoder_heads=option["encoder_attention_heads"],
            decoder_heads=option["decoder_attention_heads"],
            encoder_d_ffn=option["encoder_ffn_dim"],
            decoder_d_ffn=option["decoder_ffn_dim"],
            encoder_pre_norm=True,
            decoder_pre_norm=True,
            encoder_learned_positions=False,
            decoder_learned_positions=False,
            max_source_positions=option["max_position_embeddings"],
            max_target_positions=option["max_position_embeddings"],
            activation=option["activation_function"],
            scale_embedding=option["scale_embedding"],
            layernorm_embedding=False,
            share_all_embeddings=tied,
            share_decoder_input_output_embed=tied,
            encoder_moe_freq=0 if moe["encoder"] is None else option["encoder_sparse_step"],
            decoder_moe_freq=0 if moe["decoder"] is None else option["decoder_sparse_step"],
            encoder_moe=moe["encoder"],
            decoder_moe=moe["decoder"],
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def their_name(ours: str, moe: bool) -> str:
    """Hugging Face's name of a weight that is no expert's.

    Args:
        ours: fairseq's.
        moe: whether the class is NllbMoe instead of M2M100.
    """
    if ours == "encoder.embed_tokens.weight":
        return "model.shared.weight"
    if ours == "decoder.output_projection.weight":
        return "lm_head.weight"
    parts = ours.split(".")
    if moe and len(parts) > 3 and parts[1] == "layers":
        if parts[3:5] == ["moe", "gate"]:
            parts[3:5] = ["ffn", "router", "classifier"]
        else:
            parts[3] = MOE_NAMES.get(parts[3], parts[3])
    return ".".join(["model", *parts])


def expert_name(ours: str, expert: int) -> str:
    """Hugging Face's name of one expert's part of our stacked weight ``….moe.experts.w_in``."""
    prefix, _, part = ours.partition(".moe.experts.")
    return f"model.{prefix}.ffn.experts.expert_{expert}.{EXPERT_PARTS[part]}"


class _Options:
    """The keys of a config.json; asking for a missing one is a CheckpointError."""

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self.values, self.where = values, where

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.where} lacks {name}")
        return self.values[name]


def _moe_config(option: _Options, side: str) -> MoEConfig | None:
    where, step = option.where, option[f"{side}_sparse_step"]
    if not 0 < step <= option[f"{side}_layers"]:
        return None
    if option["router_dtype"] != "float32":
        logger.warning("%s: router_dtype %s: mtmoe's gate computes in float32", where, option["router_dtype"])
    if option["second_expert_policy"] != "all":
        logger.warning(
            "%s: second_expert_policy %s draws at random in evaluation too, mtmoe only in training",
            where, option["second_expert_policy"],
        )  # fmt: skip
    fraction, slots = option["moe_eval_capacity_token_fraction"], option["expert_capacity"]
    if fraction < 1 and option["router_ignore_padding_tokens"]:
        raise CheckpointError(
            f"{where}: router_ignore_padding_tokens=true gives padding a place at the experts there, and with "
            f"moe_eval_capacity_token_fraction={fraction} it may take that of a word; set one of them otherwise"
        )
    if fraction <= 0 and not slots:
        raise CheckpointError(f"{where}: moe_eval_capacity_token_fraction={fraction} needs expert_capacity above 0")
    try:
        return MoEConfig(
            d_model=option["d_model"],
            d_ffn=option[f"{side}_ffn_dim"],
            num_experts=option["num_experts"],
            top_k=2,
            gate_bias=option["router_bias"],
            activation=option["activation_function"],
            second_expert_policy=option["second_expert_policy"],
            normalize_weights="before_drop" if option["normalize_router_prob_before_dropping"] else "after_drop",
            batch_prioritized=option["batch_prioritized_routing"],
            eval_capacity_token_fraction=float(min(max(fraction, 0.0), 1.0)),
            eval_capacity=0 if fraction > 0 else slots,
            dropout=option["dropout"],
            activation_dropout=option["activation_dropout"],
            eom=option["moe_token_dropout"],
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    """All weights of a folder by Hugging Face's names, mapped from the files."""
    for single, index in zip(SINGLE_FILES, INDICES, strict=True):
        if (path / single).is_file():
            return FileTensors.of_file(path / single) if single.endswith("safetensors") else _unpickle(path / single)
        if (path / index).is_file():
            return _read_parts(path, path / index)
    raise CheckpointError(f"{path} lacks the weights: none of {', '.join(SINGLE_FILES + INDICES)} is there")


def _read_parts(path: Path, index: Path) -> Mapping[str, Tensor]:
    values = read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} lacks weight_map; fetch it again")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: weight_map.{name} must be a file of this folder, not {file!r}")
    if index.name == INDICES[0]:
        return FileTensors({name: path / file for name, file in places.items()})
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        tensors |= _unpickle(path / file)
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{index} names {', '.join(missing)}, which its file lacks; fetch the parts again")
    return tensors


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file, by torch's weights-only loader."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; fetch all parts of the model")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not read: damaged, or asking for more than weights: {first}") from error
    except Exception as error:  # a damaged pickle can end in nearly any error of the loader
        raise CheckpointError(f"{path} is damaged: {error}; fetch it again") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds no weights by name")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _our_tensors(config: TransformerConfig, theirs: Mapping[str, Tensor], path: Path) -> ComputedTensors:
    """The weights by our names; each is read when asked for."""
    moe = any(".ffn." in name for name in theirs)
    recipes: dict[str, Recipe] = {}
    missing: list[str] = []
    used: set[str] = set()
    for ours, shape in expected_shapes(config).items():
        if ".moe.experts." in ours:
            names = [expert_name(ours, expert) for expert in range(shape[0])]
        else:
            names = [_embedding(theirs, ours) or their_name(ours, moe)]
        used |= set(names)
        lacking = [name for name in names if name not in theirs]
        missing += lacking
        if not lacking:
            recipes[ours] = _recipe(theirs, names, stacked=".moe.experts." in ours)
    unknown = sorted(name for name in theirs if name not in used and not _redundant(theirs, name, config, path))
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise CheckpointError(f"{path}: the weights do not fit config.json: {' and '.join(parts)}")
    return ComputedTensors(recipes)


def _recipe(theirs: Mapping[str, Tensor], names: list[str], *, stacked: bool) -> Recipe:
    shape, dtype = shape_of(theirs, names[0]), dtype_of(theirs, names[0])
    if not stacked:
        return Recipe(shape, dtype, lambda begin, end: rows_of(theirs, names[0], begin, end))
    return Recipe(
        (len(names), *shape), dtype, lambda begin, end: torch.stack([theirs[name] for name in names[begin:end]])
    )


def _embedding(theirs: Mapping[str, Tensor], ours: str) -> str | None:
    """Where an embedding is: under ``shared``, or, without that, with the side that uses it."""
    if not ours.endswith("embed_tokens.weight"):
        return None
    own = f"model.{ours}"
    return next((name for name in ("model.shared.weight", own, "lm_head.weight") if name in theirs), None)


def _redundant(theirs: Mapping[str, Tensor], name: str, config: TransformerConfig, path: Path) -> bool:
    """Whether a weight is a table of sinusoids or another copy of the embedding; a copy that differs is an error."""
    if name.endswith(("embed_positions.weights", "embed_positions.weight")):
        return True
    copies = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "model.shared.weight"]
    copies += ["lm_head.weight"] * config.share_all_embeddings
    if name not in copies:
        return False
    original = "model.shared.weight" if "model.shared.weight" in theirs else _embedding(theirs, copies[0][6:])
    if original is not None and not torch.equal(theirs[name], theirs[original]):
        raise CheckpointError(f"{path}: {name} differs from {original}, which it should share")
    return True
