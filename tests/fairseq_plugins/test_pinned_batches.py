"""The very batches of finished runs, and their order: what a seed gave once, it has to give for ever."""

import hashlib
import json

import numpy as np
import pytest
from fairseq.tasks import setup_task
from omegaconf import OmegaConf

import fairseq_plugins  # noqa: F401
from fairseq_plugins.tasks.options import MtmoeTranslationConfig

LIMITS = {
    "max_tokens": 300, "max_positions": (15, 15), "ignore_invalid_inputs": True, "required_batch_size_multiple": 4,
}  # fmt: skip


AUTO = {"curriculum_file": "auto"}
SEEN = {
    1: {"de-en": 83, "en-de": 155, "en-fr": 39, "fr-en": 35},
    2: {"de-en": 121, "en-de": 318, "en-fr": 93, "fr-en": 92},
}
"""What the redrawn runs below had seen, by their number of processes."""


@pytest.fixture(scope="module")
def data(fairseq, tmp_path_factory):
    return fairseq.write_toy_data(tmp_path_factory.mktemp("pinned") / "data", {"de-en": 4000, "en-fr": 700})


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    path = tmp_path_factory.mktemp("phases") / "curriculum.yaml"
    path.write_text("- {start: 40, languages: [fr]}\n")
    return path


def make_task(data, **options):
    fixed = {"seed": 7, "log_interval": 1, "max_update": 1000, "update_freq": [2], "train_subset": "train",
             "best_checkpoint_metric": "loss"}  # fmt: skip
    config = OmegaConf.structured(MtmoeTranslationConfig(data=str(data)))
    OmegaConf.set_struct(config, False)
    return setup_task(OmegaConf.merge(config, {"_name": "mtmoe_translation", **fixed, **options}))


class Sum:
    """A running sum over the sentence numbers of batches and the places where a batch ends."""

    def __init__(self):
        self.sum = hashlib.sha256()

    def add(self, sample):
        numbers = sample["id"].numpy() if sample else np.zeros(0, dtype=np.int64)
        self.sum.update(np.array([len(numbers), *numbers], dtype="<i8").tobytes())

    def text(self):
        return self.sum.hexdigest()[:16]


def sum_of_epochs(task, epochs, shards=1, shard=0, stop=10**9):
    """Train for some epochs, two micro-batches an update, an iterator an epoch as fairseq does."""
    total = Sum()
    number = 1
    for _ in range(epochs):
        iterator = task.get_batch_iterator(
            task.dataset("train"), num_shards=shards, shard_id=shard, epoch=number, **LIMITS
        )
        batches = iterator.next_epoch_itr()
        for taken, sample in enumerate(batches, start=1):
            total.add(sample)
            task.num_updates += taken % 2 == 0
            if taken == stop:
                return total, iterator, batches
        task.num_updates += len(iterator) % 2
        number = iterator.next_epoch_idx
    return total, iterator, batches


def digest(sums):
    return hashlib.sha256(" ".join(each.text() for each in sums).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "shards", "expected"),
    [
        ({}, 1, "732caab9357ebb70"),
        ({}, 3, "f410192dc0e99a01"),
        ({"sampling_temperature": 5.0}, 1, "00800df586fdfb05"),
        ({"sampling_temperature": 3.0, "virtual_epoch_size": 1500}, 2, "bdf9b4b777401d01"),
        ({"curriculum_file": "phases"}, 2, "88304c177863323c"),
    ],
)
def test_epochs_are_as_ever(data, phases, options, shards, expected):
    options = {name: str(phases) if value == "phases" else value for name, value in options.items()}
    sums = []
    for shard in range(shards):
        task = make_task(data, **options)
        task.load_dataset("train")
        sums.append(sum_of_epochs(task, 3, shards, shard)[0])
    assert digest(sums) == expected


def stopped_in_the_middle(data, shards, **options):
    """A run of ten updates and more, and a checkpoint's state of its iterator; with the curriculum auto, redrawn."""
    task = make_task(data, sampling_temperature=2.0, **options)
    task.load_dataset("train")
    _, iterator, batches = sum_of_epochs(task, 2, shards, 0, stop=10)
    if options:
        for name in ("en-fr", "fr-en"):
            iterator.schedule.directions[name].status = "waiting"
        iterator.redraw()
    for _ in range(4):
        next(batches)
    task.num_updates += 2
    return iterator, batches


def rest_of(samples):
    total = Sum()
    for sample in samples:
        total.add(sample)
    return total.text()


def resumed(data, state, shards, shard=0, **options):
    task = make_task(data, sampling_temperature=2.0, **options)
    task.load_dataset("train")
    iterator = task.get_batch_iterator(task.dataset("train"), num_shards=shards, shard_id=shard, **LIMITS)
    iterator.load_state_dict(state)
    return iterator


@pytest.mark.parametrize(
    ("shards", "options", "expected"),
    [
        (1, {}, "cb981c67f5773a87"),
        (2, {}, "9c2d13a07ea2d528"),
        (1, AUTO, "1e6a7e39292d75ac"),
        (2, AUTO, "649860776359804e"),
    ],
)
def test_what_is_drawn_anew_and_what_is_resumed_are_as_ever(data, shards, options, expected):
    iterator, batches = stopped_in_the_middle(data, shards, **options)
    state = json.loads(json.dumps(iterator.state_dict()))
    before = {1: {}, 2: {}} if not options else SEEN  # direction -> sentences, as the release before wrote it
    old = {
        "version": 2, "epoch": 1, "iterations_in_epoch": 14, "shuffle": True, "first_update": 5 if options else 0,
        "first_batch": 10 if options else 0, "total": 268 // shards, "num_shards": shards, "seen": before[shards],
        "progress": state["progress"],
    }  # fmt: skip
    if options:
        old["curriculum"] = state["curriculum"]
    assert rest_of(batches) == expected
    for each in (state, old):
        iterator = resumed(data, each, shards, **options)
        assert rest_of(iterator.next_epoch_itr()) == expected


def test_validation_batches_are_as_ever(data):
    task = make_task(data, valid_limit=17, train_sample=50)
    for split in ("train", "valid"):
        task.load_dataset(split)
    sums = []
    for split in ("train_sample", "valid"):
        for shard in range(2):
            iterator = task.get_batch_iterator(task.dataset(split), num_shards=2, shard_id=shard, **LIMITS)
            sums.append(rest_of(iterator.next_epoch_itr()))
    assert sums == ["dc1cd110abc1feb7", "a7628e0849c98930", "133e13f25a2cadad", "5f4ba05ffb17fbdd"]


def test_what_a_batch_holds_is_as_ever(data):
    task = make_task(data)
    task.load_dataset("train")
    sample = task.dataset("train").collater(np.arange(0, 9400, 97))
    parts = [sample["net_input"][name] for name in ("src_tokens", "src_lengths", "prev_output_tokens")]
    total = hashlib.sha256()
    for part in (*parts, sample["target"], sample["direction"]):
        total.update(part.numpy().astype("<i8").tobytes())
    assert total.hexdigest()[:16] == "5ed10e866f9eb975"
