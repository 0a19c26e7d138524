"""Take experts out of a trained model: it gets smaller, and its gates choose among what is left.

A gate's softmax over fewer rows is the old one renormalised over the experts that stay, so nothing else of a layer
changes. Experts may be dropped, or merged into one that stays (`mtmoe.checkpoint.merging`).

Source: Koishekenov et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.expert_scores import LayerKey
from mtmoe.checkpoint.expert_selection import ExpertSelection
from mtmoe.checkpoint.stored import StoredModel
from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.routing_table import SIDES

GATE = "gate.weight"
"""Name within a MoE layer of the gate's weights, a row for each expert."""

EXPERTS = ("experts.w_in", "experts.b_in", "experts.w_out", "experts.b_out")
"""Names within a MoE layer of the experts' weights, stacked."""

BESIDE, BESIDE_EACH = 32_768, 200
"""Bytes reckoned for the JSON and the model card of a folder, and for each weight's entry in the header of its file;
both are more than they take."""

Reshape = Callable[[LayerKey, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""reshape(layer, weights of the layer that have a row for each expert) -> the same with only the rows that stay."""


def experts_of(config: TransformerConfig) -> dict[LayerKey, int]:
    """MoE layer -> its experts, those of the encoder first."""
    return {
        (side, layer): config.moe_of(side, layer).num_experts for side in SIDES for layer in config.moe_layers(side)
    }


def least_of(config: TransformerConfig) -> dict[LayerKey, int]:
    """MoE layer -> the experts that it cannot work without: its top_k."""
    return {(side, layer): config.moe_of(side, layer).top_k for side in SIDES for layer in config.moe_layers(side)}


def rows_of_experts(moe: MoEConfig) -> tuple[str, ...]:
    """Names within a MoE layer of the weights that have a row for each expert: the experts' own and the gate's."""
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

    def reshape(layer: LayerKey, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        index = torch.tensor(selection.kept[layer])
        return {name: tensor[index] for name, tensor in weights.items()}

    return reshape_layers(model, selection, reshape)


def reshape_layers(model: StoredModel, selection: ExpertSelection, reshape: Reshape) -> StoredModel:
    """Rebuild the layers that a selection takes experts from; see `drop_experts`."""
    have = experts_of(model.config)
    if have != dict(selection.num_experts):
        raise ValueError("the selection is of a model with other MoE layers, or other numbers of experts")
    tensors = dict(model.tensors)
    for layer, kept in selection.kept.items():
        if len(kept) == have[layer]:
            continue
        prefix, names = "{}.layers.{}.moe.".format(*layer), rows_of_experts(model.config.moe_of(*layer))
        tensors |= {
            prefix + name: tensor
            for name, tensor in reshape(layer, {name: tensors[prefix + name] for name in names}).items()
        }
    return replace(model, config=config_of(model.config, selection), tensors=tensors)


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
        prefix = "{}.layers.{}.moe.".format(*layer)
        rows = [model.tensors[prefix + name] for name in rows_of_experts(model.config.moe_of(*layer))]
        sizes[layer] = sum(tensor.element_size() * tensor[0].numel() for tensor in rows)
    return sizes


def bytes_of_model(model: StoredModel) -> int:
    """Bytes that a folder of this model takes at most, some KiB of JSON reckoned on the safe side."""
    weights = sum(BESIDE_EACH + tensor.element_size() * tensor.numel() for tensor in model.tensors.values())
    return BESIDE + weights + model.dictionary.stat().st_size + model.sentencepiece.stat().st_size
