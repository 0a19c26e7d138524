"""Which sentences an epoch holds: temperature sampling over directions, and draws that depend on their key alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Pool:
    """The usable ones of consecutive sentences; memory goes to those that are not, or to nothing."""

    first: int
    """Number of the first sentence, usable or not."""
    size: int
    """Sentences, usable or not."""
    _gaps: NDArray[np.int64]
    """(unusable,) how many usable sentences stand before each of the others, rising"""

    @classmethod
    def without(cls, first: int, stop: int, refused: Sequence[NDArray[np.int64]]) -> Pool:
        """All sentences from `first` to before `stop` but the refused ones.

        Args:
            first: number of the first sentence.
            stop: number behind the last one.
            refused: numbers that are left out, rising, in any number of arrays.
        """
        numbers = np.concatenate([*refused, np.zeros(0, dtype=np.int64)])
        return cls(first, stop - first, numbers - first - np.arange(len(numbers)))

    def __len__(self) -> int:
        return self.size - len(self._gaps)

    def take(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the sentences at some places among the usable ones."""
        numbers = places + self.first
        if len(self._gaps):
            numbers += np.searchsorted(self._gaps, places, side="right")
        return numbers

    def all(self) -> NDArray[np.int64]:
        """Numbers of all usable sentences, rising."""
        return self.take(np.arange(len(self)))


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


def draw_part(size: int, start: int, stop: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Places `start` to `stop` of an endless random order of `size` sentences, without the rest of it.

    The order is one permutation of all sentences after another, so that any `size` places from a multiple of `size` on
    hold every sentence once, and parts that follow each other neither repeat nor leave out any. A part takes 16 bytes
    a place while it is drawn, however many sentences there are.

    Args:
        size: sentences of the direction.
        start: first place.
        stop: place behind the last one.
        key: of the order.

    Returns:
        (stop - start,) int64 sentence numbers.
    """
    drawn = np.empty(max(stop - start, 0), dtype=np.int64)
    done = 0
    while done < len(drawn):
        copy, place = divmod(start + done, size)
        count = min(size - place, len(drawn) - done)
        drawn[done : done + count] = permuted(size, np.arange(place, place + count), (*key, copy))
        done += count
    return drawn


_ROUNDS = 8
_CHUNK = 1 << 15
"""Numbers that are permuted at once, so that they stay in the cache."""


def permuted(size: int, numbers: NDArray[np.int64], key: tuple[int, ...]) -> NDArray[np.int64]:
    """Where a permutation of 0 … size - 1, which is a function of its key, takes some of its numbers.

    A number is a cell of a grid with about as many rows as columns and hardly more cells than numbers. Each round moves
    it along its row or its column, as far as a hash of the other coordinate says; what ends up outside goes on.

    Args:
        size: of the permutation, up to 2**62.
        numbers: (any,) int64, each below `size`.
        key: words that choose the permutation.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5 (generalised Feistel network)
    and section 4 (walking on).
    """
    rows = math.isqrt(max(size - 1, 0)) + 1
    columns = -(-size // rows)
    words = [np.uint64(_mixed((*key, number))) for number in range(_ROUNDS)]
    found = np.empty(len(numbers), dtype=np.int64)
    for start in range(0, len(numbers), _CHUNK):
        cells = _moved(numbers[start : start + _CHUNK].astype(np.uint64), rows, columns, words)
        outside = np.flatnonzero(cells >= size)
        while len(outside):
            cells[outside] = _moved(cells[outside], rows, columns, words)
            outside = outside[cells[outside] >= size]
        found[start : start + _CHUNK] = cells
    return found


def _moved(cells: NDArray[np.uint64], rows: int, columns: int, words: list[np.uint64]) -> NDArray[np.uint64]:
    """One pass of the cells through all rounds."""
    row, column = np.divmod(cells, np.uint64(columns))
    for number, word in enumerate(words):
        if number % 2:
            column = _step(column, row, columns, word)
        else:
            row = _step(row, column, rows, word)
    return row * np.uint64(columns) + column


def _step(moves: NDArray[np.uint64], other: NDArray[np.uint64], length: int, word: np.uint64) -> NDArray[np.uint64]:
    """Move along a line of `length` cells, as far as the other coordinate says."""
    hashed = other + word  # the finaliser of splitmix64; unsigned numbers wrap around
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    moved = moves + (((hashed >> np.uint64(32)) * np.uint64(length)) >> np.uint64(32))
    return np.where(moved >= length, moved - np.uint64(length), moved)


def keyed_uniform(*key: int) -> float:
    """A uniform number in [0, 1) that is a function of its key, so that a resumed run draws what an unbroken one does.

    The words of the key (seed, update number, micro-batch, rank, …) go through the finaliser of splitmix64, one after
    another; a microsecond, where a NumPy generator takes twenty to seed.
    """
    return (_mixed(key) >> 11) / float(1 << 53)


def _mixed(key: tuple[int, ...]) -> int:
    """64 bits that depend on every word of the key, and on their order."""
    state = 0x9E3779B97F4A7C15
    for word in key:
        state = (state ^ (word & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & _MASK
    return state
