"""Write a model as a fairseq checkpoint from which training goes on; the weights are the same to the bit."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtmoe.checkpoint.average import config_differences
from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.fairseq import UNSUPPORTED_OPTIONS, FairseqCheckpoint, transformer_config
from mtmoe.checkpoint.stored import StoredModel, check_tensors
from mtmoe.errors import CheckpointError
from mtmoe.files import replacing
from mtmoe.moe import MoEConfig

OF_THE_SIDE = ("d_model", "d_ffn", "dropout", "activation", "activation_dropout")
"""Fields of MoEConfig that fairseq has under its own names."""

DENSE_DROPOUT = 0.1
"""What the options say of dropout, which a dense model does not keep; training takes it from its command line."""


def write_fairseq_checkpoint(path: Path, model: StoredModel) -> None:
    """Write a ``checkpoint_*.pt`` without optimiser state: training starts with fresh moments at update 0.

    It serves as ``--finetune-from-model`` or ``--restore-file`` of fairseq-train, and as ``--path`` of
    fairseq-generate; the options of the model must be the same as there.

    Args:
        path: the file to write or replace, atomically.
        model: all of its weights come into memory.

    Raises:
        CheckpointError: the model has something that the task mtmoe_translation has no option for.
    """
    check_tensors(model.config, model.tensors, path)
    if model.languages.decoder_start != "tag" or model.languages.tags:
        raise CheckpointError(
            f"{path}: the task mtmoe_translation starts its decoder with a tag as __de__ alone, this model with "
            f"decoder_start={model.languages.decoder_start!r} and its own tags; it can be converted to huggingface only"
        )
    options = {
        **_model_options(model.config, path),
        "arch": "mtmoe_transformer",
        "task": "mtmoe_translation",
        "criterion": "mtmoe_label_smoothed_cross_entropy",
        "optimizer": "mtmoe_adamw",
        "data": str(model.dictionary.absolute().parent),
        "directions": ",".join(model.languages.directions),
        "encoder_langtok": model.languages.encoder_langtok,
    }
    tensors = _state_dict(model)
    read_back = transformer_config(FairseqCheckpoint(path, options, {}, tensors))
    if read_back != model.config:
        raise CheckpointError(
            f"{path}: fairseq has no options for this model: {'; '.join(config_differences(model.config, read_back))} "
            "where it would be trained"
        )
    state = {
        "args": Namespace(**options),  # fairseq makes its configuration of it, with the defaults of all other options
        "cfg": None,
        "model": tensors,
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {"best": None}, "num_updates": 0}
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "metrics": {}},
        "last_optimizer_state": None,
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _model_options(config: TransformerConfig, path: Path) -> dict[str, Any]:
    options: dict[str, Any] = {
        "decoder_output_dim": config.d_model,
        "activation_fn": config.activation,
        "no_scale_embedding": not config.scale_embedding,
        "layernorm_embedding": config.layernorm_embedding,
        "share_all_embeddings": config.share_all_embeddings,
        "share_decoder_input_output_embed": config.share_decoder_input_output_embed,
        "max_source_positions": config.max_source_positions,
        "max_target_positions": config.max_target_positions,
        "dropout": DENSE_DROPOUT,
        "activation_dropout": 0.0,
        "moe_freq": 0,
        **UNSUPPORTED_OPTIONS,
    }
    for side in ("encoder", "decoder"):
        options |= {
            f"{side}_embed_dim": config.d_model,
            f"{side}_ffn_embed_dim": getattr(config, f"{side}_d_ffn"),
            f"{side}_layers": getattr(config, f"{side}_layers"),
            f"{side}_attention_heads": getattr(config, f"{side}_heads"),
            f"{side}_normalize_before": getattr(config, f"{side}_pre_norm"),
            f"{side}_learned_pos": getattr(config, f"{side}_learned_positions"),
            f"{side}_moe_freq": getattr(config, f"{side}_moe_freq"),
        }
    return options | _moe_options(config, path)


def _moe_options(config: TransformerConfig, path: Path) -> dict[str, Any]:
    """The options of MoE layers, which fairseq has once for both sides."""
    given = {side: getattr(config, f"{side}_moe") for side in ("encoder", "decoder")}
    layers: dict[str, MoEConfig] = {side: moe for side, moe in given.items() if moe is not None}
    if not layers:
        return {}
    if config.encoder_layer_experts or config.decoder_layer_experts:
        raise CheckpointError(
            f"{path}: fairseq has one number of experts, here layers have different ones, as pruning by a threshold "
            "leaves them; prune with --selection layer"
        )
    names = [field.name for field in fields(MoEConfig)]
    first = next(iter(layers.values()))
    for moe in layers.values():
        differing = [name for name in names if name != "d_ffn" and getattr(moe, name) != getattr(first, name)]
        if differing:
            told = ", ".join(f"{name} ({getattr(first, name)} and {getattr(moe, name)})" for name in differing)
            raise CheckpointError(
                f"{path}: fairseq has these options once for encoder and decoder, here they differ: {told}"
            )
    if first.activation != config.activation:
        raise CheckpointError(
            f"{path}: fairseq has one activation, here experts have {first.activation!r} and dense layers "
            f"{config.activation!r}"
        )
    own = {name: getattr(first, name) for name in names if name not in OF_THE_SIDE}
    widths = {moe.d_ffn for moe in layers.values()}
    if all(moe.d_ffn == getattr(config, f"{side}_d_ffn") for side, moe in layers.items()):
        width = 0
    elif len(widths) == 1:
        width = first.d_ffn
    else:
        raise CheckpointError(
            f"{path}: fairseq's experts are as wide as a side's dense layers or alike on both sides, here they have "
            f"{' and '.join(f'{moe.d_ffn} in the {side}' for side, moe in layers.items())}"
        )
    dropouts = {"moe_dropout": first.dropout, "activation_dropout": first.activation_dropout}
    return own | dropouts | {"moe_ffn_embed_dim": width}


def _state_dict(model: StoredModel) -> dict[str, Tensor]:
    """The weights under all the names that fairseq's module has: shared ones at each place, and its buffers."""
    config = model.config
    tensors: dict[str, Tensor] = {name: model.tensors[name] for name in model.tensors}
    if config.share_all_embeddings:
        tensors["decoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"]
    if config.share_decoder_input_output_embed:
        tensors["decoder.output_projection.weight"] = tensors["decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        tensors[f"{side}.version"] = torch.tensor([3.0])
        if not getattr(config, f"{side}_learned_positions"):
            tensors[f"{side}.embed_positions._float_tensor"] = torch.zeros(1)
    return tensors
