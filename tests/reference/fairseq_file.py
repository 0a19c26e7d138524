"""Write a file as fairseq does, without fairseq."""

from argparse import Namespace
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from mtmoe.checkpoint import StoredModel
from mtmoe.moe import MoEConfig


def fairseq_options(model: StoredModel) -> dict[str, Any]:
    """The model's options under fairseq's names, as its command line fills them in."""
    config = model.config
    options = {
        "_name": "mtmoe_transformer",
        "arch": "mtmoe_transformer",
        "encoder_embed_dim": config.d_model,
        "decoder_embed_dim": config.d_model,
        "decoder_output_dim": config.d_model,
        "encoder_ffn_embed_dim": config.encoder_d_ffn,
        "decoder_ffn_embed_dim": config.decoder_d_ffn,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.encoder_heads,
        "decoder_attention_heads": config.decoder_heads,
        "encoder_normalize_before": config.encoder_pre_norm,
        "decoder_normalize_before": config.decoder_pre_norm,
        "encoder_learned_pos": config.encoder_learned_positions,
        "decoder_learned_pos": config.decoder_learned_positions,
        "max_source_positions": config.max_source_positions,
        "max_target_positions": config.max_target_positions,
        "activation_fn": config.activation,
        "activation_dropout": 0.0,
        "dropout": 0.1,
        "no_scale_embedding": not config.scale_embedding,
        "layernorm_embedding": config.layernorm_embedding,
        "share_all_embeddings": config.share_all_embeddings,
        "share_decoder_input_output_embed": config.share_decoder_input_output_embed,
        "adaptive_input": False,
        "adaptive_softmax_cutoff": None,
        "cross_self_attention": False,
        "merge_src_tgt_embed": False,
        "no_cross_attention": False,
        "no_token_positional_embeddings": False,
        "moe_freq": 0,
        "encoder_moe_freq": config.encoder_moe_freq,
        "decoder_moe_freq": config.decoder_moe_freq,
    }
    moe = config.encoder_moe or config.decoder_moe
    if moe is not None:
        options |= {field.name: getattr(moe, field.name) for field in fields(MoEConfig) if field.name not in options}
        options |= {"moe_ffn_embed_dim": moe.d_ffn, "moe_dropout": moe.dropout}
    return options


def fairseq_state(model: StoredModel, data: Path | None = None) -> dict[str, Any]:
    """What fairseq saves: options in a Namespace, tied copies, buffers, and the optimiser beside the weights."""
    tensors = OrderedDict(model.tensors)
    if model.config.share_all_embeddings:
        tensors["decoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"]
    if model.config.share_decoder_input_output_embed:
        tensors["decoder.output_projection.weight"] = tensors["decoder.embed_tokens.weight"]
    tensors["encoder.version"] = tensors["decoder.version"] = torch.tensor([3.0])
    task = {"_name": "mtmoe_translation", "data": str(data), "encoder_langtok": model.languages.encoder_langtok}
    return {
        "args": None,
        "cfg": {"_name": None, "model": Namespace(**fairseq_options(model)), "task": task, "optimizer": {"lr": [0.1]}},
        "model": tensors,
        "criterion": None,
        "optimizer_history": [{"criterion_name": "C", "lr_scheduler_state": {"best": None}, "num_updates": 7}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": 2.5, "metrics": OrderedDict()},
        "last_optimizer_state": {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": []},
    }


class Hostile:
    """Calls a function, such as os.system, when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call
