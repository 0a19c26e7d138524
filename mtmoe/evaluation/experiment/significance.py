"""Is the mean difference over many directions more than the choice of test sentences?

A direction of a small language has some forty test sentences: alone it says nothing, but the directions of a bucket
have a thousand together. So all of them are resampled at once, each within itself, and the difference that is tested is
the mean over directions, and over the seeds that both configurations have. Both directions of a pair are tested on the
same sentence pairs, so these are drawn together.

Sources: Koehn 2004 (paired bootstrap); Post 2018 (sacrebleu, whose way from resamples to p this follows).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtmoe.errors import DataError
from mtmoe.evaluation.buckets import pair_of, split_direction
from mtmoe.evaluation.metrics import build_metric
from mtmoe.evaluation.significance import DEFAULT_SEED, wilcoxon

SAMPLES = 10_000
"""Resamples; the smallest p is 1 / (samples + 1), below 0.01 even after Holm's correction for twenty configurations."""

BETA_SQUARED = 4
"""chrF++ weighs recall as beta = 2 times as important as precision."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Resampled:
    """chrF++ of one run on one direction: as it is, and for each resample of the sentences."""

    score: float
    """Corpus chrF++ of all sentences."""
    samples: Floats
    """(samples,) chrF++ of each resample; equal numbers belong to equal sentences in every run."""


@dataclass(frozen=True, slots=True)
class MeanDifference:
    """How much better one configuration is on a group of directions."""

    difference: float
    """Mean over directions and common seeds, in chrF++."""
    by_seed: dict[int, float]
    """The same for each seed alone."""
    p_value: float
    """Two-sided, not yet corrected for many configurations."""
    low: float
    """Lower end of the 95 % interval over the choice of sentences."""
    high: float
    """Upper end of it."""
    directions: int
    """How many directions it is the mean of."""
    better: int
    """Directions in which the mean over seeds is higher."""
    worse: int
    """Directions in which it is lower."""
    wilcoxon_p: float
    """Of Wilcoxon's signed ranks over directions: would other directions gain too? Not corrected."""


class Bootstrap:
    """Resamples the sentences of each direction, the same way for every run.

    Args:
        references: direction -> the right translations.
        samples: resamples.
        seed: of the random numbers.
    """

    def __init__(
        self, references: Mapping[str, Sequence[str]], samples: int = SAMPLES, seed: int = DEFAULT_SEED
    ) -> None:
        self.references, self.samples, self.seed = references, samples, seed
        self._drawn: dict[tuple[str, int], NDArray[Any]] = {}

    def run(self, hypotheses: Mapping[str, Sequence[str]]) -> dict[str, Resampled]:
        """Score one run's outputs: direction -> chrF++ for each resample; directions without references are left out.

        Raises:
            DataError: a direction has more outputs than references, or none.
        """
        found = {}
        for direction, outputs in hypotheses.items():
            if direction not in self.references:
                continue
            references = self.references[direction][: len(outputs)]
            if not outputs or len(references) < len(outputs):
                raise DataError(
                    f"{direction} has {len(outputs)} outputs and {len(self.references[direction])} references"
                )
            statistics = chrf_statistics(outputs, references, split_direction(direction)[1])
            drawn = self._counts(direction, len(outputs)) @ statistics
            score = chrf_of(statistics.sum(axis=0, dtype=np.float64))
            found[direction] = Resampled(float(score), chrf_of(drawn).astype(np.float32))
        return found

    def _counts(self, direction: str, sentences: int) -> Floats:
        """(samples, sentences): how often each sentence is drawn; the same for both directions of a pair."""
        key = (pair_of(direction), sentences)
        if key not in self._drawn:
            rng = np.random.default_rng([self.seed, zlib.crc32(key[0].encode())])
            chosen = rng.integers(sentences, size=(self.samples, sentences))
            chosen += sentences * np.arange(self.samples)[:, None]
            drawn = np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape)
            # Kept for the other runs, in one byte where that holds them: 3 MB for 10,000 resamples of 300 sentences.
            self._drawn[key] = drawn.astype(np.min_scalar_type(int(drawn.max())))
        return self._drawn[key].astype(np.float32)  # whole numbers far below 2^24, so products and sums stay exact


def chrf_statistics(outputs: Sequence[str], references: Sequence[str], target: str) -> Floats:
    """Count sacrebleu's n-grams: (sentences, 3 x orders) of output, reference and match, whole numbers."""
    scorer = build_metric("chrf++", target)
    counted = scorer._extract_corpus_statistics(list(outputs), [list(references)])
    return np.asarray(counted, dtype=np.float32)


def chrf_of(statistics: NDArray[np.floating]) -> NDArray[np.float64]:
    """chrF++ of summed n-gram counts, as sacrebleu computes it: (…, 3 x orders) -> (…), 0 to 100.

    Source: Popović 2017; sacrebleu's ``CHRF`` with effective order.
    """
    counts = np.asarray(statistics, dtype=np.float64).reshape(*statistics.shape[:-1], -1, 3)
    output, reference, match = counts[..., 0], counts[..., 1], counts[..., 2]
    counted = (output > 0) & (reference > 0)  # orders longer than the text say nothing
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = (match * counted / np.maximum(output, 1)).sum(axis=-1) / orders
    recall = (match * counted / np.maximum(reference, 1)).sum(axis=-1) / orders
    bottom = BETA_SQUARED * precision + recall
    score: NDArray[np.float64] = 100 * (1 + BETA_SQUARED) * precision * recall / np.where(bottom > 0, bottom, 1)
    return score


def compare_groups(
    baseline: Mapping[int, Mapping[str, Resampled]],
    other: Mapping[int, Mapping[str, Resampled]],
    directions: Sequence[str],
) -> MeanDifference | None:
    """Test the mean difference over a group of directions.

    The p value is the share of resamples whose difference lies at least as far from their mean as 0 does: the bootstrap
    distribution, moved so that there is no difference.

    Args:
        baseline: seed -> direction -> scores.
        other: the same of the configuration to test.
        directions: the group.

    Returns:
        None where the two have no seed or no direction of the group in common.
    """
    seeds = sorted(baseline.keys() & other.keys())
    common = [
        direction
        for direction in directions
        if seeds and all(direction in scores[seed] for scores in (baseline, other) for seed in seeds)
    ]
    if not common:
        return None
    by_seed = {
        seed: float(np.mean([other[seed][one].score - baseline[seed][one].score for one in common])) for seed in seeds
    }
    difference = float(np.mean(list(by_seed.values())))
    drawn = np.zeros(len(baseline[seeds[0]][common[0]].samples))
    for seed in seeds:
        for one in common:
            drawn += other[seed][one].samples.astype(np.float64) - baseline[seed][one].samples
    drawn /= len(seeds) * len(common)
    # 1e-9: equal outputs give zeros everywhere and p = 1, and rounding must not change that.
    beyond = int((np.abs(drawn - drawn.mean()) >= abs(difference) - 1e-9).sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    p_value = (beyond + 1) / (len(drawn) + 1)
    by_direction = [
        float(np.mean([other[seed][one].score - baseline[seed][one].score for seed in seeds])) for one in common
    ]
    return MeanDifference(
        difference,
        by_seed,
        p_value,
        float(low),
        float(high),
        directions=len(common),
        better=sum(value > 0 for value in by_direction),
        worse=sum(value < 0 for value in by_direction),
        wilcoxon_p=wilcoxon(by_direction),
    )
