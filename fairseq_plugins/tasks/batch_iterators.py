"""Iterators over batches: fixed ones for validation and decoding, and training epochs drawn by their first update."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from fairseq.data.iterators import CountingIterator, EpochBatchIterating
from numpy.typing import NDArray

from fairseq_plugins.tasks.parallel_dataset import ParallelDataset
from mtmoe.training.auto_curriculum import AutoCurriculum
from mtmoe.training.curriculum import Schedule
from mtmoe.training.sampling import draw_sentences, effective_epochs, epoch_quotas

logger = logging.getLogger(__name__)

Batch = NDArray[np.int64]


class Progress(Protocol):
    """What the iterator of training needs to know of the task, and saves for it."""

    def progress(self) -> dict[str, Any]:
        """What to store with the iterator; ``num_updates`` is a part of it."""

    def restore(self, counters: dict[str, Any]) -> None:
        """Take back what `progress` gave."""


class FixedBatches(EpochBatchIterating):
    """The same batches each time, without workers: a batch is gathered in a fraction of a millisecond.

    Args:
        dataset: where the sentences come from.
        batches: sentence numbers of each batch.
        num_shards: processes that share the batches.
        shard_id: which of them this is.
    """

    def __init__(self, dataset: ParallelDataset, batches: Sequence[Batch], num_shards: int, shard_id: int) -> None:
        self.dataset, self.epoch = dataset, 1
        self.batches = _shard(batches, num_shards, shard_id)
        self._current: CountingIterator | None = None

    @property
    def first_batch(self) -> Any:
        """A batch for ranks that have none left; fairseq then takes the first real one."""
        return "DUMMY"

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def next_epoch_idx(self) -> int:
        """Number of the next epoch; there is no first and last here."""
        return self.epoch

    @property
    def iterations_in_epoch(self) -> int:
        """Batches that have been taken from the current pass."""
        return self._current.n if self._current is not None else 0

    def next_epoch_itr(self, *_: Any, **__: Any) -> CountingIterator:
        """Begin a pass; fairseq's wishes about shuffling do not apply."""
        self._current = CountingIterator(_collated(self.dataset, self.batches), start=0, total=len(self.batches))
        return self._current

    def end_of_epoch(self) -> bool:
        """Whether the current pass is through."""
        return self._current is not None and not self._current.has_next()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember but what fairseq asks for."""
        return {"epoch": self.epoch, "iterations_in_epoch": 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take back."""


class TrainingEpochs(EpochBatchIterating):
    """Epochs of training batches; each is a pure function of (seed, epoch, first update, active directions).

    An epoch holds sentences of the directions that are active at its first update, in the proportions of temperature
    sampling, in batches that mix directions, in random order. It ends where the next phase of the curriculum begins.
    `redraw` replaces what is left of it when the active directions have changed in between.

    Args:
        dataset: all training directions.
        schedule: which directions are active.
        usable: (pairs,) bool: which sentences the model can take.
        temperature: of sampling over directions.
        epoch_size: sentences of an epoch; 0 = as many as the active directions have.
        seed: of the run.
        epoch: number of the first epoch, from 1.
        update_freq: micro-batches of an update, by epoch; the last value stays.
        num_shards: processes that share the batches.
        shard_id: which of them this is.
        progress: the task, whose counters are saved with the iterator.
        limits: ``max_tokens``, ``max_sentences`` and ``multiple`` of a batch.
        seen: direction -> sentences that were trained on before; what `seen` of the last epoch's iterator gave.
    """

    def __init__(
        self,
        dataset: ParallelDataset,
        schedule: Schedule | AutoCurriculum,
        usable: NDArray[np.bool_],
        *,
        temperature: float,
        epoch_size: int,
        seed: int,
        epoch: int,
        update_freq: Sequence[int],
        num_shards: int,
        shard_id: int,
        progress: Progress,
        limits: dict[str, Any],
        seen: Mapping[str, int] | None = None,
    ) -> None:
        self.dataset, self.schedule, self.progress, self.limits = dataset, schedule, progress, limits
        self.temperature, self.epoch_size, self.seed = temperature, epoch_size, seed
        self.epoch, self.update_freq = max(epoch, 1), list(update_freq)
        self.num_shards, self.shard_id = num_shards, shard_id
        self.pool = {
            name: np.flatnonzero(usable[dataset.first[i] : dataset.first[i + 1]]) + dataset.first[i]
            for i, name in enumerate(dataset.names)
        }
        self.first_update = progress.progress()["num_updates"]
        self._seen = {name: (seen or {}).get(name, 0) for name in dataset.names}
        """Direction -> sentences before the batches of `_drawn`."""
        self._drawn: list[Batch] = []
        """Batches of all processes, from `_first_batch` on."""
        self._mine: list[Batch] = []
        """Those of this process."""
        self.passes: dict[str, float] = {}
        """Direction -> effective epochs in the middle of the batches of `_drawn`; the same for a resumed run."""
        self._first_batch = 0
        """Batches that this process had taken from the epoch when the rest was drawn anew."""
        self._current: CountingIterator | None = None
        self._restored: CountingIterator | None = None

    @property
    def first_batch(self) -> Any:
        """A batch for ranks that have none left; fairseq then takes the first real one."""
        return "DUMMY"

    def __len__(self) -> int:
        current = self._restored or self._current
        return current.total if current is not None else 0

    @property
    def next_epoch_idx(self) -> int:
        """Number of the epoch that `next_epoch_itr` will give."""
        if self._restored is None and self._current is not None and self.end_of_epoch():
            return self.epoch + 1
        return self.epoch

    @property
    def iterations_in_epoch(self) -> int:
        """Batches of the epoch that this process has taken."""
        current = self._current or self._restored
        return current.n if current is not None else 0

    def next_epoch_itr(self, *_: Any, **__: Any) -> CountingIterator:
        """Begin the next epoch, or go on with a restored one; always shuffled, whatever fairseq wishes."""
        self.epoch = self.next_epoch_idx
        if self._restored is not None:
            self._current, self._restored = self._restored, None
        else:
            self._seen, self._first_batch = self.seen(), 0
            self.first_update = self.progress.progress()["num_updates"]
            self._current = self._start(self._batches(), 0)
        return self._current

    def end_of_epoch(self) -> bool:
        """Whether the current epoch is through."""
        return self._current is not None and not self._current.has_next()

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: enough to go on with the very next batch."""
        ended = self.end_of_epoch()
        state = {
            "version": 2,
            "epoch": self.epoch + 1 if ended else self.epoch,
            "iterations_in_epoch": 0 if ended else self.iterations_in_epoch,
            "shuffle": True,
            "first_update": self.first_update,
            "first_batch": 0 if ended else self._first_batch,
            "total": len(self),
            "num_shards": self.num_shards,
            "seen": self.seen() if ended else dict(self._seen),
            "progress": self.progress.progress(),
        }
        if isinstance(self.schedule, AutoCurriculum):
            state["curriculum"] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken; another number of processes takes the same batches from there."""
        self.epoch = state_dict["epoch"]
        if "progress" in state_dict:  # a checkpoint made from a model folder has no training behind it
            self.progress.restore(state_dict["progress"])
        if isinstance(self.schedule, AutoCurriculum) and "curriculum" in state_dict:
            self.schedule.load_state_dict(state_dict["curriculum"])
        self._seen |= {name: count for name, count in state_dict.get("seen", {}).items() if name in self._seen}

        def mine(batches: int) -> int:
            return batches * state_dict.get("num_shards", 1) // self.num_shards

        done = mine(state_dict["iterations_in_epoch"])
        self._current = self._restored = None
        if done > 0:
            self.first_update = state_dict["first_update"]
            self._first_batch = mine(state_dict.get("first_batch", 0))
            wanted = mine(state_dict["total"]) - self._first_batch if self._first_batch else 0
            self._restored = self._start(self._batches(wanted), done)
            if not self._restored.has_next():  # other limits have made the epoch shorter than what was done of it
                self._restored, self.epoch = None, self.epoch + 1

    def drawn(self) -> dict[str, int]:
        """Direction -> sentences of it in the current epoch."""
        sizes = {name: len(self.pool[name]) for name in self.schedule.active(self.first_update)}
        return epoch_quotas(sizes, self.temperature, self.epoch_size)

    def seen(self) -> dict[str, int]:
        """Direction -> sentences of it that have been trained on, since the start of the run."""
        taken = self._drawn[: max(self.iterations_in_epoch - self._first_batch, 0) * self.num_shards]
        counts = np.bincount(self.dataset.direction[np.concatenate(taken)]) if taken else ()
        added = dict(zip(self.dataset.names, map(int, counts), strict=False))
        return {name: count + added.get(name, 0) for name, count in self._seen.items()}

    def effective_epochs(self) -> dict[str, float]:
        """Direction -> how often the average sentence of it that the model can take has been trained on."""
        return effective_epochs({name: len(pool) for name, pool in self.pool.items()}, self.seen())

    def redraw(self) -> None:
        """Draw what is left of the epoch anew, since other directions are active now; its length stays."""
        if self._current is None or self.end_of_epoch():
            return  # the next epoch draws them
        done, total = self._current.n, self._current.total
        self._seen, self._first_batch = self.seen(), done
        self.first_update = self.progress.progress()["num_updates"]
        self._draw(self._batches(total - done))

    def _start(self, batches: list[Batch], offset: int) -> CountingIterator:
        """Go through `batches`, which follow the first `_first_batch` of the epoch, from batch `offset` of it on."""
        self._draw(batches)
        return CountingIterator(self._collated(offset), start=offset, total=self._first_batch + len(self._mine))

    def _draw(self, batches: list[Batch]) -> None:
        self._drawn, self._mine = batches, _shard(batches, self.num_shards, self.shard_id)
        counts = np.bincount(self.dataset.direction[np.concatenate(batches)], minlength=len(self.dataset.names))
        middle = {name: self._seen[name] + counts[i] / 2 for i, name in enumerate(self.dataset.names)}
        self.passes = effective_epochs({name: len(pool) for name, pool in self.pool.items()}, middle)

    def _collated(self, position: int) -> Iterator[dict[str, Any]]:
        """Batches from `position` on, as long as they are asked for; what is ahead may be drawn anew meanwhile."""
        while True:
            yield self.dataset.collater(self._mine[position - self._first_batch])
            position += 1

    def _batches(self, wanted: int = 0) -> list[Batch]:
        """Batches of all processes, in the order of training.

        Args:
            wanted: of each process; 0 = an epoch, up to the next phase.
        """
        generator = np.random.default_rng([self.seed, self.epoch, self.first_update])
        batches = self._draw_epoch(generator)
        while len(batches) < wanted * self.num_shards:
            batches += self._draw_epoch(generator)
        return batches[: wanted * self.num_shards] if wanted else batches

    def _draw_epoch(self, generator: np.random.Generator) -> list[Batch]:
        drawn = [
            self.pool[name][draw_sentences(len(self.pool[name]), quota, generator)]
            for name, quota in self.drawn().items()
            if quota
        ]
        sentences = np.concatenate(drawn)
        generator.shuffle(sentences)  # which of equally long sentences share a batch, differs between epochs
        batches = self.dataset.batches(sentences, **self.limits)
        batches = [batches[i] for i in generator.permutation(len(batches))]
        boundary = self.schedule.next_boundary(self.first_update)
        if boundary is not None:
            freq = self.update_freq[min(self.epoch, len(self.update_freq)) - 1]
            batches = batches[: (boundary - self.first_update) * freq * self.num_shards]
        logger.info(
            "epoch %d from update %d: %d sentences of %d directions, %d batches%s",
            self.epoch, self.first_update, sum(map(len, batches)), len(drawn), len(batches),
            "" if boundary is None else f", more directions from update {boundary}",
        )  # fmt: skip
        return batches


def _shard(batches: Sequence[Batch], num_shards: int, shard_id: int) -> list[Batch]:
    """Every num_shards-th batch; all shards get equally many, the last ones maybe an empty one."""
    mine = list(batches[shard_id::num_shards])
    if len(mine) * num_shards < len(batches):
        mine.append(np.zeros(0, dtype=np.int64))
    return mine


def _collated(dataset: ParallelDataset, batches: Sequence[Batch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield dataset.collater(batch)
