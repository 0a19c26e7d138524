"""Iterators over batches: fixed ones for validation and decoding, and training epochs drawn by their first update."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from fairseq.data.iterators import CountingIterator, EpochBatchIterating
from numpy.typing import NDArray

from fairseq_plugins.tasks.parallel_dataset import ParallelDataset
from mtmoe.training.auto_curriculum import AutoCurriculum
from mtmoe.training.batching import NO_BATCHES, Batches
from mtmoe.training.curriculum import Schedule
from mtmoe.training.drawing import DRAW_BLOCK, EpochDrawer, Pass
from mtmoe.training.sampling import Pool, effective_epochs

logger = logging.getLogger(__name__)

Batch = NDArray[np.int64]

_NO_SENTENCES: Batch = np.zeros(0, dtype=np.int64)


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
        batches: all of them.
        num_shards: processes that share the batches.
        shard_id: which of them this is.
    """

    def __init__(self, dataset: ParallelDataset, batches: Batches, num_shards: int, shard_id: int) -> None:
        self.dataset, self.epoch = dataset, 1
        self.batches, self.num_shards, self.shard_id = batches, num_shards, shard_id
        self._current: CountingIterator | None = None

    @property
    def first_batch(self) -> Any:
        """A batch for ranks that have none left; one of the first sentences, since such a rank may never have one."""
        return self.dataset.collater(self.batches[0][:1]) if len(self.batches) else "DUMMY"

    def __len__(self) -> int:
        return -(-len(self.batches) // self.num_shards)

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
        self._current = CountingIterator(self._collated(), start=0, total=len(self))
        return self._current

    def end_of_epoch(self) -> bool:
        """Whether the current pass is through."""
        return self._current is not None and not self._current.has_next()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember but what fairseq asks for."""
        return {"epoch": self.epoch, "iterations_in_epoch": 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take back."""

    def _collated(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self)):
            yield self.dataset.collater(_batch_of(self.batches, 0, number, self.num_shards, self.shard_id))


class TrainingEpochs(EpochBatchIterating):
    """Epochs of training batches; each is a pure function of (seed, epoch, first update, active directions).

    An epoch holds sentences of the directions that are active at its first update, in the proportions of temperature
    sampling, in batches that mix directions, in random order. It ends where the next phase of the curriculum begins.
    `redraw` replaces what is left of it when the active directions have changed in between. More sentences than a block
    are drawn part by part, and each part is an epoch; see `mtmoe.training.drawing`.

    All processes draw the same batches, and process r of n takes every n-th one, from the r-th on. A run that goes on
    with another number of processes deals out anew what is left of the epoch: nothing is repeated or left out.

    Args:
        dataset: all training directions.
        schedule: which directions are active.
        pools: direction -> the sentences of it that the model can take.
        temperature: of sampling over directions.
        epoch_size: sentences of a pass; 0 = as many as the active directions have.
        seed: of the run.
        epoch: number of the first epoch, from 1.
        update_freq: micro-batches of an update, by epoch; the last value stays.
        num_shards: processes that share the batches.
        shard_id: which of them this is.
        progress: the task, whose counters are saved with the iterator.
        limits: ``max_tokens``, ``max_sentences`` and ``multiple`` of a batch.
        block: most sentences of an epoch.
        after: iterator of the epoch before, whose counts and whose pass over the data go on.
    """

    def __init__(
        self,
        dataset: ParallelDataset,
        schedule: Schedule | AutoCurriculum,
        pools: Mapping[str, Pool],
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
        block: int = DRAW_BLOCK,
        after: TrainingEpochs | None = None,
    ) -> None:
        self.dataset, self.schedule, self.progress = dataset, schedule, progress
        self.epoch, self.update_freq = max(epoch, 1), list(update_freq)
        self.num_shards, self.shard_id = num_shards, shard_id
        self.drawer = EpochDrawer(
            pools, temperature=temperature, epoch_size=epoch_size, seed=seed, block=block,
            cut=lambda sentences: dataset.batches(sentences, **limits),
        )  # fmt: skip
        self.usable = {name: len(pool) for name, pool in pools.items()}
        """Direction -> sentences of it that the model can take."""
        self.first_update = progress.progress()["num_updates"]
        self._seen = after.seen() if after is not None else dict.fromkeys(dataset.names, 0)
        """Direction -> sentences before the batches of `_drawn`."""
        self._pass = after.upcoming() if after is not None else None
        """The part that `_drawn` is or will be; None = a new pass begins."""
        self._drawn = NO_BATCHES
        """Batches of all processes."""
        self._wanted = 0
        """Batches of all processes that were asked for when the rest of an epoch was drawn anew; 0 = it was not."""
        self._dealt = 0
        """Batches of `_drawn` that all processes had taken when what followed was dealt out to this number of them."""
        self._first_batch = 0
        """Batches of the epoch that this process had taken then."""
        self.passes: dict[str, float] = {}
        """Direction -> effective epochs in the middle of the batches of `_drawn`; the same for a resumed run."""
        self._current: CountingIterator | None = None
        self._restored: CountingIterator | None = None

    @property
    def first_batch(self) -> Any:
        """A batch for ranks that have none left, maybe right after a resume: fairseq has seen none of theirs then."""
        pools = self.drawer.pools.values()
        return self.dataset.collater(next(pool.take(np.zeros(1, dtype=np.int64)) for pool in pools if len(pool)))

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
        if self._restored is not None:
            self._current, self._restored = self._restored, None
            return self._current
        self.epoch, following, self._seen = self.next_epoch_idx, self.upcoming(), self.seen()
        self.first_update = self.progress.progress()["num_updates"]
        active = self.schedule.active(self.first_update)
        if following is None or following.active != active or following.part >= self.drawer.parts(active):
            following = Pass(self.epoch, self.first_update, active)
        self._pass, self._wanted, self._dealt, self._first_batch = following, 0, 0, 0
        self._draw(self.first_update)
        self._current = self._start()
        return self._current

    def end_of_epoch(self) -> bool:
        """Whether the current epoch is through."""
        return self._current is not None and not self._current.has_next()

    def upcoming(self) -> Pass | None:
        """The part that the next epoch will be, or this one is where it is not through; None = of a new pass."""
        return self._pass.next() if self._pass is not None and self.end_of_epoch() else self._pass

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: enough to go on with the very next batch."""
        ended = self.end_of_epoch()
        upcoming = self.upcoming()
        state = {
            "version": 3,
            "epoch": self.epoch + 1 if ended else self.epoch,
            "iterations_in_epoch": 0 if ended else self.iterations_in_epoch,
            "shuffle": True,
            "first_update": self.first_update,
            "taken": 0 if ended else self._taken(),
            "wanted": 0 if ended else self._wanted,
            "pass": asdict(upcoming) if upcoming is not None else None,
            "num_shards": self.num_shards,
            "seen": self.seen() if ended else dict(self._seen),
            "progress": self.progress.progress(),
        }
        if isinstance(self.schedule, AutoCurriculum):
            state["curriculum"] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken; what is left of the epoch is dealt out to this number of processes.

        The epoch is drawn as it was, so data, seed, limits of a batch and block have to be the same as then.
        """
        self.epoch = state_dict["epoch"]
        if "progress" in state_dict:  # a checkpoint made from a model folder has no training behind it
            self.progress.restore(state_dict["progress"])
        if isinstance(self.schedule, AutoCurriculum) and "curriculum" in state_dict:
            self.schedule.load_state_dict(state_dict["curriculum"])
        self._seen |= {name: count for name, count in state_dict.get("seen", {}).items() if name in self._seen}
        self._current = self._restored = None
        iterations, shards = state_dict["iterations_in_epoch"], state_dict.get("num_shards", 1)
        if state_dict.get("version", 2) < 3:  # of mtmoe 0.1, which had no parts
            redrawn = state_dict.get("first_batch", 0)
            taken = (iterations - redrawn) * shards
            self._wanted = (state_dict["total"] - redrawn) * shards if redrawn else 0
            self._pass = None
        else:
            taken, self._wanted, stored = state_dict["taken"], state_dict["wanted"], state_dict["pass"]
            self._pass = Pass(**{**stored, "active": tuple(stored["active"])}) if stored is not None else None
        if iterations == 0 and taken == 0 and self._wanted == 0:
            return  # between two epochs
        self.first_update = state_dict["first_update"]
        if self._pass is None:
            self._pass = Pass(self.epoch, self.first_update, self.schedule.active(self.first_update))
        self._dealt = taken
        # fairseq counts updates in the epoch by this, rounded up: a whole number of them, or the last may be left out.
        freq = self._update_freq()
        self._first_batch = iterations * shards // self.num_shards // freq * freq
        self._draw(self.progress.progress()["num_updates"], self._wanted)
        self._restored = self._start()
        if not self._restored.has_next():  # other limits have made the epoch shorter than what was done of it
            self._seen, self._drawn, self._dealt = self.seen(), NO_BATCHES, 0
            self._restored, self._pass, self.epoch = None, self._pass.next(), self.epoch + 1

    def drawn(self) -> dict[str, int]:
        """Direction -> sentences of it in a pass over the directions that are active in the current epoch."""
        return self.drawer.quotas(self.schedule.active(self.first_update))

    def seen(self) -> dict[str, int]:
        """Direction -> sentences of it that have been trained on, since the start of the run."""
        counts = self._counted(self._drawn.head(self._taken()))
        return {name: count + counts[name] for name, count in self._seen.items()}

    def effective_epochs(self) -> dict[str, float]:
        """Direction -> how often the average sentence of it that the model can take has been trained on."""
        return effective_epochs(self.usable, self.seen())

    def redraw(self) -> None:
        """Draw what is left of the epoch anew, since other directions are active now; its length stays.

        The next epoch begins a new pass over the data.
        """
        if self._current is None or self.end_of_epoch():
            return  # the next epoch draws them
        done, total = self._current.n, self._current.total
        self._seen = self.seen()
        self._dealt, self._first_batch, self._wanted = 0, done, (total - done) * self.num_shards
        self.first_update = self.progress.progress()["num_updates"]
        self._pass = Pass(self.epoch, self.first_update, self.schedule.active(self.first_update))
        self._draw(self.first_update, self._wanted)

    def _taken(self) -> int:
        """Batches of `_drawn` that all processes together have taken."""
        taken = self._dealt + max(self.iterations_in_epoch - self._first_batch, 0) * self.num_shards
        return min(taken, len(self._drawn))

    def _update_freq(self) -> int:
        return self.update_freq[min(self.epoch, len(self.update_freq)) - 1]

    def _start(self) -> CountingIterator:
        """Deal out the batches from `_dealt` on, as what follows the first `_first_batch` of this process's epoch."""
        left = -(-(len(self._drawn) - self._dealt) // self.num_shards)
        return CountingIterator(
            self._collated(self._first_batch), start=self._first_batch, total=self._first_batch + left
        )

    def _draw(self, update: int, wanted: int = 0) -> None:
        """Draw the batches of all processes, up to the next phase.

        Args:
            update: that begins with batch `_dealt`.
            wanted: batches, by as many passes as it takes; 0 = those of the part that is due.
        """
        assert self._pass is not None
        batches = self.drawer.draw(self._pass, self.epoch, self.first_update, wanted)
        boundary = self.schedule.next_boundary(self.first_update)
        if boundary is not None:
            left = max(boundary - update, 0) * self._update_freq() * self.num_shards
            batches = batches.head(self._dealt + left)
        self._drawn = batches
        counts = self._counted(batches)
        self.passes = effective_epochs(
            self.usable, {name: seen + counts[name] / 2 for name, seen in self._seen.items()}
        )
        parts = self.drawer.parts(self._pass.active)
        logger.info(
            "epoch %d from update %d: %d sentences of %d directions, %d batches%s%s",
            self.epoch, self.first_update, len(batches.sentences), sum(map(bool, counts.values())), len(batches),
            "" if parts == 1 else f", part {self._pass.part + 1} of {parts} of a pass over the data",
            "" if boundary is None else f", more directions from update {boundary}",
        )  # fmt: skip

    def _counted(self, batches: Batches) -> dict[str, int]:
        """Direction -> sentences of it in some batches."""
        directions = self.dataset.directions_of(batches.sentences)
        counts = np.bincount(directions, minlength=len(self.dataset.names)).tolist()
        return dict(zip(self.dataset.names, counts, strict=True))

    def _collated(self, position: int) -> Iterator[dict[str, Any]]:
        """Batches from `position` on, as long as they are asked for; what is ahead may be drawn anew meanwhile."""
        while True:
            number = position - self._first_batch
            batch = _batch_of(self._drawn, self._dealt, number, self.num_shards, self.shard_id)
            yield self.dataset.collater(batch)
            position += 1


def _batch_of(batches: Batches, dealt: int, number: int, num_shards: int, shard_id: int) -> Batch:
    """The batch of one process, where every `num_shards`-th is its, counted from `dealt` on; the last may be empty."""
    place = dealt + number * num_shards + shard_id
    return batches[place] if place < len(batches) else _NO_SENTENCES
