"""Pruned versions of one model, and what each is worth on text: what `mtmoe prune` and its experiment share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mtmoe.checkpoint import StoredModel
from mtmoe.checkpoint.expert_scores import METRICS, RANDOM, Scope, Scores, expert_usage, same_layers, score_experts
from mtmoe.checkpoint.expert_selection import (
    RULES,
    USUAL_MINIMUM,
    Budget,
    ExpertSelection,
    balanced,
    select_experts,
)
from mtmoe.checkpoint.merging import merge_experts
from mtmoe.checkpoint.pruning import drop_experts, experts_of, for_directions, least_of
from mtmoe.errors import DataError
from mtmoe.evaluation.metrics import build_metric
from mtmoe.evaluation.test_sets import TestSet
from mtmoe.inference import Translator
from mtmoe.routing_table import RoutingTable

METHODS = ("drop", "merge")
"""What becomes of experts that do not stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningOptions:
    """How experts are chosen and what becomes of the others."""

    metric: str = "importance"
    """What an expert is worth: a key of `METRICS`, or random."""
    rule: str = "layer"
    """layer: equally many in each layer; threshold: as many in each as a common threshold keeps."""
    balance: tuple[int, int] | None = None
    """Parts of encoder and decoder in the experts that stay; None leaves that to the rule."""
    minimum: int = USUAL_MINIMUM
    """Experts that a threshold leaves in each layer, if the budget allows."""
    method: str = "drop"
    """drop, or merge them into the most similar expert that stays."""
    seed: int = 1
    """Of the draw of metric random."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("metric", self.metric, (*METRICS, RANDOM)),
            ("selection", self.rule, tuple(RULES)),
            ("method", self.method, METHODS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; choose one of: {', '.join(allowed)}")
        if self.minimum < 0:
            raise ValueError(f"minimum={self.minimum} must not be negative")


class Pruner:
    """Gives the versions of a model that are left with so many experts.

    Args:
        model: stays as it is.
        table: of its routing.
        scope: the languages that the versions are for.
        options: how.

    Raises:
        DataError: the table is of another model, or has no token of a language of the scope.
        ValueError: the model is dense.
    """

    def __init__(self, model: StoredModel, table: RoutingTable, scope: Scope, options: PruningOptions) -> None:
        self.model, self.scope, self.options = model, scope, options
        self.experts = experts_of(model.config)
        self.least = least_of(model.config)
        if not self.experts:
            raise ValueError("the model is dense: it has no experts to remove")
        if not same_layers(table, self.experts):
            raise DataError(
                "the routing is of a model with other MoE layers or numbers of experts; count it for this one with "
                "`mtmoe routing`"
            )
        self.scores: Scores = score_experts(table, options.metric, scope, seed=options.seed)
        self.usage = expert_usage(table, scope)

    @property
    def total(self) -> int:
        """Experts of the model, over all layers."""
        return sum(self.experts.values())

    @property
    def fewest(self) -> int:
        """Experts without which the model cannot work."""
        return sum(self.least.values())

    def choose(self, budget: Budget) -> ExpertSelection:
        """The experts that stay with a budget.

        Raises:
            ValueError: the layers need more experts, or have fewer.
        """
        options = self.options
        if isinstance(budget, int) and options.balance is not None:
            budget = balanced(budget, self.experts, self.least, options.balance)
        return select_experts(self.scores, budget, self.least, rule=options.rule, minimum=options.minimum)

    def build(self, selection: ExpertSelection) -> StoredModel:
        """The model with these experts, for the directions of the scope."""
        if self.options.method == "merge":
            smaller = merge_experts(self.model, selection, self.usage)
        else:
            smaller = drop_experts(self.model, selection)
        return for_directions(smaller, self.scope.directions)


@dataclass(frozen=True, slots=True)
class Loss:
    """chrF++ that a pruned model has lost on some directions."""

    by_direction: Mapping[str, float]
    """Direction -> points lost; below 0 where it has gained."""

    @property
    def mean(self) -> float:
        """Over directions."""
        return sum(self.by_direction.values()) / len(self.by_direction)

    @property
    def worst(self) -> tuple[str, float]:
        """The direction that has lost most, and how much."""
        return max(self.by_direction.items(), key=lambda item: item[1])

    @classmethod
    def between(cls, before: Mapping[str, float], after: Mapping[str, float]) -> Loss:
        """What `after` has lost against `before`, direction by direction."""
        return cls({direction: score - after[direction] for direction, score in before.items()})


def translate_sets(
    model: StoredModel,
    test_sets: Sequence[TestSet],
    *,
    beam: int = 4,
    max_tokens: int = 2048,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> dict[str, list[str]]:
    """Translate the sources of test sets.

    Args:
        model: to translate with.
        test_sets: a direction each.
        beam: hypotheses kept.
        max_tokens: source tokens of a batch.
        device: torch's name of a device.
        dtype: float32 or bfloat16.
        progress: told of how many more segments are done.

    Returns:
        Direction -> translations, in the order of the sources.
    """
    translator = Translator.from_stored(model, device=device, dtype=dtype)
    outputs = {}
    for one in test_sets:
        outputs[one.direction] = translator.translate(
            one.sources, one.source, one.target, beam=beam, max_tokens=max_tokens
        )
        if progress is not None:
            progress(len(one.sources))
    return outputs


def chrf_of(outputs: Mapping[str, Sequence[str]], test_sets: Sequence[TestSet]) -> dict[str, float]:
    """chrF++ of outputs by direction, 0 to 100."""
    return {
        one.direction: float(
            build_metric("chrf++", one.target).corpus_score(outputs[one.direction], [one.references]).score
        )
        for one in test_sets
    }
