"""How much each expert of a model matters for some languages, from a table of its routing.

Sources: Koishekenov et al. 2023 (importance, activity, languages apart in encoder and decoder); Fedus et al. 2021 (the
summand of the load-balance loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtmoe.errors import DataError, UnknownLanguage
from mtmoe.routing_table import ANY, LayerRouting, RoutingTable, Sums

LayerKey = tuple[str, int]
"""A MoE layer: "encoder" or "decoder", and its number there, from 0."""

Scores = dict[LayerKey, Sums]
"""MoE layer -> (num_experts,) fp64, the greater the more worth keeping; not negative."""

METRICS: dict[str, Callable[[LayerRouting], Sums]] = {
    "top1": lambda layer: layer.top1,
    "top2": lambda layer: layer.top1 + layer.top2,
    "confidence": lambda layer: layer.conf1,
    "mean": lambda layer: layer.mean_probability,
    "load-balance": lambda layer: layer.top1 * layer.mean_probability,
    "importance": lambda layer: layer.top1 * np.exp(layer.conf1),
    "importance-plain": lambda layer: layer.top1 * layer.conf1,
    "importance-load-balance": lambda layer: layer.top1 * np.exp(layer.mean_probability),
}
"""Name -> (rows, num_experts) of a layer's statistics. In `importance` the confidence, between 0 and 1, is worth a
factor of 1 to e only: activity decides, and an expert that is chosen rarely but surely is not lost."""

RANDOM = "random"
"""The control: which experts stay is drawn."""

SCOPES = ("language", "pair", "set", "global")
"""Whose tokens count, see `Scope`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """The languages that a pruned model is for, and which rows of a table speak for them."""

    kind: str
    """language: source languages for the encoder and target languages for the decoder, over all their partners; pair:
    the given directions only; set: all directions among the languages; global: all directions."""
    sources: tuple[str, ...]
    """Source languages."""
    targets: tuple[str, ...]
    """Target languages."""
    directions: tuple[str, ...]
    """The given directions; those of the table among the given languages."""

    @classmethod
    def of(
        cls, table: RoutingTable, kind: str, *, languages: Sequence[str] = (), directions: Sequence[str] = ()
    ) -> Scope:
        """Say what is to be kept, by languages (both ways between all of them) or by directions.

        Args:
            table: of the model's routing.
            kind: one of `SCOPES`.
            languages: codes as the table has them.
            directions: as ``en-de``; any two of the table's languages.

        Raises:
            UnknownLanguage: the table has no such language; the text lists those that it has.
            DataError: the table has no direction that the kind needs.
            ValueError: an unknown kind, or not exactly one of `languages` and `directions` where the kind needs it.
        """
        if kind not in SCOPES:
            raise ValueError(f"scope={kind!r} is unknown; choose one of: {', '.join(SCOPES)}")
        rows = [row for row in table.rows if ANY not in row.split("-")]
        if kind == "global":
            if languages or directions:
                raise ValueError("scope='global' counts all directions: give neither languages nor directions")
            sources, targets = _sides(table.rows)
            return cls(kind=kind, sources=sources, targets=targets, directions=tuple(rows))
        if bool(languages) == bool(directions):
            raise ValueError(f"scope={kind!r} needs either languages or directions")
        sources, targets = _sides(directions) if directions else (tuple(languages), tuple(languages))
        known = set().union(*_sides(table.rows))
        unknown = [language for language in dict.fromkeys((*sources, *targets)) if language not in known]
        if unknown:
            raise UnknownLanguage(
                f"the routing has no language {', '.join(unknown)}; it has: {', '.join(sorted(known))}"
            )
        if kind == "set":
            sources = targets = tuple(dict.fromkeys((*sources, *targets)))
        chosen = tuple(directions) if directions and kind != "set" else _among(rows, sources, targets)
        if kind in ("pair", "set"):
            missing = [direction for direction in chosen if direction not in rows]
            if missing or not chosen:
                wanted = f"of {', '.join(missing)}" if missing else f"among {', '.join(sources)}"
                raise DataError(
                    f"scope={kind!r} needs routing of each direction, and there is none {wanted}; it has: "
                    f"{', '.join(rows) or 'languages only'}. scope='language' does with what partners there are"
                )
        return cls(kind=kind, sources=sources, targets=targets, directions=chosen)


def score_experts(table: RoutingTable, metric: str, scope: Scope, *, seed: int = 1) -> Scores:
    """Score the experts of every MoE layer.

    The metric is taken of each language or direction by itself and then averaged, so that one with much text does not
    decide for the others.

    Args:
        table: of the model's routing.
        metric: one of `METRICS`, or `RANDOM`.
        scope: whose tokens count.
        seed: of the draw of `RANDOM`.

    Raises:
        ValueError: the metric is unknown.
        DataError: the table has no token of a language that the scope needs.
    """
    if metric == RANDOM:
        return {
            (layer.side, layer.layer): np.random.default_rng((seed, number)).random(layer.num_experts)
            for number, layer in enumerate(table.layers)
        }
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; choose one of: {', '.join((*METRICS, RANDOM))}")
    return {(layer.side, layer.layer): METRICS[metric](layer).mean(axis=0) for layer in scoped_layers(table, scope)}


def expert_usage(table: RoutingTable, scope: Scope) -> Scores:
    """Share of the tokens of the scope that each expert sees, first or second choice, by layer; weights for merging."""
    return {
        (layer.side, layer.layer): (layer.top1 + layer.top2).mean(axis=0) for layer in scoped_layers(table, scope)
    }


def first_choices(table: RoutingTable, scope: Scope) -> Scores:
    """Share of the tokens of the scope whose first choice each expert is, by layer; sums to 1."""
    return score_experts(table, "top1", scope)


def scoped_layers(table: RoutingTable, scope: Scope) -> list[LayerRouting]:
    """The layers of a table, their rows cut down to those that a scope counts; rows without tokens are left out.

    Raises:
        DataError: nothing is left of a layer.
    """
    grouped = {"encoder": table.by_source(), "decoder": table.by_target()} if scope.kind == "language" else {}
    layers = []
    for number, layer in enumerate(table.layers):
        rows, wanted = table.rows, set(scope.directions)
        if scope.kind == "language":
            rows, layer = grouped[layer.side].rows, grouped[layer.side].layers[number]
            wanted = set(scope.sources if layer.side == "encoder" else scope.targets)
        elif scope.kind == "global":
            wanted = set(rows)
        index = [place for place, row in enumerate(rows) if row in wanted and layer.tokens[place]]
        absent = wanted.difference(rows[place] for place in index) if scope.kind != "global" else set()
        if absent or not index:
            raise DataError(
                f"the routing of {layer.name} has no token of {', '.join(sorted(absent)) or 'any direction'}; "
                "count it over text of these languages with `mtmoe routing`"
            )
        layers.append(layer.rows_of(index))
    return layers


def same_layers(table: RoutingTable, experts: Mapping[LayerKey, int]) -> bool:
    """Whether a table is of a model with these MoE layers and numbers of experts."""
    return {(layer.side, layer.layer): layer.num_experts for layer in table.layers} == dict(experts)


def _sides(directions: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Source and target languages of directions, each once."""
    pairs = [direction.partition("-") for direction in directions]
    sources, targets = (dict.fromkeys(pair[place] for pair in pairs if pair[place] != ANY) for place in (0, 2))
    return tuple(sources), tuple(targets)


def _among(rows: Sequence[str], sources: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    pairs = ((row, *row.split("-")) for row in rows)
    return tuple(row for row, source, target in pairs if source in sources and target in targets)
