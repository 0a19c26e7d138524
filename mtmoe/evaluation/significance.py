"""Is a difference between two systems more than chance? Per direction, over directions, and corrected for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtmoe.errors import DataError
from mtmoe.evaluation.metrics import build_metric

METHODS = {"bootstrap": ("bs", 1000), "randomisation": ("ar", 10_000)}
"""Name -> (sacrebleu's name, resamples or trials by default)."""

DEFAULT_SEED = 12345
"""sacrebleu's own, so that its command gives the same p."""


@dataclass(frozen=True, slots=True)
class PairedResult:
    """One direction of two systems, on the same segments."""

    a: float
    """Score of the first system."""
    b: float
    """Score of the second system."""
    p_value: float
    """Chance of a difference at least this large if the systems were equal; two-sided, not yet corrected."""

    @property
    def difference(self) -> float:
        """How much better the second system is."""
        return self.b - self.a


def paired_test(
    outputs_a: Sequence[str],
    outputs_b: Sequence[str],
    references: Sequence[str],
    target: str,
    *,
    metric: str = "chrf++",
    method: str = "bootstrap",
    samples: int = 0,
    seed: int = DEFAULT_SEED,
) -> PairedResult:
    """Compare two systems on one direction with sacrebleu's paired test.

    Equal outputs, or equal scores, give p = 1: sacrebleu counts strictly larger differences only, and would call two
    identical systems different at p = 1 / (samples + 1).

    Args:
        outputs_a: translations of the first system, the baseline.
        outputs_b: translations of the second system, in the same order.
        references: the right translations, in the same order.
        target: language of the outputs.
        metric: "chrf++" or "bleu".
        method: "bootstrap" (Koehn 2004) or "randomisation" (approximate randomisation, Riezler and Maxwell 2005).
        samples: resamples or trials; 0 takes sacrebleu's default of 1,000 or 10,000.
        seed: of the random numbers, at least 1.

    Raises:
        ValueError: an unknown method or metric, or a seed below 1.
        DataError: the three differ in number, or there are none.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of: {', '.join(METHODS)}")
    if seed < 1:  # sacrebleu takes 0 for "no seed"
        raise ValueError(f"seed={seed} must be at least 1")
    if not references or not len(outputs_a) == len(outputs_b) == len(references):
        raise DataError(
            f"outputs of {len(outputs_a)} and {len(outputs_b)} segments and {len(references)} references "
            "cannot be compared in pairs"
        )
    scorer = build_metric(metric, target)
    from sacrebleu.significance import PairedTest

    if list(outputs_a) == list(outputs_b):
        score = scorer.corpus_score(outputs_a, [references]).score
        return PairedResult(score, score, 1.0)
    test_type, default_samples = METHODS[method]
    systems = [("a", outputs_a), ("b", outputs_b)]
    test = PairedTest(systems, {metric: scorer}, [references], test_type, samples or default_samples)
    test._seed = seed
    _, columns = test()
    results: list[Any] = next(values for name, values in columns.items() if name != "System")
    score_a, score_b = (float(result.score) for result in results)
    return PairedResult(score_a, score_b, 1.0 if score_a == score_b else float(results[1].p_value))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p values for being many (Holm 1979): the chance of one false alarm among all of them is kept.

    Returns:
        The same keys with corrected values, at most 1 and never below the given ones.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, (key, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * value))
        corrected[key] = largest
    return {key: corrected[key] for key in p_values}


def stars(p_value: float) -> str:
    """Mark a p value as tables do: ``***`` below 0.001, ``**`` below 0.01, ``*`` below 0.05, else nothing."""
    return "*" * sum(p_value < limit for limit in (0.05, 0.01, 0.001))


def wilcoxon(differences: Sequence[float]) -> float:
    """Test whether differences over directions are centred on zero (Wilcoxon's signed ranks, exact, two-sided).

    Ties get their mean rank and zeros are left out, and the distribution is counted out for those very ranks, so the
    value is exact for a handful of directions too, where the usual normal approximation is not.

    Args:
        differences: one of each direction.

    Returns:
        The p value; 1.0 where no direction differs.
    """
    values = np.array([value for value in differences if value != 0])
    if not len(values):
        return 1.0
    size = np.abs(values)
    # Twice the mean rank is a whole number: values below plus values up to, plus one.
    doubled = np.array([int((size < one).sum() + (size <= one).sum() + 1) for one in size])
    total = int(doubled.sum())
    # ways[s]: the share of the 2^n choices of signs whose positive (doubled) ranks sum to s.
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] = (ways[rank:] + ways[:-rank]) / 2
        ways[:rank] /= 2
    smaller = min(int(doubled[values > 0].sum()), int(doubled[values < 0].sum()))
    return min(1.0, 2 * float(ways[: smaller + 1].sum()))


def mean_interval(
    differences: Sequence[float], *, samples: int = 10_000, seed: int = DEFAULT_SEED
) -> tuple[float, float]:
    """95 % interval of the mean over directions, by drawing directions with replacement.

    Raises:
        ValueError: there are no differences.
    """
    if not differences:
        raise ValueError("mean_interval needs at least one difference, got none")
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(samples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
