"""Merge experts that go into experts that stay, instead of throwing their weights away.

Two experts may compute the same with their hidden units in another order, so an average of their weights as they are
would mix units that have nothing to do with each other. Units are therefore matched first.

Sources: Li et al. 2023 (Merge, then Compress: experts grouped around the most used ones, averaged by usage after
alignment); Ainsworth et al. 2022 (Git Re-Basin: alignment by weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mtmoe.checkpoint.expert_scores import LayerKey, Scores
from mtmoe.checkpoint.expert_selection import ExpertSelection
from mtmoe.checkpoint.pruning import EXPERTS, GATE, prefix_of, reshape_layers
from mtmoe.checkpoint.stored import StoredModel
from mtmoe.checkpoint.tensors import rows_of

W_IN, B_IN, W_OUT, B_OUT = EXPERTS


def merge_experts(model: StoredModel, selection: ExpertSelection, usage: Scores) -> StoredModel:
    """Merge each expert that a selection does not keep into the one that stays whose gate row is most like its own.

    That one gets most of its tokens, since they choose by the same rows. It becomes the average of its group by usage,
    hidden units aligned to its own; its row of the gate stays.

    Args:
        model: stays as it is.
        selection: of experts of this model.
        usage: share of the tokens that each expert sees; an expert that sees none has no part in an average.

    Raises:
        ValueError: the selection is of a model of another shape, or leaves a layer fewer experts than its top_k.
    """

    @cache
    def nearest(layer: LayerKey) -> list[int]:
        gate = model.tensors[prefix_of(layer) + GATE]
        return nearest_kept(gate, selection.kept[layer], selection.removed(layer))

    @lru_cache(maxsize=1)  # the rows of one weight are asked for together, and each needs the layer's other weights
    def merged(layer: LayerKey) -> dict[str, Tensor]:
        weights = {name: model.tensors[prefix_of(layer) + name] for name in EXPERTS}
        groups = [[expert] for expert in selection.kept[layer]]
        for expert, place in zip(selection.removed(layer), nearest(layer), strict=True):
            groups[place].append(expert)
        averages = [average(weights, group, [float(usage[layer][one]) for one in group]) for group in groups]
        return {name: torch.stack([one[name] for one in averages]) for name in EXPERTS}

    def rows(layer: LayerKey, name: str, begin: int, end: int) -> Tensor:
        if name in EXPERTS:
            return merged(layer)[name][begin:end]
        whole = prefix_of(layer) + name
        return torch.cat([rows_of(model.tensors, whole, old, old + 1) for old in selection.kept[layer][begin:end]])

    return reshape_layers(model, selection, rows)


def nearest_kept(gate: Tensor, kept: tuple[int, ...], removed: tuple[int, ...]) -> list[int]:
    """For each removed expert the place in `kept` of the expert with the most similar row (cosine).

    Args:
        gate: (num_experts, width) weights of the gate.
        kept: numbers of the experts that stay.
        removed: numbers of the others.
    """
    rows = F.normalize(gate.float(), dim=-1)
    similarity = rows[torch.tensor(removed, dtype=torch.int64)] @ rows[torch.tensor(kept)].T  # (removed, kept)
    return similarity.argmax(dim=1).tolist() if removed else []


def average(weights: Mapping[str, Tensor], group: list[int], usage: list[float]) -> dict[str, Tensor]:
    """Average a group of experts, hidden units matched to those of its first.

    Args:
        weights: w_in (num_experts, d_ffn, d_model), b_in (num_experts, d_ffn), w_out (num_experts, d_model, d_ffn) and
            b_out (num_experts, d_model), under their names in a layer.
        group: numbers of experts, that which stays first.
        usage: weight of each; where all are 0 the first counts alone.

    Returns:
        The weights of one expert, in the type of `weights`.
    """
    anchor = {name: weights[name][group[0]].float() for name in EXPERTS}
    total = sum(usage)
    if len(group) == 1 or total == 0 or usage[0] == total:
        return {name: weights[name][group[0]] for name in EXPERTS}
    mean = {name: tensor * (usage[0] / total) for name, tensor in anchor.items()}
    for expert, weight in zip(group[1:], usage[1:], strict=True):
        if weight == 0:
            continue
        other = {name: weights[name][expert].float() for name in EXPERTS}
        unit = match_units(anchor, other)
        for name, tensor in aligned(other, unit).items():
            mean[name] += tensor * (weight / total)
    return {name: tensor.to(weights[name].dtype) for name, tensor in mean.items()}


def match_units(anchor: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Match hidden units of two experts by the scalar product of all their weights.

    Greedy, the best pair first: at least half of what the best matching of all reaches where products are not
    negative, and a permuted copy is found exactly. Rounds of pairs that are each other's best give the same in a few
    dense operations.

    Args:
        anchor: w_in (d_ffn, d_model), b_in (d_ffn,), w_out (d_model, d_ffn) of one expert, under their names.
        other: the same of the other.

    Returns:
        (d_ffn,) int64: for each unit of `anchor` its partner among those of `other`, a permutation.
    """
    similarity = anchor[W_IN] @ other[W_IN].T + torch.outer(anchor[B_IN], other[B_IN]) + anchor[W_OUT].T @ other[W_OUT]
    partner = torch.full((len(similarity),), -1, dtype=torch.int64)
    rows, columns = torch.arange(len(similarity)), torch.arange(len(similarity))
    while len(rows):
        best_column = similarity.argmax(dim=1)
        best_row = similarity.argmax(dim=0)
        mutual = best_row[best_column] == torch.arange(len(rows))
        # The greatest entry of all is always a mutual pair, but for ties, whose order argmax may see differently.
        if not bool(mutual.any()):
            row = similarity.amax(dim=1).argmax()
            mutual = torch.zeros(len(rows), dtype=torch.bool)
            mutual[row] = True
        partner[rows[mutual]] = columns[best_column[mutual]]
        free = torch.ones(len(columns), dtype=torch.bool)
        free[best_column[mutual]] = False
        similarity = similarity[~mutual][:, free]
        rows, columns = rows[~mutual], columns[free]
    return partner


def aligned(expert: Mapping[str, Tensor], unit: Tensor) -> dict[str, Tensor]:
    """The same expert with its hidden units in another order: it computes what it did.

    Args:
        expert: its weights, under their names.
        unit: (d_ffn,) int64, a permutation: the old number of each new unit.
    """
    return {
        W_IN: expert[W_IN][unit],
        B_IN: expert[B_IN][unit],
        W_OUT: expert[W_OUT][:, unit],
        B_OUT: expert[B_OUT],
    }
