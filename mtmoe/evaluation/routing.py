"""What the routing of a model says about its languages: who shares experts with whom, and how widely.

Encoder layers are read by source language and decoder layers by target language, which is what each depends on most.
All figures but the shares themselves stay the same when experts are renumbered, so they can be averaged over seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtmoe.routing_table import RoutingTable

Matrix = NDArray[np.float64]

COVERED = 0.8
"""Share of a language's tokens that its "own" experts take together."""


@dataclass(frozen=True, slots=True)
class LanguageRouting:
    """One MoE layer, by the language on its side."""

    name: str
    """Of the layer, such as ``encoder 1``."""
    languages: tuple[str, ...]
    """Source languages in an encoder, target languages in a decoder."""
    top1: Matrix
    """(languages, num_experts) share of the tokens whose first choice an expert is; rows sum to 1."""
    load: Matrix
    """(languages, num_experts) share of all choices, first and second, that an expert takes; rows sum to 1."""
    shared: Matrix | None
    """(languages,) share that CMR gives to the shared network, 0 to 1; None without CMR."""


def language_routing(table: RoutingTable) -> list[LanguageRouting]:
    """Sum a table of directions up by language, layer by layer; languages without tokens are left out."""
    grouped = {"encoder": table.by_source(), "decoder": table.by_target()}
    found = []
    for number, layer in enumerate(table.layers):
        rows = grouped[layer.side].rows
        of_language = grouped[layer.side].layers[number]
        seen = np.flatnonzero(of_language.tokens)
        experts = of_language.experts_share
        found.append(
            LanguageRouting(
                layer.name,
                tuple(rows[index] for index in seen),
                of_language.top1[seen],
                of_language.load[seen],
                None if experts is None else 1 - experts[seen],
            )
        )
    return found


def cosine_similarity(top1: Matrix) -> Matrix:
    """How alike languages use the experts: (languages, num_experts) -> (languages, languages), 0 to 1."""
    length = np.linalg.norm(top1, axis=1, keepdims=True)
    unit = top1 / np.where(length > 0, length, 1)
    similarity: Matrix = np.clip(unit @ unit.T, 0, 1)
    return similarity


def own_experts(top1: Matrix, covered: float = COVERED) -> NDArray[np.bool_]:
    """Mark the fewest experts that take at least `covered` of a language's tokens.

    Args:
        top1: (languages, num_experts) shares; rows sum to 1.
        covered: share of the tokens, 0 to 1.

    Returns:
        (languages, num_experts), True for a language's own experts.
    """
    order = np.argsort(-top1, axis=1, kind="stable")
    before = np.cumsum(np.take_along_axis(top1, order, axis=1), axis=1) - np.take_along_axis(top1, order, axis=1)
    own = np.zeros(top1.shape, dtype=bool)
    # 1e-12: 0.5 + 0.3 must count as 0.8.
    np.put_along_axis(own, order, before < covered - 1e-12, axis=1)
    return own


def expert_overlap(top1: Matrix, covered: float = COVERED) -> Matrix:
    """Jaccard overlap of languages' own experts: shared ones over all of both, (languages, languages), 0 to 1."""
    own = own_experts(top1, covered).astype(np.float64)
    both = own @ own.T
    size = own.sum(axis=1)
    overlap: Matrix = both / np.maximum(size[:, None] + size[None, :] - both, 1)
    return overlap


def routing_entropy(top1: Matrix) -> Matrix:
    """Bits of entropy of each language's shares: 0 when one expert takes all, log2(num_experts) when even."""
    logarithm = np.log2(top1, out=np.zeros_like(top1), where=top1 > 0)
    entropy: Matrix = -(top1 * logarithm).sum(axis=1)
    return entropy


def between_languages(matrix: Matrix) -> float:
    """Mean of a (languages, languages) matrix over pairs of two different languages; nan where there is one only."""
    count = len(matrix)
    if count < 2:
        return float("nan")
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


def similarity_order(similarity: Matrix) -> NDArray[np.int64]:
    """An order of the languages that puts similar ones side by side, for pictures.

    Sorted by the Fiedler vector of the similarities' graph, whose sign is fixed by its largest entry.

    Source: Atkins, Boman and Hendrickson 1998 (spectral seriation).
    """
    if len(similarity) < 3:
        return np.arange(len(similarity))
    laplacian = np.diag(similarity.sum(axis=1)) - similarity
    vector = np.linalg.eigh(laplacian)[1][:, 1]
    vector = vector * np.sign(vector[np.abs(vector).argmax()])
    return np.argsort(vector, kind="stable")
