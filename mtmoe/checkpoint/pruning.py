"""Take experts out of a trained model: it gets smaller, and its gates choose among what is left.

A gate's softmax over fewer rows is the old one renormalised over the experts that stay, so nothing else of a layer
changes. Experts may be dropped, or merged into one that stays (`mtmoe.checkpoint.merging`).

Source: Koishekenov et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.expert_scores import LayerKey
from mtmoe.checkpoint.expert_selection import ExpertSelection
from mtmoe.checkpoint.stored import StoredModel
from mtmoe.checkpoint.tensors import ComputedTensors, Recipe, count_of, dtype_of, rows_of, shape_of
from mtmoe.errors import CheckpointError
from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.routing_table import SIDES

GATE = "gate.weight"
"""Name within a MoE layer of the gate's weights, a row for each expert."""

EXPERTS = ("experts.w_in", "experts.b_in", "experts.w_out", "experts.b_out")
"""Names within a MoE layer of the experts' weights, stacked."""

BESIDE, BESIDE_EACH = 32_768, 200
"""Bytes reckoned for the JSON and the model card of a folder, and for each weight's entry in the header of its file;
both are more than they take."""

Rows = Callable[[LayerKey, str, int, int], Tensor]
"""rows(layer, name in the layer, begin, end) -> these rows of a weight that has a row for each expert that stays."""


def experts_of(config: TransformerConfig) -> dict[LayerKey, int]:
    """MoE layer -> its experts, those of the encoder first."""
    return {
        (side, layer): config.moe_of(side, layer).num_experts for side in SIDES for layer in config.moe_layers(side)
    }


def least_of(config: TransformerConfig) -> dict[LayerKey, int]:
    """MoE layer -> the experts that it cannot work without: its top_k."""
    return {(side, layer): config.moe_of(side, layer).top_k for side in SIDES for layer in config.moe_layers(side)}


def rows_of_experts(moe: MoEConfig) -> tuple[str, ...]:
    """Names within a MoE layer of the weights that have a row for each expert: the experts' own and the gate's.

    Raises:
        CheckpointError: the gate has no row for each expert.
    """
    if moe.gate == "bilevel":
        raise CheckpointError(
            "experts under gate='bilevel' cannot be taken out one by one: all its nodes have equally many. Models with "
            "the gates topk and moec can be pruned"
        )
    # Asked of the layer, without memory, so that a new gate's weights are known here from the start.
    with torch.device("meta"):
        one, more = (
            MoELayer(replace(unclustered(moe), num_experts=count)).state_dict()
            for count in (moe.num_experts, moe.num_experts + 1)
        )
    return tuple(name for name, tensor in one.items() if tensor.shape != more[name].shape)


def unclustered(moe: MoEConfig) -> MoEConfig:
    """Without clusters of experts and emulated ranks: they matter in training only, and must divide the experts."""
    return replace(
        moe, expert_clusters=0, cluster_expert_dropout=0.0, cluster_variance_type=1, gating_dropout_ranks=0
    )


def drop_experts(model: StoredModel, selection: ExpertSelection) -> StoredModel:
    """Remove the experts that a selection does not keep, and their rows of the gates.

    Args:
        model: stays as it is; what nothing was removed from is shared with it.
        selection: of experts of this model.

    Raises:
        ValueError: the selection is of a model of another shape, or leaves a layer fewer experts than its top_k.
    """

    def rows(layer: LayerKey, name: str, begin: int, end: int) -> Tensor:
        whole = prefix_of(layer) + name
        return torch.cat([rows_of(model.tensors, whole, old, old + 1) for old in selection.kept[layer][begin:end]])

    return reshape_layers(model, selection, rows)


def prefix_of(layer: LayerKey) -> str:
    """What stands before the names of a MoE layer's weights."""
    return "{}.layers.{}.moe.".format(*layer)


def reshape_layers(model: StoredModel, selection: ExpertSelection, rows: Rows) -> StoredModel:
    """Rebuild the layers that a selection takes experts from; see `drop_experts`.

    The new weights are computed when they are asked for, so that a model need not fit into memory.
    """
    have = experts_of(model.config)
    if have != dict(selection.num_experts):
        raise ValueError("the selection is of a model with other MoE layers, or other numbers of experts")
    if selection.is_all:
        return model
    tensors = model.tensors
    recipes = {
        name: Recipe(shape_of(tensors, name), dtype_of(tensors, name), partial(rows_of, tensors, name))
        for name in tensors
    }
    for layer, kept in selection.kept.items():
        if len(kept) == have[layer]:
            continue
        for name in rows_of_experts(model.config.moe_of(*layer)):
            whole = prefix_of(layer) + name
            shape = (len(kept), *shape_of(tensors, whole)[1:])
            recipes[whole] = Recipe(shape, dtype_of(tensors, whole), partial(rows, layer, name))
    return replace(model, config=config_of(model.config, selection), tensors=ComputedTensors(recipes))


def config_of(config: TransformerConfig, selection: ExpertSelection) -> TransformerConfig:
    """The shape of a model after a selection; a side that has lost experts is `unclustered`.

    Raises:
        ValueError: a layer is left with fewer experts than its top_k.
    """
    changes: dict[str, Any] = {}
    for side in SIDES:
        counts = tuple(len(kept) for (of, _), kept in selection.kept.items() if of == side)
        if counts == tuple(count for (of, _), count in selection.num_experts.items() if of == side):
            continue
        moe: MoEConfig = getattr(config, f"{side}_moe")
        if min(counts) < moe.top_k:
            raise ValueError(f"a layer of the {side} is left with {min(counts)} experts, fewer than top_k={moe.top_k}")
        changes[f"{side}_moe"] = replace(unclustered(moe), num_experts=max(counts))
        changes[f"{side}_layer_experts"] = None if len(set(counts)) == 1 else counts
    return replace(config, **changes)


def for_directions(model: StoredModel, directions: Sequence[str]) -> StoredModel:
    """The model as one of these directions only, so that translating in others gives a warning.

    Directions that it was not trained on are left out; if it was trained on none of them, all its directions stay.
    """
    kept = tuple(direction for direction in model.languages.directions if direction in set(directions))
    return replace(model, languages=replace(model.languages, directions=kept)) if kept else model


def bytes_of_experts(model: StoredModel) -> dict[LayerKey, int]:
    """MoE layer -> bytes that each of its experts takes, its row of the gate included."""
    sizes = {}
    for layer in experts_of(model.config):
        names = [prefix_of(layer) + name for name in rows_of_experts(model.config.moe_of(*layer))]
        sizes[layer] = sum(_bytes(model, name) // shape_of(model.tensors, name)[0] for name in names)
    return sizes


def bytes_of_model(model: StoredModel) -> int:
    """Bytes that a folder of this model takes at most, some KiB of JSON reckoned on the safe side."""
    weights = sum(BESIDE_EACH + _bytes(model, name) for name in model.tensors)
    return BESIDE + weights + model.dictionary.stat().st_size + model.sentencepiece.stat().st_size


def _bytes(model: StoredModel, name: str) -> int:
    return dtype_of(model.tensors, name).itemsize * count_of(model.tensors, name)
