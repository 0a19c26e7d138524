"""Saving and resuming with fairseq's own functions over a trainer of one tensor: kills, full disks, damaged files."""

import builtins
import errno
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from omegaconf import OmegaConf
from reference.saving import make_config, names, save
from torch import nn

import fairseq_plugins  # noqa: F401 - repairs saving and loading, which is under test
from fairseq_plugins import checkpoints
from fairseq_plugins.checkpoints import NotWritten, last_save, write_checkpoint
from fairseq_plugins.rollback import recovering
from fairseq_plugins.update_guard import TrainingDiverged, UpdateGuard
from mtmoe.checkpoint import writing
from mtmoe.errors import CheckpointError
from mtmoe.training.checkpoint_files import check_whole, read_header, whole_checkpoints

SIZE = 50_000


class Trainer:
    """What fairseq's functions around checkpoints want of a trainer; its weights are the number of updates."""

    data_parallel_rank, data_parallel_world_size = 0, 1
    checkpoint_suffix = ""
    should_save_checkpoint_on_current_rank = True

    def __init__(self, updates=0):
        self.model = nn.Linear(SIZE, 1, bias=False)
        self.optimizer = SimpleNamespace(optimizer=torch.optim.SGD(self.model.parameters(), momentum=0.9))
        self.task = SimpleNamespace(guard=UpdateGuard(limit=3))
        self.train_to(updates)

    def train_to(self, updates):
        self.updates = updates
        nn.init.constant_(self.model.weight, float(updates))

    def get_model(self):
        return self.model

    def get_num_updates(self):
        return self.updates

    def get_lr(self):
        return 1.0

    def lr_step(self, epoch):
        return 1.0

    def consolidate_optimizer(self):
        pass

    def save_checkpoint(self, filename, extra_state):
        state = {
            "model": self.model.state_dict(),
            "optimizer_history": [{"num_updates": self.updates}],
            "extra_state": extra_state,
        }
        checkpoint_utils.torch_persistent_save(state, filename)
        return filename

    def load_checkpoint(self, filename, *_, **__):
        self.loaded = filename
        return

    def get_train_iterator(self, **_):
        return self.epochs()

    def epochs(self):
        progress = {"num_updates": self.updates, **self.task.guard.state()}
        state = {"epoch": 1, "iterations_in_epoch": self.updates, "progress": progress}
        return SimpleNamespace(epoch=1, next_epoch_idx=1, end_of_epoch=lambda: False, state_dict=lambda: state)


def updates_of(path):
    """The updates of a checkpoint, once it is known to be whole."""
    check_whole(path)
    (value,) = torch.load(path, weights_only=True)["model"]["weight"].unique().tolist()
    assert value == read_header(path).num_updates
    return int(value)


@pytest.fixture(autouse=True)
def fresh():
    yield
    last_save.failure = ""
    checkpoint_utils.save_checkpoint.__dict__.pop("best", None)


# Killed at any moment


def die_at(moment):
    """Let this process end, as by SIGKILL, at its n-th operation on files."""
    count = itertools.count(1)

    def tick():
        if next(count) == moment:
            os._exit(9)

    def after(function):
        def ticking(*args, **kwargs):
            result = function(*args, **kwargs)
            tick()
            return result

        return ticking

    for name in ("open", "close", "fsync", "replace", "rename", "link", "unlink", "remove", "chmod", "makedirs"):
        setattr(os, name, after(getattr(os, name)))
    tempfile.mkstemp, builtins.open = after(tempfile.mkstemp), after(builtins.open)
    writing.Sink.write = after(writing.Sink.write)
    tick()


def in_child(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_a_kill_at_any_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """Numbered, best and last checkpoint, rotation of the old one: the process dies after each operation in turn."""
    config = make_config(tmp_path / "start")
    save(config, Trainer(10), loss=2.0)
    assert names(tmp_path / "start") == ["checkpoint_1_10.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    seen, statuses = set(), []
    for moment in itertools.count(1):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "start", folder)

        def work(folder=folder, moment=moment):
            trainer = Trainer(20)
            die_at(moment)
            save(make_config(folder), trainer, loss=1.0)

        statuses.append(in_child(work))
        wrong = []
        last = updates_of(folder / "checkpoint_last.pt")
        newest = next(whole_checkpoints(folder, wrong.append)).num_updates
        assert wrong == []
        seen.add((last, newest))
        assert not checkpoints._instead_of_last(folder)
        assert not [name for name in names(folder) if name.startswith(".")]
        if statuses[-1] == 0:
            break
    assert statuses[:-1] == [9] * (len(statuses) - 1)
    assert len(statuses) > 15
    assert seen == {(10, 10), (10, 20), (20, 20)}
    assert names(tmp_path / "run") == ["checkpoint_1_20.pt", "checkpoint_best.pt", "checkpoint_last.pt"]


# A full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file that has room for some writes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= 1
        return full() if self.room < 0 else self.file.write(data)


@pytest.mark.parametrize("step", ["mkstemp", "open", "first", "later", "fsync", "replace"])
def test_a_full_disk_at_any_step_leaves_the_checkpoint_before(tmp_path, monkeypatch, step):
    path = tmp_path / "checkpoint_last.pt"
    write_checkpoint({"weight": torch.zeros(SIZE)}, str(path))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if step == "mkstemp":
            patch.setattr(tempfile, "mkstemp", full)
        elif step == "open":
            patch.setattr(Path, "open", full)
        elif step in ("fsync", "replace"):
            patch.setattr(os, step, full)
        elif step == "flush":
            patch.setattr(writing.Sink, "write", lambda self, data: len(data))
            patch.setattr(os, "fsync", full)
        else:
            initial = writing.Sink.__init__

            def limited(self, file, digest):
                initial(self, FullFile(file, 0 if step == "first" else 3), digest)

            patch.setattr(writing.Sink, "__init__", limited)
        with pytest.raises(NotWritten, match=r"could not be written: No space left .* \(it needs about 1 MB, "):
            write_checkpoint({"weight": torch.ones(5 * SIZE)}, str(path))
    assert path.read_bytes() == before
    assert names(tmp_path) == ["checkpoint_last.pt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_small_file_system_keeps_the_checkpoint_before(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no mounts in this container")
    try:
        path = tmp_path / "checkpoint_last.pt"
        write_checkpoint({"weight": torch.full((SIZE,), 1.0)}, str(path))
        for _ in range(2):
            with pytest.raises(NotWritten, match=r"No space left on device .* 0 MB are free"):
                write_checkpoint({"weight": torch.full((SIZE * 2,), 2.0)}, str(path))
            assert names(tmp_path) == ["checkpoint_last.pt"]
            assert torch.load(path, weights_only=True)["weight"].sum() == SIZE
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_after_a_failed_save_training_goes_on_and_the_next_one_counts(tmp_path, monkeypatch, caplog):
    config, trainer = make_config(tmp_path), Trainer(10)
    save(config, trainer, loss=2.0)
    trainer.train_to(20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert save(config, trainer, loss=1.0) is None
    assert "checkpoint_1_20.pt could not be written: No space left on device" in caplog.text
    assert "Training goes on, and tries again at the next checkpoint" in caplog.text
    assert {updates_of(path) for path in tmp_path.iterdir()} == {10}
    with pytest.raises(NotWritten, match=r"training ends without its last checkpoint: .*No space left"):
        last_save.check()
    trainer.train_to(30)
    save(config, trainer, loss=1.5)  # worse than the one that was not written, but better than what is there
    last_save.check()
    assert {path.name: updates_of(path) for path in tmp_path.iterdir()} == {
        "checkpoint_1_30.pt": 30, "checkpoint_best.pt": 30, "checkpoint_last.pt": 30,
    }  # fmt: skip


@pytest.mark.parametrize(("should_stop", "max_epoch", "ends"), [(False, 0, False), (True, 0, True), (False, 1, True)])
def test_a_failed_save_is_an_error_at_the_end_of_training_only(should_stop, max_epoch, ends):
    trainer = Trainer()
    epochs = SimpleNamespace(next_epoch_idx=2)
    config = OmegaConf.create({"optimization": {"max_epoch": max_epoch, "stop_min_lr": -1.0}})
    last_save.failure = "the disk is full"
    train = recovering(lambda *_: ([None], should_stop))
    if ends:
        with pytest.raises(NotWritten, match=r"without its last checkpoint: the disk is full\. .* make room"):
            train(config, trainer, trainer.task, epochs)
    else:
        assert train(config, trainer, trainer.task, epochs) == ([None], False)


def test_errors_that_are_not_of_the_disk_are_not_swallowed(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint({"weight": lambda: None}, str(tmp_path / "checkpoint_last.pt"))
    assert names(tmp_path) == []


# Weights that are not finite


@pytest.mark.parametrize("where", ["weight", "optimiser"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_never_saved(tmp_path, where, bad):
    config, trainer = make_config(tmp_path), Trainer(10)
    save(config, trainer)
    trainer.train_to(20)
    trainer.optimizer.optimizer.state[trainer.model.weight] = {"momentum_buffer": torch.zeros(SIZE), "step": 3}
    if where == "weight":
        trainer.model.weight.data[0, SIZE // 2] = bad
        message = "^weight is not finite any more at update 20; nothing was saved"
    else:
        trainer.optimizer.optimizer.state[trainer.model.weight]["momentum_buffer"][7] = bad
        message = "^momentum_buffer of weight in the optimiser is not finite"
    with pytest.raises(TrainingDiverged, match=message):
        save(config, trainer)
    assert {updates_of(path) for path in tmp_path.iterdir()} == {10}


# Rotation


def test_while_updates_are_skipped_the_checkpoint_from_before_stays(tmp_path):
    config, trainer = make_config(tmp_path), Trainer(10)
    save(config, trainer)
    for updates in (20, 30, 40):
        trainer.train_to(updates)
        trainer.task.guard.consecutive = updates // 10
        save(config, trainer)
    expected = {"checkpoint_1_40.pt": 40, "checkpoint_good.pt": 10, "checkpoint_last.pt": 40}
    assert {path.name: updates_of(path) for path in tmp_path.iterdir()} == expected
    assert next(whole_checkpoints(tmp_path, print)).num_updates == 10
    trainer.train_to(50)
    trainer.task.guard.consecutive = 0
    save(config, trainer)
    assert names(tmp_path) == ["checkpoint_1_50.pt", "checkpoint_last.pt"]


def test_a_failed_save_removes_nothing(tmp_path, monkeypatch):
    config, trainer = make_config(tmp_path, no_last_checkpoints=True), Trainer(10)
    save(config, trainer)
    trainer.train_to(20)
    monkeypatch.setattr(os, "fsync", full)
    save(config, trainer)
    assert names(tmp_path) == ["checkpoint_1_10.pt"]


# Resuming


def resume(config, trainer):
    checkpoint_utils.load_checkpoint(config, trainer)
    return Path(trainer.loaded).name


def test_a_damaged_last_checkpoint_is_named_and_the_newest_whole_one_taken(tmp_path, caplog):
    config = make_config(tmp_path, keep_interval_updates=-1)
    assert resume(config, Trainer()) == "checkpoint_last.pt"  # there is none: fairseq starts anew
    for updates in (10, 20, 30):
        save(config, Trainer(updates))
    assert resume(config, Trainer()) == "checkpoint_last.pt"
    assert caplog.text == ""
    (tmp_path / ".checkpoint_last.pt.abcdefgh.tmp").touch()
    os.truncate(tmp_path / "checkpoint_last.pt", 100_000)  # and checkpoint_1_30.pt, which is the same file
    assert resume(config, Trainer()) == "checkpoint_1_20.pt"
    assert config.restore_file == "checkpoint_last.pt"
    assert not (tmp_path / ".checkpoint_last.pt.abcdefgh.tmp").exists()
    assert f"{tmp_path}/checkpoint_last.pt is cut short" in caplog.text
    assert f"resuming from {tmp_path}/checkpoint_1_20.pt (update 20) instead of" in caplog.text
    # A file that is asked for by name is no matter of ours.
    asked = make_config(tmp_path, restore_file=str(tmp_path / "checkpoint_1_10.pt"))
    assert resume(asked, Trainer()) == "checkpoint_1_10.pt"


def test_without_a_whole_checkpoint_nothing_is_trained_over(tmp_path):
    config = make_config(tmp_path)
    save(config, Trainer(10))
    os.truncate(tmp_path / "checkpoint_last.pt", 1000)
    with pytest.raises(CheckpointError, match=r"is cut short, and .* has no other checkpoint that is whole"):
        resume(config, Trainer())


def test_copies_follow_fairseqs_rules(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert not PathManager.copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "b"
    assert PathManager.copy(str(tmp_path / "a"), str(tmp_path / "b"), overwrite=True)
    assert (tmp_path / "b").read_text() == "a"
    assert names(tmp_path) == ["a", "b"]


def test_the_plugin_is_what_fairseq_calls():
    code = "import fairseq_cli.train, fairseq_plugins; t = fairseq_cli.train; print(t.train.__wrapped__.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("train")
