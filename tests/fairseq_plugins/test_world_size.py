"""Several processes draw alike, and a run may go on with another number of them: every sentence counts once."""

import json
from collections import Counter

import numpy as np
import pytest
from fairseq.data.iterators import GroupedIterator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.schedules import ChosenDirections

import fairseq_plugins  # noqa: F401
from fairseq_plugins.tasks.batch_iterators import TrainingEpochs
from fairseq_plugins.tasks.parallel_dataset import Direction, ParallelDataset, Side
from mtmoe.training.curriculum import Schedule

NAMES = ["de-en", "en-de", "en-fr"]


def make_dataset(sizes, seed=0):
    generator = np.random.default_rng(seed)
    directions = []
    for number, (name, size) in enumerate(zip(NAMES, sizes, strict=False)):
        sides = []
        for _ in range(2):
            lengths = generator.integers(1, 12, size)
            sides.append(Side(generator.integers(4, 40, lengths.sum()).astype(np.uint16), lengths))
        directions.append(Direction(name, *sides, 40, 41, number))
    return ParallelDataset(directions, pad=1, training=True)


class Progress:
    def __init__(self):
        self.updates = 0

    def progress(self):
        return {"num_updates": self.updates}

    def restore(self, counters):
        self.updates = counters["num_updates"]


class Run:
    """The processes of a run, in step: what each trains on, update by update, as fairseq goes through the iterators."""

    def __init__(self, dataset, shards, freq, state=None, starts=None, auto=None, **options):
        self.dataset, self.shards, self.freq, self.options = dataset, shards, freq, options
        self.starts, self.auto = starts or dict.fromkeys(dataset.names, 0), auto
        self.ranks = [Progress() for _ in range(shards)]
        self.epochs = [self.make(rank, 1) for rank in range(shards)]
        self.trained = []
        """Of each update its sentences."""
        self.begun = []
        """Updates at which epochs began."""
        for each in self.epochs:
            if state is not None:
                each.load_state_dict(json.loads(json.dumps(state)))

    def make(self, rank, epoch, after=None):
        given = {"temperature": 1.0, "epoch_size": 0, "block": 10**6, **self.options}
        return TrainingEpochs(
            self.dataset, ChosenDirections(self.auto) if self.auto else Schedule(self.starts),
            self.dataset.usable(None, None)[0],
            seed=3, epoch=epoch, update_freq=[self.freq], num_shards=self.shards, shard_id=rank,
            progress=self.ranks[rank], limits={"max_tokens": 40, "max_sentences": None, "multiple": 1}, after=after,
            **given,
        )  # fmt: skip

    def state(self):
        states = [json.dumps(each.state_dict()) for each in self.epochs]
        assert len(set(states)) == 1
        assert len({json.dumps([each.passes, each.seen(), each.drawn()]) for each in self.epochs}) == 1
        return json.loads(states[0])

    def go(self, updates, epochs=10**9, at=None):
        """Train for some updates, or to the end of some epochs; `at` is called after each update.

        Returns:
            Whether the epochs were not through.
        """
        for _ in range(epochs):
            if not updates:
                return True
            self.begun.append(self.ranks[0].updates)
            groups = [GroupedIterator(each.next_epoch_itr(), self.freq) for each in self.epochs]
            while groups[0].has_next():
                samples = [sample for group in groups for sample in next(group)]
                self.trained.append(np.concatenate([sample["id"].numpy() for sample in samples if sample]).tolist())
                for rank in self.ranks:
                    rank.updates += 1
                if at is not None:
                    at(self)
                updates -= 1
                if not updates and groups[0].has_next():
                    return True
            assert all(each.end_of_epoch() for each in self.epochs)
            assert not any(group.has_next() for group in groups)
            self.state()
            self.epochs = [self.make(rank, each.next_epoch_idx, each) for rank, each in enumerate(self.epochs)]
        return False

    def counts(self):
        return Counter(number for update in self.trained for number in update)


worlds = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=5)
sizes = st.lists(st.integers(1, 60), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(sizes, worlds, st.sampled_from([10**6, 50, 17]), st.integers(1, 2))
def test_no_sentence_is_repeated_or_left_out_whatever_the_number_of_processes(sizes, worlds, block, passes):
    """Stop anywhere, go on with other numbers of processes and of micro-batches: all that counts is the pass."""
    dataset = make_dataset(sizes)
    parts = -(-sum(sizes) // block)
    counts, state, left = Counter(), None, passes * parts
    for shards, freq, updates in [*worlds, (2, 2, 10**9)]:
        run = Run(dataset, shards, freq, state, block=block)
        before = run.epochs[0].epoch
        stopped = run.go(updates, left - before + 1)
        counts += run.counts()
        state = run.state()
        if not stopped:
            break
    assert state["epoch"] == left + 1
    assert counts == dict.fromkeys(range(sum(sizes)), passes)
    assert state["seen"] == {name: passes * size for name, size in zip(NAMES, sizes, strict=False)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9))
def test_the_order_of_the_batches_is_that_of_one_process(first, second, freq, updates):
    dataset = make_dataset([80, 50])
    alone = Run(dataset, 1, 1)
    alone.go(10**9, 1)
    run = Run(dataset, first, freq)
    if not run.go(updates, 1):
        return
    other = Run(dataset, second, 1, run.state())
    other.go(10**9, 1)
    together = [run_batches for part in (run, other) for run_batches in part.trained]
    # Within an update the batches come process by process; as sets of sentences, prefixes agree at every update.
    flat = [number for update in alone.trained for number in update]
    done = 0
    for update in together:
        assert sorted(update) == sorted(flat[done : done + len(update)])
        done += len(update)
    assert done == len(flat)


@settings(max_examples=30, deadline=None)
@given(worlds, st.integers(2, 9), st.integers(2, 9), st.sampled_from([10**6, 40]))
@example([(1, 1, 1), (1, 1, 12)], 2, 3, 10**6)
def test_phases_begin_at_their_update_whatever_the_number_of_processes(worlds, first, later, block):
    dataset = make_dataset([60, 60, 60])
    starts = {"de-en": 0, "en-de": first, "en-fr": first + later}
    state, update = None, 0
    for shards, freq, updates in worlds:
        run = Run(dataset, shards, freq, state, starts=starts, block=block)
        run.go(updates)
        for number, trained in enumerate(run.trained, start=update):
            active = [starts[NAMES[direction]] <= number for direction in dataset.directions_of(np.array(trained))]
            assert all(active)
        reached = update + updates
        for start in (first, first + later):
            if update < start < reached:
                assert start in run.begun
        state, update = run.state(), reached


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 4), st.sampled_from([10**6, 30]))
def test_what_is_drawn_anew_is_dealt_out_too(first, second, updates, more, block):
    """After a decision of the curriculum auto the rest of the epoch holds the active directions, on all processes."""
    dataset = make_dataset([70, 40, 40])
    run = Run(dataset, first, 1, auto=list(NAMES), block=block)
    if not run.go(updates, 1) or run.epochs[0].end_of_epoch():
        return
    left = run.epochs[0]._current.total - updates
    for each in run.epochs:
        each.schedule.names = NAMES[:2]
        each.redraw()
    drawn = run.epochs[0]._drawn
    assert all(np.array_equal(drawn.sentences, each._drawn.sentences) for each in run.epochs)
    assert len(drawn) == left * first
    iterators = [each._current for each in run.epochs]
    more = min(more, left - 1)
    taken = [next(iterator)["id"].tolist() for _ in range(more) for iterator in iterators]
    for rank in run.ranks:
        rank.updates += more
    state = run.state()
    other = Run(dataset, second, 1, state, auto=NAMES[:2], block=block)
    assert not other.go(10**9, 1)
    trained = [number for batch in taken for number in batch] + [n for update in other.trained for n in update]
    assert Counter(trained) == Counter(drawn.sentences.tolist())
    assert set(dataset.directions_of(np.array(trained)).tolist()) <= {0, 1}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1.0, 3.0, 1e6]), st.sampled_from([0, 35, 400]), st.sampled_from([10**6, 25]))
def test_all_processes_draw_alike(shards, temperature, epoch_size, block):
    """Temperature, phases and what token dropout by passes reads are the same everywhere, after every update."""
    dataset = make_dataset([90, 20, 5])
    starts = {"de-en": 0, "en-de": 3, "en-fr": 8}
    run = Run(dataset, shards, 1, starts=starts, temperature=temperature, epoch_size=epoch_size, block=block)
    run.go(14, at=lambda run: run.state())
    assert sum(run.counts().values()) == sum(run.epochs[0].seen().values())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_parts_of_a_pass_hold_what_temperature_gives_it(temperature):
    dataset = make_dataset([90, 20, 5])
    whole = Run(dataset, 1, 1, temperature=temperature)
    parts = Run(dataset, 1, 1, temperature=temperature, block=13)
    assert parts.epochs[0].drawer.parts(NAMES) == 9
    whole.go(10**9, 1)
    parts.go(10**9, 9)
    quotas = whole.epochs[0].drawn()
    for run in (whole, parts):
        numbers = [number for update in run.trained for number in update]
        found = np.bincount(dataset.directions_of(np.array(numbers)), minlength=3).tolist()
        assert found == [quotas[name] for name in NAMES]
        counts = np.array([run.counts().get(number, 0) for number in range(115)])
        for start, stop in ((0, 90), (90, 110), (110, 115)):
            assert np.ptp(counts[start:stop]) <= 1
    assert len(parts.begun) == 9


def test_a_new_pass_is_drawn_in_another_order():
    dataset = make_dataset([60])
    run = Run(dataset, 1, 1, block=20)
    firsts = []
    for _ in range(6):
        before = len(run.trained)
        run.go(10**9, 1)
        firsts.append({number for update in run.trained[before:] for number in update})
    assert firsts[0] | firsts[1] | firsts[2] == firsts[3] | firsts[4] | firsts[5] == set(range(60))
    assert firsts[:3] != firsts[3:]
