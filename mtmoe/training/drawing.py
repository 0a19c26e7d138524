"""Draws epochs: which sentences of which directions, in which batches and order; large epochs part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mtmoe.training.batching import Batches
from mtmoe.training.sampling import Pool, draw_part, draw_sentences, epoch_quotas

DRAW_BLOCK = 1 << 22
"""Sentences that are drawn, sorted and cut into batches at once: 0.2 GB of memory for a moment, 35 MB to keep."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One part of a pass over the data; what fits into a block is a pass of one part."""

    epoch: int
    """Number of the epoch that its first part is."""
    update: int
    """Update at which its first part began."""
    active: tuple[str, ...]
    """Directions that it is drawn from."""
    part: int = 0
    """Number of this part."""

    def next(self) -> Pass:
        """The part that follows."""
        return replace(self, part=self.part + 1)


class EpochDrawer:
    """Draws epochs as pure functions of the seed, their number, their first update and the active directions.

    A pass has as many sentences of each direction as temperature sampling gives it. If all of them together are no more
    than a block, an epoch is a pass: permutations from a NumPy generator. If they are more, each part of the pass, at
    most a block, is an epoch of its own; its sentences are places of a keyed permutation of each direction, so that the
    parts of a pass together hold exactly what one large epoch would: with temperature 1, each sentence once.

    Args:
        pools: direction -> its usable sentences.
        temperature: of sampling over directions.
        epoch_size: sentences of a pass; 0 = as many as the active directions have.
        seed: of the run.
        block: most sentences of an epoch.
        cut: makes batches of like length out of sentences.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        *,
        temperature: float,
        epoch_size: int,
        seed: int,
        block: int,
        cut: Callable[[NDArray[np.int64]], Batches],
    ) -> None:
        if block < 1:
            raise ValueError(f"block={block} must be at least 1 sentence")
        self.pools, self.temperature, self.epoch_size = pools, temperature, epoch_size
        self.seed, self.block, self.cut = seed, block, cut
        self._number = {name: number for number, name in enumerate(pools)}

    def quotas(self, active: Sequence[str]) -> dict[str, int]:
        """Direction -> sentences of it in a pass over the active ones."""
        return epoch_quotas({name: len(self.pools[name]) for name in active}, self.temperature, self.epoch_size)

    def parts(self, active: Sequence[str]) -> int:
        """Into how many epochs a pass over the active directions is divided."""
        return -(-sum(self.quotas(active).values()) // self.block)

    def draw(self, begun: Pass, epoch: int, update: int, wanted: int = 0) -> Batches:
        """Batches of all processes, in the order of training.

        Args:
            begun: the part that is due.
            epoch: number of the epoch that it is.
            update: first update of the epoch.
            wanted: batches; the parts that follow are added until there are enough. 0 = those of the part.
        """
        generator = np.random.default_rng([self.seed, epoch, update])
        batches = self._draw_part(begun, generator)
        while len(batches) < wanted:
            begun = begun.next()
            batches = batches.followed_by(self._draw_part(begun, generator))
        return batches.head(wanted) if wanted else batches

    def _draw_part(self, begun: Pass, generator: np.random.Generator) -> Batches:
        parts = self.parts(begun.active)
        drawn = [
            self._draw_direction(name, quota, begun, parts, generator)
            for name, quota in self.quotas(begun.active).items()
            if quota
        ]
        sentences = np.concatenate(drawn)
        del drawn
        generator.shuffle(sentences)  # which of equally long sentences share a batch, differs between epochs
        batches = self.cut(sentences)
        return batches.reordered(generator.permutation(len(batches)))

    def _draw_direction(
        self, name: str, quota: int, begun: Pass, parts: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        pool = self.pools[name]
        if parts == 1 and len(pool) <= self.block:
            return pool.take(draw_sentences(len(pool), quota, generator))
        start, stop = (quota * part // parts for part in (begun.part, begun.part + 1))
        return pool.take(draw_part(len(pool), start, stop, (self.seed, begun.epoch, begun.update, self._number[name])))
