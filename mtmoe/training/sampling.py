"""Which sentences an epoch holds: temperature sampling over directions, and draws that depend on their key alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def temperature_probabilities(sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Share of the training sentences that each direction gets: ``P(d)`` in proportion to ``n_d ** (1 / temperature)``.

    Args:
        sizes: direction -> number of its training sentences; a direction without sentences gets 0.
        temperature: 1 keeps the proportions of the data, larger flattens them, ``inf`` makes them equal.

    Returns:
        Direction -> probability; they sum to 1.

    Raises:
        ValueError: the temperature is not positive, or there are no sentences at all.

    Source: Arivazhagan et al. 2019; NLLB-200 trains with temperature 1.
    """
    if not temperature > 0:
        raise ValueError(f"sampling temperature {temperature} must be above 0; 1 keeps the proportions of the data")
    total = sum(sizes.values())
    if total <= 0:
        names = ", ".join(sizes) or "none given"
        raise ValueError(f"none of the {len(sizes)} directions has training sentences: {names}")
    # Shares first: n ** (1 / T) of raw counts overflows for a small T.
    weights = {name: (size / total) ** (1.0 / temperature) if size > 0 else 0.0 for name, size in sizes.items()}
    norm = sum(weights.values())
    return {name: weight / norm for name, weight in weights.items()}


def epoch_quotas(sizes: Mapping[str, int], temperature: float, epoch_size: int = 0) -> dict[str, int]:
    """How many sentences of each direction one epoch holds; the quotas sum to `epoch_size`.

    Args:
        sizes: direction -> number of its training sentences.
        temperature: as in `temperature_probabilities`.
        epoch_size: sentences in an epoch; 0 = as many as there are, so that temperature 1 takes each exactly once.

    Returns:
        Direction -> sentences; rounded by largest remainder, so the result does not depend on the order of `sizes`.
    """
    total = epoch_size or sum(sizes.values())
    shares = {name: share * total for name, share in temperature_probabilities(sizes, temperature).items()}
    quotas = {name: int(share + 1e-9) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (quotas[name] - shares[name], name))
    for name in by_remainder[: total - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def effective_epochs(sizes: Mapping[str, int], drawn: Mapping[str, float]) -> dict[str, float]:
    """How often the average sentence of each direction has been seen: ``drawn / size``; 0 for an empty direction."""
    return {name: drawn.get(name, 0) / size if size else 0.0 for name, size in sizes.items()}


def draw_sentences(size: int, quota: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw `quota` of `size` sentences with as few repetitions as can be: whole copies, then a random part.

    Returns:
        (quota,) int64 sentence numbers, in random order inside each copy.
    """
    copies, rest = divmod(quota, size)
    parts = [generator.permutation(size) for _ in range(copies)]
    if rest:
        parts.append(generator.permutation(size)[:rest])
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def keyed_uniform(*key: int) -> float:
    """A uniform number in [0, 1) that is a function of its key, so that a resumed run draws what an unbroken one does.

    The words of the key (seed, update number, micro-batch, rank, …) go through the finaliser of splitmix64, one after
    another; a microsecond, where a NumPy generator takes twenty to seed.
    """
    state = 0x9E3779B97F4A7C15
    for word in key:
        state = (state ^ (word & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & _MASK
    return (state >> 11) / float(1 << 53)
