"""Which experts stay: a fixed number in each layer, or whatever a threshold common to all layers keeps.

Source: Koishekenov et al. 2023, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mtmoe.checkpoint.expert_scores import LayerKey, Scores
from mtmoe.routing_table import SIDES

USUAL_MINIMUM = 4
"""Experts that a threshold leaves in each layer at least, if the budget allows (Koishekenov et al. 2023)."""


@dataclass(frozen=True, slots=True)
class ExpertSelection:
    """The experts that stay, by the parent's numbers."""

    kept: Mapping[LayerKey, tuple[int, ...]]
    """MoE layer -> numbers of the experts that stay, rising."""
    num_experts: Mapping[LayerKey, int]
    """MoE layer -> experts of the parent."""

    @property
    def total(self) -> int:
        """Experts that stay, over all layers."""
        return sum(map(len, self.kept.values()))

    @property
    def is_all(self) -> bool:
        """Whether nothing goes."""
        return self.total == sum(self.num_experts.values())

    def removed(self, layer: LayerKey) -> tuple[int, ...]:
        """Numbers of the experts of a layer that go, rising."""
        kept = set(self.kept[layer])
        return tuple(expert for expert in range(self.num_experts[layer]) if expert not in kept)

    def share_kept(self, shares: Scores) -> dict[LayerKey, float]:
        """Sum of a share over the experts that stay, by layer, as of the tokens whose first choice they are."""
        return {layer: float(shares[layer][list(kept)].sum()) for layer, kept in self.kept.items()}


Budget = int | Mapping[str, int]
"""Experts to keep: over all layers, or those of the encoder and of the decoder apart."""


def select_experts(
    scores: Scores, budget: Budget, least: Mapping[LayerKey, int], *, rule: str = "layer", minimum: int = USUAL_MINIMUM
) -> ExpertSelection:
    """Choose the experts that stay: exactly as many as the budget says, the best ones by the rule.

    Args:
        scores: of all experts.
        budget: how many stay.
        least: MoE layer -> experts without which it cannot work: its top_k.
        rule: layer (the best of each layer, equally many in each as far as the budget divides) or threshold (see
            `by_threshold`).
        minimum: experts of each layer that the threshold keeps in any case; taken lower where the budget is too small
            for it.

    Raises:
        ValueError: the budget is below what the layers need or above what they have, or the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"selection={rule!r} is unknown; choose one of: {', '.join(RULES)}")
    sizes = {layer: len(score) for layer, score in scores.items()}
    kept: dict[LayerKey, tuple[int, ...]] = {}
    for name, layers, count in _groups(sizes, budget):
        check_budget(name, count, (sizes[layer] for layer in layers), (least[layer] for layer in layers))
        floor = {layer: min(sizes[layer], max(least[layer], min(minimum, count // len(layers)))) for layer in layers}
        if sum(floor.values()) > count:  # top_k differs between layers
            floor = {layer: least[layer] for layer in layers}
        ranked = {layer: np.argsort(-scores[layer], kind="stable") for layer in layers}
        counts = RULES[rule]({layer: scores[layer][ranked[layer]] for layer in layers}, count, floor)
        kept |= {layer: tuple(sorted(ranked[layer][: counts[layer]].tolist())) for layer in layers}
    return ExpertSelection({layer: kept[layer] for layer in scores}, sizes)


def balanced(
    total: int, sizes: Mapping[LayerKey, int], least: Mapping[LayerKey, int], ratio: tuple[int, int]
) -> Budget:
    """Divide a budget between encoder and decoder, as near to a ratio as their layers allow.

    Args:
        total: experts to keep.
        sizes: MoE layer -> experts it has.
        least: MoE layer -> experts it needs.
        ratio: parts of the encoder and of the decoder, as (3, 1).

    Raises:
        ValueError: the total is out of range, or no part of the ratio is above 0.
    """
    if min(ratio) < 0 or not sum(ratio):
        raise ValueError(f"balance={ratio[0]}:{ratio[1]} needs two parts, not below 0 and not both 0")
    check_budget("keep", total, sizes.values(), least.values())
    have, need = _by_side(sizes), _by_side(least)
    encoder = round(total * ratio[0] / sum(ratio))
    encoder = min(max(encoder, need["encoder"], total - have["decoder"]), have["encoder"], total - need["decoder"])
    return {"encoder": encoder, "decoder": total - encoder}


def check_budget(name: str, count: int, sizes: Iterable[int], least: Iterable[int]) -> None:
    """Refuse a number of experts that the layers cannot do with, or do not have.

    Raises:
        ValueError: names `name`, the number and the limits.
    """
    sizes, least = list(sizes), list(least)
    if count > sum(sizes):
        raise ValueError(f"{name}={count} experts, but there are only {sum(sizes)}")
    if count < sum(least):
        each = ", ".join(sorted({str(number) for number in least}))
        raise ValueError(
            f"{name}={count} of {sum(sizes)} experts is too few: each of the {len(sizes)} MoE layers needs its top_k "
            f"of {each}, that is {sum(least)} in all ({100 * sum(least) / sum(sizes):.1f} %)"
        )


def fixed_number(scores: Scores, count: int, floor: Mapping[LayerKey, int]) -> dict[LayerKey, int]:
    """Equally many in each layer.

    What does not divide goes to the first layers, and where a layer has too few experts to the others.

    Args:
        scores: MoE layer -> (num_experts,); only their number counts.
        count: experts to keep.
        floor: MoE layer -> experts to keep in any case.
    """
    counts = dict.fromkeys(scores, 0)
    while count:
        open_layers = [layer for layer in scores if counts[layer] < len(scores[layer])]
        each, rest = divmod(count, len(open_layers))
        for place, layer in enumerate(open_layers):
            more = min(each + (place < rest), len(scores[layer]) - counts[layer])
            counts[layer] += more
            count -= more
    return _lifted(counts, floor)


def by_threshold(scores: Scores, count: int, floor: Mapping[LayerKey, int]) -> dict[LayerKey, int]:
    """As many in each layer as a common threshold keeps.

    In each layer the scores are made to sum to 1. Its best `floor` experts stay; of the others those, from the best on,
    whose sum, their own included, is below a threshold, which is the one that keeps `count` in all. The paper raises it
    in steps of 0.001 and cuts the excess in layer order; here it is exact, and equal sums go to the earlier layer.

    Args:
        scores: MoE layer -> (num_experts,) from the best to the worst.
        count: experts to keep.
        floor: MoE layer -> experts to keep in any case.
    """
    candidates = []
    for place, (layer, score) in enumerate(scores.items()):
        share = score / (score.sum() or 1.0)
        sums = np.cumsum(share[floor[layer] :])
        candidates += [(float(total), place, layer) for total in sums]
    counts = {layer: floor[layer] for layer in scores}
    for _, _, layer in sorted(candidates)[: count - sum(floor.values())]:
        counts[layer] += 1
    return counts


RULES: dict[str, Callable[[Scores, int, Mapping[LayerKey, int]], dict[LayerKey, int]]] = {
    "layer": fixed_number,
    "threshold": by_threshold,
}
"""Name -> (scores of each layer from the best down, experts to keep, least of each layer) -> experts of each layer."""


def _by_side(counts: Mapping[LayerKey, int]) -> dict[str, int]:
    return {side: sum(count for (of, _), count in counts.items() if of == side) for side in SIDES}


def _lifted(counts: dict[LayerKey, int], floor: Mapping[LayerKey, int]) -> dict[LayerKey, int]:
    """Bring layers below their floor up to it, at the cost of the fullest ones."""
    for layer in counts:
        while counts[layer] < floor[layer]:
            giver = max(counts, key=lambda other: counts[other] - floor[other])
            counts[giver] -= 1
            counts[layer] += 1
    return counts


def _groups(sizes: Mapping[LayerKey, int], budget: Budget) -> list[tuple[str, list[LayerKey], int]]:
    """Layers that share a budget: its name, they, and the number."""
    if isinstance(budget, int):
        return [("keep", list(sizes), budget)]
    groups = []
    for side in SIDES:
        layers = [layer for layer in sizes if layer[0] == side]
        if layers and side not in budget:
            raise ValueError(f"the budget says nothing of the {side}, which has {len(layers)} MoE layers")
        if layers or budget.get(side, 0):
            groups.append((f"keep of the {side}", layers, budget[side]))
    return groups
