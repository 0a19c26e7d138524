"""Saving by several processes: kills, full disks, processes that are gone; names and rotation."""

import errno
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from reference.training_states import assert_same, save_all, state_of_place, whole_state

from mtmoe.checkpoint import writing
from mtmoe.checkpoint.sharded import (
    BackgroundWriter,
    SavePlan,
    commit,
    copy_to_cpu,
    describe,
    free_directory,
    give_name,
    give_up,
    newest_complete,
    read_state,
    remove_abandoned_saves,
    remove_old,
    remove_unnamed,
    split_state,
    write_experts,
    write_shared,
)
from mtmoe.checkpoint.writing import NotWritten

ROOT = Path(__file__).parents[3]


def plan_for(folder, name="checkpoint_1_7", places=2, attempt="a"):
    return SavePlan(directory=folder / name, attempt=attempt, world_size=places, expert_parallel_size=places)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Kills

SAVE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from reference.training_states import save_all, whole_state
from mtmoe.checkpoint.sharded import give_name, remove_abandoned_saves, remove_unnamed
folder = Path(sys.argv[1])
remove_abandoned_saves(folder)
first = int(sys.argv[2])
states = [whole_state(updates=0, seed=seed) for seed in range(2)]
print("saving", flush=True)
for number in itertools.count(first):
    state = states[number % 2]
    state["optimizer_history"] = [{"num_updates": number}]
    give_name(save_all(folder / f"checkpoint_1_{number}", state, 2), folder / "checkpoint_last.pt")
    remove_unnamed(folder)
"""


def test_killed_at_any_moment_the_newest_complete_one_can_be_read(tmp_path):
    """A process that does nothing but save and rotate is killed again and again."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    last = 0
    for attempt in range(4):
        words = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(last + 1)]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as process:
            try:
                process.stdout.readline()
                deadline = time.monotonic() + 60
                while not (tmp_path / f"checkpoint_1_{last + 1}").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(0.05 + 0.037 * attempt)
            finally:
                process.kill()
        complaints = []
        newest = newest_complete(tmp_path, complaints.append)
        number = int(newest.name.rpartition("_")[2])
        assert number > last
        expected = whole_state(updates=0, seed=number % 2)
        assert_same(read_state(newest), {**expected, "optimizer_history": [{"num_updates": number}]})
        assert (tmp_path / "checkpoint_last.pt").resolve() in (newest, tmp_path / f"checkpoint_1_{number - 1}")
        read_state(tmp_path / "checkpoint_last.pt")
        assert all("saving has not ended" in each for each in complaints)
        last = number
    remove_abandoned_saves(tmp_path)
    assert all(not name.startswith(".") or name.endswith(".tmp") for name in names(tmp_path))


def test_dies_before_each_operation_on_files(tmp_path, monkeypatch):
    """The same, but at every single moment: an error that nothing catches stands for the kill."""

    class Killed(BaseException):
        pass

    def dying(original, counter, moment):
        def wrapped(*args, **kwargs):
            if next(counter) == moment:
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    save_all(tmp_path / "checkpoint_1_5", whole_state(updates=5), 2)
    moment = 0
    finished = False
    while not finished:
        with monkeypatch.context() as patch:
            counter = itertools.count()
            for name in ("replace", "fsync", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name), counter, moment))
            patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process tidies nothing
            try:
                save_all(tmp_path / "checkpoint_1_7", whole_state(updates=7), 2, attempt=str(moment))
                finished = True
            except Killed:
                pass
        newest = newest_complete(tmp_path, lambda _: None)
        if newest.name == "checkpoint_1_7":
            assert_same(read_state(newest), whole_state(updates=7))
            finished = True
        else:
            assert not (tmp_path / "checkpoint_1_7").exists()
        moment += 1
    assert moment > 10
    assert remove_abandoned_saves(tmp_path)
    assert [each for each in names(tmp_path) if not each.endswith(".tmp")] == ["checkpoint_1_5", "checkpoint_1_7"]


# Failures


class FullDisk:
    """A disk that is full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_disk_full_on_one_rank(tmp_path, monkeypatch, room):
    save_all(tmp_path / "checkpoint_1_5", whole_state(updates=5), 2)
    plan = plan_for(tmp_path)
    states = [split_state(state_of_place(whole_state(), place, 2)) for place in range(2)]
    write_shared(plan, states[0].shared)
    write_experts(plan, 0, states[0].experts)
    sink = writing.Sink
    with monkeypatch.context() as patch:
        patch.setattr(writing, "Sink", lambda file, digest: sink(FullDisk(file, room), digest))
        with pytest.raises(NotWritten, match=r"experts-00001.*No space left on device \(it needs about 0 MB, .* free"):
            write_experts(plan, 1, states[1].experts)
    with pytest.raises(NotWritten, match=r"checkpoint_1_7 is not complete: .*experts-00001.*No space left"):
        commit(plan, {"num_updates": 7})
    assert names(tmp_path) == ["checkpoint_1_5"]
    assert newest_complete(tmp_path, pytest.fail).name == "checkpoint_1_5"


def test_what_others_write_of_a_save_that_has_failed_goes_too(tmp_path):
    """The first process has failed, and the other begins to write only after that."""
    plan = plan_for(tmp_path)

    def write_late():
        time.sleep(0.3)
        write_experts(plan, 1, split_state(state_of_place(whole_state(), 1, 2)).experts)

    late = threading.Thread(target=write_late)
    write_experts(plan, 0, split_state(state_of_place(whole_state(), 0, 2)).experts)
    late.start()
    give_up(plan, poll=0.01)
    late.join()
    assert names(tmp_path) == []


def test_a_process_that_says_nothing_is_not_waited_for_when_a_save_has_failed(tmp_path):
    plan = plan_for(tmp_path)
    write_experts(plan, 0, split_state(state_of_place(whole_state(), 0, 2)).experts)
    begun = time.monotonic()
    give_up(plan, grace=0.2, poll=0.01)
    assert time.monotonic() - begun > 0.2
    assert names(tmp_path) == []


def test_a_rank_that_is_gone_does_not_hold_up_for_ever(tmp_path):
    plan = plan_for(tmp_path)
    split = split_state(state_of_place(whole_state(), 0, 2))
    write_shared(plan, split.shared)
    write_experts(plan, 0, split.experts)
    begun = time.monotonic()
    with pytest.raises(NotWritten, match=r"experts-00001-of-00002.pt did not arrive, and nothing was written for 0"):
        commit(plan, {}, patience=lambda: 0.3, poll=0.02)
    assert 0.3 <= time.monotonic() - begun < 20
    assert names(tmp_path) == []


def test_a_slow_rank_is_waited_for(tmp_path):
    """As long as its file grows, whatever the patience."""
    plan = plan_for(tmp_path)
    states = [split_state(state_of_place(whole_state(), place, 2)) for place in range(2)]
    write_shared(plan, states[0].shared)
    write_experts(plan, 0, states[0].experts)

    def slowly():
        growing = plan.staging / ".experts-00001-of-00002.pt.abcdefgh.tmp"
        for _ in range(20):
            with growing.open("ab") as file:
                file.write(b"x" * 100)
            time.sleep(0.1)
        growing.unlink()
        write_experts(plan, 1, states[1].experts)

    thread = threading.Thread(target=slowly)
    thread.start()
    try:
        commit(plan, describe(states[0].shared), patience=lambda: 1.5, poll=0.02)
    finally:
        thread.join()
    assert_same(read_state(plan.directory), whole_state())


def test_what_a_killed_attempt_left_is_no_part_of_the_next(tmp_path):
    old = split_state(state_of_place(whole_state(seed=1), 1, 2))
    write_experts(plan_for(tmp_path, attempt="killed"), 1, old.experts)
    plan = plan_for(tmp_path, attempt="second")
    split = split_state(state_of_place(whole_state(), 0, 2))
    write_shared(plan, split.shared)
    write_experts(plan, 0, split.experts)
    with pytest.raises(NotWritten, match="experts-00001"):
        commit(plan, {}, patience=lambda: 0.1, poll=0.02)


def test_an_existing_checkpoint_is_never_replaced(tmp_path):
    save_all(tmp_path / "checkpoint_1_7", whole_state(), 2)
    with pytest.raises(NotWritten, match="checkpoint_1_7 could not be written"):
        save_all(tmp_path / "checkpoint_1_7", whole_state(seed=1), 2)
    assert_same(read_state(tmp_path / "checkpoint_1_7"), whole_state())
    assert free_directory(tmp_path, "checkpoint_1_7").name == "checkpoint_1_7.2"
    assert free_directory(tmp_path, "checkpoint_1_8").name == "checkpoint_1_8"


# Rotation


def test_rotation_keeps_the_newest_the_named_and_the_last_complete_one(tmp_path):
    for updates in (3, 5, 7, 9):
        save_all(tmp_path / f"checkpoint_1_{updates}", whole_state(updates=updates), 1)
    give_name(tmp_path / "checkpoint_1_3", tmp_path / "checkpoint_best.pt")
    (tmp_path / "checkpoint_1_9" / "shared.pt").unlink()
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        remove_old(tmp_path, 0)
    assert [path.name for path in remove_old(tmp_path, 1)] == ["checkpoint_1_5"]
    assert names(tmp_path) == ["checkpoint_1_3", "checkpoint_1_7", "checkpoint_1_9", "checkpoint_best.pt"]
    complaints = []
    assert newest_complete(tmp_path, complaints.append).name == "checkpoint_1_7"
    assert "checkpoint_1_9/shared.pt is missing" in complaints[0]


def test_checkpoints_without_a_name_go_but_not_the_last_one(tmp_path):
    for updates in (3, 5):
        save_all(tmp_path / f"checkpoint_1_{updates}", whole_state(updates=updates), 1)
    assert [path.name for path in remove_unnamed(tmp_path)] == ["checkpoint_1_3"]
    save_all(tmp_path / "checkpoint_1_7", whole_state(updates=7), 1)
    give_name(tmp_path / "checkpoint_1_7", tmp_path / "checkpoint_last.pt")
    assert [path.name for path in remove_unnamed(tmp_path)] == ["checkpoint_1_5"]
    give_name(tmp_path / "checkpoint_1_7", tmp_path / "checkpoint_last.pt")
    assert names(tmp_path) == ["checkpoint_1_7", "checkpoint_last.pt"]
    assert_same(read_state(tmp_path / "checkpoint_last.pt"), whole_state(updates=7))


# In the background


def test_at_most_one_job_and_errors_come_with_the_next():
    writer, order, release = BackgroundWriter(), [], threading.Event()

    def slow():
        release.wait(30)
        order.append("first")

    writer.submit(slow)
    assert writer.busy
    threading.Timer(0.1, release.set).start()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]

    def broken():
        raise NotWritten("the disk is full")

    writer.submit(broken)
    with pytest.raises(NotWritten, match="the disk is full"):
        writer.submit(lambda: order.append("not started"))
    assert order == ["first", "second"]
    writer.submit(broken)
    with pytest.raises(NotWritten):
        writer.wait()
    writer.wait()
    assert not writer.busy


def test_the_end_of_the_process_waits(tmp_path):
    program = (
        "import sys, time, pathlib\n"
        "from mtmoe.checkpoint.sharded import BackgroundWriter\n"
        "BackgroundWriter().submit(lambda: (time.sleep(1), pathlib.Path(sys.argv[1]).touch()))\n"
        "sys.exit(3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", program, str(tmp_path / "written")]
    assert subprocess.run(words, env=environment, timeout=120, check=False).returncode == 3
    assert (tmp_path / "written").exists()


def test_training_goes_on_while_places_write(tmp_path):
    """Two places and the first rank, each with a writer of its own, as processes would have."""
    whole = whole_state((16, 16), d_model=64, d_ffn=64)
    plan = plan_for(tmp_path)
    writers = [BackgroundWriter() for _ in range(2)]
    copies = [copy_to_cpu(split_state(state_of_place(whole, place, 2)).experts) for place in range(2)]
    shared = copy_to_cpu(split_state(whole).shared)
    expected = copy_to_cpu(whole)

    def first():
        write_shared(plan, shared)
        write_experts(plan, 0, copies[0])
        commit(plan, describe(shared))

    writers[0].submit(first)
    for tensor in whole["model"].values():
        tensor.add_(1)
    writers[1].submit(lambda: write_experts(plan, 1, copies[1]))
    for writer in writers:
        writer.wait()
    assert_same(read_state(plan.directory), expected)
    assert not torch.equal(whole["model"]["decoder.version"], expected["model"]["decoder.version"])
