"""Pictures of what the gates of an experiment's models do with its languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtmoe.errors import UnknownLanguage
from mtmoe.evaluation.buckets import split_direction
from mtmoe.evaluation.experiment.figures import (
    COLOURS,
    MARKERS,
    Picture,
    drawing,
    heat_map,
    new_figure,
    percent_bar,
)
from mtmoe.evaluation.experiment.runs import Experiment, ExperimentRun
from mtmoe.evaluation.experiment.tables import ordered
from mtmoe.evaluation.routing import (
    COVERED,
    LanguageRouting,
    between_languages,
    cosine_similarity,
    expert_overlap,
    language_routing,
    routing_entropy,
    similarity_order,
)
from mtmoe.languages import name as language_name


@dataclass(frozen=True, slots=True)
class RoutingOf:
    """The routing of every seed of one configuration, layer by layer."""

    title: str
    """The configuration as people call it."""
    seeds: tuple[int, ...]
    """Of the trainings."""
    by_seed: tuple[list[LanguageRouting], ...]
    """For each seed its MoE layers; the same layers in all of them."""

    @classmethod
    def read(cls, runs: Sequence[ExperimentRun]) -> RoutingOf | None:
        """Read the tables of a configuration's runs; None where it has none."""
        tables = {run.seed: table for run in runs if (table := run.routing()) is not None}
        if not tables:
            return None
        layers = tuple(language_routing(table) for table in tables.values())
        return cls(runs[0].title, tuple(tables), layers)

    @property
    def layers(self) -> list[LanguageRouting]:
        """Of the first seed."""
        return self.by_seed[0]

    def mean(self, layer: int, figure: Any) -> NDArray[np.float64]:
        """Mean over seeds of a figure of a layer's (languages, num_experts) shares."""
        values: NDArray[np.float64] = np.mean([figure(one[layer].top1) for one in self.by_seed], axis=0)
        return values


def language_label(code: str, pairs: Mapping[str, int]) -> str:
    """A language and how many sentence pairs it was trained with, all its pairs together."""
    total = sum(count for direction, count in pairs.items() if split_direction(direction)[0] == code)
    try:
        name = language_name(code)
    except UnknownLanguage:
        name = code
    return f"{name} ({total:,})" if total else name


def by_resource(languages: Sequence[str], pairs: Mapping[str, int]) -> list[int]:
    """Places of the languages, those with most training pairs first."""
    totals = [
        sum(count for direction, count in pairs.items() if split_direction(direction)[0] == code) for code in languages
    ]
    return sorted(range(len(languages)), key=lambda index: (-totals[index], languages[index]))


def plot_experts(experiment: Experiment, config: str) -> Picture | None:
    """Language x expert heat map of each layer, of the first seed; None for a model without experts."""
    routing = RoutingOf.read(experiment.configs[config])
    if routing is None:
        return None
    layers = routing.layers
    top = max(float(layer.top1.max()) for layer in layers)
    with drawing():
        width = sum(0.24 * layer.top1.shape[1] + 1.9 for layer in layers)
        most = max(len(layer.languages) for layer in layers)
        figure = new_figure(width, 0.26 * most + 1.3)
        axes = figure.subplots(1, len(layers), squeeze=False)[0]
        for axis, layer in zip(axes, layers, strict=True):
            rows = by_resource(layer.languages, experiment.pairs)
            values = layer.top1[rows]
            # Experts have no order of their own: those that the same languages use stand together.
            columns = np.lexsort((-values.max(axis=0), values.argmax(axis=0)))
            labels = [language_label(layer.languages[row], experiment.pairs) for row in rows]
            image = heat_map(axis, values[:, columns], labels, [str(column) for column in columns], top=top)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_title(f"{layer.name}, by {_side(layer)} language")
            axis.set_xlabel("expert")
        percent_bar(figure, image, axes, "share of first choices")
    return Picture(
        f"{experiment.name}-experts-{config}",
        f"{routing.title}, seed {routing.seeds[0]}: share of a language's tokens that choose an expert first; with a "
        f"language, its training pairs. An even share is {_even(layers)}.",
        figure,
    )


def plot_similarity(experiment: Experiment, config: str) -> Picture | None:
    """Cosine similarity of languages by routing, and overlap of their experts, by layer; None without experts."""
    routing = RoutingOf.read(experiment.configs[config])
    if routing is None or min(len(layer.languages) for layer in routing.layers) < 2:
        return None
    layers, kinds = routing.layers, (("cosine similarity", cosine_similarity), ("overlap of experts", expert_overlap))
    with drawing():
        size = 0.3 * max(len(layer.languages) for layer in layers) + 0.9
        figure = new_figure((size + 0.3) * len(layers) + 1.0, (size + 0.1) * len(kinds) + 0.3)
        axes = figure.subplots(len(kinds), len(layers), squeeze=False)
        for column, layer in enumerate(layers):
            order = similarity_order(routing.mean(column, cosine_similarity))
            names = [layer.languages[index] for index in order]
            for axis, (kind, figure_of) in zip(axes[:, column], kinds, strict=True):
                values = routing.mean(column, figure_of)[np.ix_(order, order)]
                image = heat_map(axis, values, names, names, numbers=True)
                axis.set_title(f"{layer.name}, {kind}")
        percent_bar(figure, image, axes, "similarity, overlap")
    return Picture(
        f"{experiment.name}-similarity-{config}",
        f"{routing.title}, mean over {_seeds(routing)}: how alike two languages use the experts, in percent. Above, "
        "cosine of their shares of first choices; below, experts in common among those that cover "
        f"{100 * COVERED:.0f} % of a language's tokens (Jaccard). Source languages in the encoder, target languages in "
        "the decoder; similar ones stand together.",
        figure,
    )


def plot_shared(experiment: Experiment, results: Mapping[str, Any]) -> Picture | None:
    """Share that CMR gives to the shared network, by language and layer; None where no configuration has CMR."""
    found = []
    for config in ordered(results):
        routing = RoutingOf.read(experiment.configs[config])
        if routing is not None and all(layer.shared is not None for layer in routing.layers):
            found.append(routing)
    if not found:
        return None
    codes = sorted({code for routing in found for layer in routing.layers for code in layer.languages})
    languages = [codes[index] for index in by_resource(codes, experiment.pairs)]
    with drawing():
        width = sum(0.62 * len(routing.layers) + 0.5 for routing in found) + 2.6
        figure = new_figure(max(4.2, width), 0.27 * len(languages) + 1.5)
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axis, routing in zip(axes, found, strict=True):
            columns = [layer.name.replace(" ", "\n") for layer in routing.layers]
            labels = [language_label(code, experiment.pairs) for code in languages]
            image = heat_map(axis, _shared(routing, languages), labels, columns, numbers=True)
            axis.set_title(routing.title, fontsize=9)
        percent_bar(figure, image, axes, "to the shared network")
    return Picture(
        f"{experiment.name}-shared",
        "CMR: share that a language's tokens give to the shared network, in percent, mean over tokens and seeds; the "
        "rest goes to the experts. Source languages in the encoder, target languages in the decoder, with their "
        "training pairs.",
        figure,
    )


def _shared(routing: RoutingOf, languages: Sequence[str]) -> NDArray[np.float64]:
    values = np.full((len(languages), len(routing.layers)), np.nan)
    for column, layer in enumerate(routing.layers):
        of_seeds: list[Any] = [one[column].shared for one in routing.by_seed]
        shares = np.mean(of_seeds, axis=0)
        for code, share in zip(layer.languages, shares, strict=True):
            values[languages.index(code), column] = share
    return values


def plot_specialisation(experiment: Experiment, results: Mapping[str, Any]) -> Picture | None:
    """How widely and how alike languages use the experts, by configuration and layer; None without experts."""
    found = [
        routing for config in ordered(results) if (routing := RoutingOf.read(experiment.configs[config])) is not None
    ]
    if not found:
        return None
    kinds = (
        ("similarity of languages", lambda top1: between_languages(cosine_similarity(top1))),
        ("overlap of their experts", lambda top1: between_languages(expert_overlap(top1))),
        ("entropy of a language, bits", lambda top1: float(routing_entropy(top1).mean())),
    )
    layer_names = list(dict.fromkeys(layer.name for routing in found for layer in routing.layers))
    with drawing():
        figure = new_figure(10.0, 0.3 * len(found) + 1.4)
        axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axis, (kind, figure_of) in zip(axes, kinds, strict=True):
            for number, name in enumerate(layer_names):
                points = [
                    (float(routing.mean(column, figure_of)), place)
                    for place, routing in enumerate(found)
                    for column, layer in enumerate(routing.layers)
                    if layer.name == name
                ]
                style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                axis.plot(*zip(*points, strict=True), linestyle="", markersize=6, label=name, **style)
            axis.set_xlabel(kind)
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.set_xlim(0, 1.08 * axis.dataLim.x1)  # room for the last marker
        axes[0].set_yticks(range(len(found)), [routing.title for routing in found])
        axes[0].invert_yaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(layer_names), frameon=False)
    return Picture(
        f"{experiment.name}-specialisation",
        "How languages share experts, by layer, mean over seeds: cosine similarity of two languages' first choices and "
        f"Jaccard overlap of the experts that cover {100 * COVERED:.0f} % of their tokens (both 1 when all languages "
        "use the same experts), and the entropy of a language's first choices (an even use of all experts is "
        f"{_most_bits(found)}).",
        figure,
    )


def _side(layer: LanguageRouting) -> str:
    return "source" if layer.name.startswith("encoder") else "target"


def _seeds(routing: RoutingOf) -> str:
    return "1 seed" if len(routing.seeds) == 1 else f"{len(routing.seeds)} seeds"


def _even(layers: Sequence[LanguageRouting]) -> str:
    return " or ".join(f"{100 / experts:.1f} %" for experts in sorted({layer.top1.shape[1] for layer in layers}))


def _most_bits(found: Sequence[RoutingOf]) -> str:
    counts = sorted({layer.top1.shape[1] for routing in found for layer in routing.layers})
    return " or ".join(f"{np.log2(count):.1f}" for count in counts)
