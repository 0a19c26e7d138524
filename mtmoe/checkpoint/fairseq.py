"""Read fairseq's checkpoints without fairseq, and without running anything that a file may bring along."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtmoe.checkpoint.card import read_data
from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.sharded import SHARED, check_files, is_sharded, read_experts, read_manifest
from mtmoe.checkpoint.stored import LanguageSet, StoredModel, check_tensors, read_json
from mtmoe.errors import CheckpointError
from mtmoe.moe import MoEConfig
from mtmoe.moe.config import LATER_FIELDS

HARMLESS_PACKAGES = ("argparse", "fairseq", "fairseq_plugins", "numpy", "omegaconf")
"""Nothing of these is imported: what a checkpoint wants from them is replaced by `_Inert`, which only keeps values."""

HARMLESS_NAMES = (
    "_codecs.encode",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "collections.defaultdict",
    "collections.deque",
    "pathlib.PosixPath",
    "typing.Any",
)
"""Single names that options and statistics of training are pickled with; replaced as well."""

UNSUPPORTED_OPTIONS = {
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "cross_self_attention": False,
    "merge_src_tgt_embed": False,
    "no_cross_attention": False,
    "no_token_positional_embeddings": False,
}
"""Options of fairseq's Transformer that change what it computes, with the only value that we compute."""


@dataclass(frozen=True, slots=True)
class FairseqCheckpoint:
    """A checkpoint in plain Python values."""

    path: Path
    model: dict[str, Any]
    """Options of the model; those of a nested configuration are flat here, as encoder_layers or decoder_layers."""
    task: dict[str, Any]
    """Options of the task."""
    tensors: dict[str, Tensor]
    """The state of the model, mapped from the file: read when touched."""
    updates: int | None = None
    """Updates of training behind it, where it tells."""


class _Inert:
    """Stands in for any class or function that a checkpoint names: takes every argument and does nothing."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> _Inert:
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *arguments: Any) -> None:
        """Nothing: `__new__` has kept the arguments."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_fairseq_checkpoint(path: Path) -> FairseqCheckpoint:
    """Read configuration and weights of a ``checkpoint_*.pt``, or of a sharded checkpoint with all its experts.

    torch's weights-only loader reads the file. The classes of fairseq, omegaconf and so on that it mentions are
    replaced by empty stand-ins; a file that asks for anything else is refused before anything is built.

    Args:
        path: a file that fairseq wrote with torch 1.6 or newer, or the directory of a sharded checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, asks for a forbidden global or is no fairseq checkpoint.
    """
    if is_sharded(path):
        return _read_sharded(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is cut short, or is no checkpoint in torch's zip format (torch 1.6 and newer write that)"
        )
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    refused = sorted(name for name in wanted if not _harmless(name))
    if refused:
        raise CheckpointError(
            f"{path} is not safe to read: it asks for {', '.join(refused)}, which a fairseq checkpoint does not need"
        )
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in wanted]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can end in nearly any error of the loader
        raise CheckpointError(f"{path} is damaged or unsafe: {error}") from error
    return _plain_checkpoint(path, state)


def read_model(path: Path, data: Path | None = None) -> StoredModel:
    """Everything needed to translate with a checkpoint of our task.

    Args:
        path: the checkpoint.
        data: folder of the prepared data it was trained on; by default the ``data`` folder beside the folder of the
            checkpoint, else the one that the checkpoint names.

    Raises:
        CheckpointError: the checkpoint or the data folder is missing, damaged or does not fit.
    """
    checkpoint = read_fairseq_checkpoint(path)
    if "encoder_langtok" not in checkpoint.task:
        raise CheckpointError(
            f"{path} was trained with task {checkpoint.task.get('_name')!r}, which has no language tags as mtmoe's has"
        )
    folder = _find_data(checkpoint, data)
    config = transformer_config(checkpoint)
    side = checkpoint.task["encoder_langtok"]
    where = folder / "languages.json"
    languages = LanguageSet.from_json(read_json(where), encoder_langtok=side, where=where)
    tensors = untie(checkpoint, config)
    model = StoredModel(
        config, tensors, folder / "dict.txt", folder / "spm.model", languages, data=read_data(folder)
    )
    trained = {} if checkpoint.updates is None else {"updates": checkpoint.updates}
    return model.after("converted", source=f"fairseq checkpoint {path.name}", **trained)


def transformer_config(checkpoint: FairseqCheckpoint) -> TransformerConfig:
    """Map fairseq's options to ours; the one place where that happens. A missing option is an error, not a default, but
    for those that came later than the checkpoint may be.

    Raises:
        CheckpointError: an option is missing or asks for something that mtmoe does not compute.
    """
    option = _Options(checkpoint)
    for name, only in UNSUPPORTED_OPTIONS.items():
        if option[name] != only:
            raise CheckpointError(f"{checkpoint.path}: {name}={option[name]!r} is not supported, only {only!r}")
    d_model = option["encoder_embed_dim"]
    for name in ("decoder_embed_dim", "decoder_output_dim"):
        if option[name] != d_model:
            raise CheckpointError(f"{checkpoint.path}: {name}={option[name]} must equal encoder_embed_dim={d_model}")
    has_moe = any(".moe." in name for name in checkpoint.tensors)
    try:
        return TransformerConfig(
            vocabulary_size=_vocabulary_size(checkpoint),
            d_model=d_model,
            encoder_layers=option["encoder_layers"],
            decoder_layers=option["decoder_layers"],
            encoder_heads=option["encoder_attention_heads"],
            decoder_heads=option["decoder_attention_heads"],
            encoder_d_ffn=option["encoder_ffn_embed_dim"],
            decoder_d_ffn=option["decoder_ffn_embed_dim"],
            encoder_pre_norm=option["encoder_normalize_before"],
            decoder_pre_norm=option["decoder_normalize_before"],
            encoder_learned_positions=option["encoder_learned_pos"],
            decoder_learned_positions=option["decoder_learned_pos"],
            max_source_positions=option["max_source_positions"],
            max_target_positions=option["max_target_positions"],
            activation=option["activation_fn"],
            scale_embedding=not option["no_scale_embedding"],
            layernorm_embedding=option["layernorm_embedding"],
            share_all_embeddings=option["share_all_embeddings"],
            share_decoder_input_output_embed=option["share_all_embeddings"]
            or option["share_decoder_input_output_embed"],
            encoder_moe_freq=_moe_freq(option, "encoder") if has_moe else 0,
            decoder_moe_freq=_moe_freq(option, "decoder") if has_moe else 0,
            encoder_moe=_moe_config(option, "encoder") if has_moe else None,
            decoder_moe=_moe_config(option, "decoder") if has_moe else None,
        )
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def untie(checkpoint: FairseqCheckpoint, config: TransformerConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint without buffers and without the copies of shared matrices.

    Raises:
        CheckpointError: weights are missing, unknown, of a wrong shape, or shared ones differ.
    """
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.endswith((".version", "embed_positions._float_tensor"))
    }
    copies = {}
    if config.share_all_embeddings:
        copies["decoder.embed_tokens.weight"] = "encoder.embed_tokens.weight"
    if config.share_decoder_input_output_embed:
        shared = "encoder" if config.share_all_embeddings else "decoder"
        copies["decoder.output_projection.weight"] = f"{shared}.embed_tokens.weight"
    for copy, original in copies.items():
        if copy not in tensors:
            continue
        if original in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise CheckpointError(f"{checkpoint.path}: {copy} differs from {original}, which it should share")
        del tensors[copy]
    check_tensors(config, tensors, checkpoint.path)
    return tensors


class _Options:
    """The options of a checkpoint's model by name; asking for a missing one is a CheckpointError."""

    def __init__(self, checkpoint: FairseqCheckpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> Any:
        if name not in self.checkpoint.model:
            raise CheckpointError(f"{self.checkpoint.path} lacks the model option {name}")
        return self.checkpoint.model[name]

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.model


def _moe_freq(option: _Options, side: str) -> int:
    own = option[f"{side}_moe_freq"]
    return int(option["moe_freq"] if own < 0 else own)


def _moe_config(option: _Options, side: str) -> MoEConfig | None:
    frequency = _moe_freq(option, side)
    if not 0 < frequency <= option[f"{side}_layers"]:
        return None
    derived = {
        "d_model": option[f"{side}_embed_dim"],
        "d_ffn": option["moe_ffn_embed_dim"] or option[f"{side}_ffn_embed_dim"],
        "dropout": option["dropout"] if option["moe_dropout"] < 0 else option["moe_dropout"],
        "activation": option["activation_fn"],
        "activation_dropout": option["activation_dropout"],
    }
    own = {
        field.name: option[field.name]
        for field in fields(MoEConfig)
        if field.name not in derived and (field.name in option or field.name not in LATER_FIELDS)
    }
    return MoEConfig(**derived, **own)


def _vocabulary_size(checkpoint: FairseqCheckpoint) -> int:
    embedding = checkpoint.tensors.get("encoder.embed_tokens.weight")
    if embedding is None or embedding.dim() != 2:
        raise CheckpointError(
            f"{checkpoint.path} lacks encoder.embed_tokens.weight: it is no encoder–decoder Transformer"
        )
    return embedding.shape[0]


def _find_data(checkpoint: FairseqCheckpoint, data: Path | None) -> Path:
    if data is not None:
        candidates = [data]
    else:
        # The folder in the checkpoint may be relative to where training ran, so the run's own folder comes first.
        candidates = [checkpoint.path.absolute().parent.parent / "data"]
        if checkpoint.task.get("data"):
            named = Path(str(checkpoint.task["data"]))
            candidates += [named, named.parent]
    for folder in candidates:
        if (folder / "dict.txt").is_file():
            missing = [name for name in ("spm.model", "languages.json") if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{folder} lacks {' and '.join(missing)}; it is no complete prepared data")
            return folder
    tried = ", ".join(str(folder) for folder in candidates)
    raise CheckpointError(
        f"{checkpoint.path} needs its prepared data (dict.txt, spm.model); looked in {tried}. Give --data"
    )


def _read_sharded(path: Path) -> FairseqCheckpoint:
    manifest = read_manifest(path)
    check_files(path, manifest, [SHARED])
    shared = read_fairseq_checkpoint(path / SHARED)
    prefix = "model/"
    experts = read_experts(path, manifest, prefix=prefix)
    weights = {name.removeprefix(prefix): each.values for name, each in experts.items()}
    return replace(shared, path=path, tensors=shared.tensors | weights)


def _harmless(name: str) -> bool:
    return name.partition(".")[0] in HARMLESS_PACKAGES or name in HARMLESS_NAMES


def _plain_checkpoint(path: Path, state: Any) -> FairseqCheckpoint:
    if not isinstance(state, Mapping) or not isinstance(state.get("model"), Mapping):
        raise CheckpointError(f"{path} holds no 'model': it is no fairseq checkpoint")
    config = _plain(state.get("cfg"))
    if isinstance(config, dict):
        model, task = config.get("model"), config.get("task")
    else:  # before fairseq 0.10 one flat set of options stood under "args"
        model = task = _plain(state.get("args"))
    if not isinstance(model, dict) or not isinstance(task, dict):
        raise CheckpointError(f"{path} holds neither 'cfg' nor 'args': it is no fairseq checkpoint")
    tensors = {str(name): value for name, value in state["model"].items() if isinstance(value, Tensor)}
    return FairseqCheckpoint(path, _flat(model), task, tensors, _updates(state))


def _updates(state: Mapping[str, Any]) -> int | None:
    history = state.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, Mapping) else None
    return updates if isinstance(updates, int) else None


def _flat(model: dict[str, Any]) -> dict[str, Any]:
    """Options of a nested configuration under the names that the command line has."""
    flat = dict(model)
    for side in ("encoder", "decoder", "quant_noise"):
        nested = flat.pop(side, None)
        if isinstance(nested, dict):
            flat |= {f"{side}_{name}": value for name, value in nested.items()}
    return flat


def _plain(value: Any) -> Any:
    """Options as dictionaries, lists and scalars; what is nothing of the kind becomes None."""
    if isinstance(value, _Inert):
        state = value.state
        if isinstance(state, Mapping) and "_content" in state:  # omegaconf's DictConfig and ListConfig
            return _plain(state["_content"])
        if isinstance(state, Mapping) and "_val" in state:  # omegaconf's nodes
            return _plain(state["_val"])
        if isinstance(state, Mapping):  # argparse.Namespace, dataclasses
            return _plain(state)
        return _plain(value.arguments[0]) if value.arguments else None  # an enum is pickled by its value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _plain(vars(value)) if hasattr(value, "__dict__") else None
