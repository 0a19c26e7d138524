"""Saving and resuming with fairseq's functions in two processes that share out experts, over a trainer of one layer."""

import contextlib
import errno
import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf
from reference.saving import make_config, names, save
from torch import nn

import fairseq_plugins  # noqa: F401 - repairs saving and loading, which is under test
from fairseq_plugins import sharded_checkpoints
from fairseq_plugins.checkpoints import NotWritten, last_save
from fairseq_plugins.rollback import remove_given_up
from fairseq_plugins.update_guard import TrainingDiverged, UpdateGuard
from mtmoe.checkpoint import writing
from mtmoe.checkpoint.sharded import read_state, reshard
from mtmoe.errors import CheckpointError
from mtmoe.training.checkpoint_files import SavedCheckpoint, saved_checkpoints, whole_checkpoints

EXPERTS = 4


class Layer(nn.Module):
    """Weights are the number of updates, and of experts their number times 1000 more."""

    def __init__(self, place, places):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.experts = nn.Module()
        self.experts.w_in = nn.Parameter(torch.zeros(EXPERTS // places, 8, 8))
        self.experts.w_in.expert = True
        self.first = place * EXPERTS // places

    def train_to(self, updates):
        nn.init.constant_(self.norm.weight, float(updates))
        for number, expert in enumerate(self.experts.w_in.data, self.first):
            expert.fill_(updates + 1000 * number)


class Trainer:
    """What fairseq's functions around checkpoints, and ours, want of a trainer."""

    checkpoint_suffix, always_call_state_dict_during_save_checkpoint = "", False

    def __init__(self, rank=0, world=1, places=1, updates=0):
        self.data_parallel_rank, self.data_parallel_world_size = rank, world
        self.should_save_checkpoint_on_current_rank = rank == 0
        self.place, self.places = rank % places, places
        self.model = Layer(self.place, places)
        self.optimizer = SimpleNamespace(optimizer=torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9))
        self.task = SimpleNamespace(guard=UpdateGuard(limit=3), parallel=SimpleNamespace(size=places))
        self.cfg = SimpleNamespace(checkpoint=OmegaConf.create({"load_checkpoint_on_all_dp_ranks": False}))
        self.train_to(updates)

    def train_to(self, updates):
        self.updates = updates
        self.model.train_to(updates)
        for parameter in self.model.parameters():
            self.optimizer.optimizer.state[parameter]["momentum_buffer"] = parameter.detach() + 0.5

    def get_model(self):
        return self.model

    def get_criterion(self):
        return nn.Module()

    def get_num_updates(self):
        return self.updates

    def lr_step(self, epoch):
        return 1.0

    def consolidate_optimizer(self):
        pass

    def state_dict(self):
        return {
            "cfg": None,
            "model": self.model.state_dict(),
            "optimizer_history": [{"num_updates": self.updates, "optimizer_name": "", "lr_scheduler_state": None}],
            "last_optimizer_state": self.optimizer.optimizer.state_dict(),
            "extra_state": {},
        }

    def save_checkpoint(self, filename, extra_state):
        state = self.state_dict()
        state["extra_state"] = extra_state
        checkpoint_utils.torch_persistent_save(state, filename)
        return filename

    def load_checkpoint(self, filename, *_, **__):
        if not Path(filename).is_file():
            return None
        everywhere = self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks
        assert everywhere or self.data_parallel_world_size == 1
        state = checkpoint_utils.load_checkpoint_to_cpu(filename, load_on_all_ranks=everywhere)
        self.model.load_state_dict(state["model"])
        self.optimizer.optimizer.load_state_dict(state["last_optimizer_state"])
        self.updates = state["optimizer_history"][-1]["num_updates"]
        return state["extra_state"]

    def get_train_iterator(self, **_):
        return self.epochs()

    def epochs(self):
        progress = {"num_updates": self.updates, **self.task.guard.state()}
        state = {"epoch": 1, "iterations_in_epoch": self.updates, "progress": progress}
        return SimpleNamespace(
            epoch=1, next_epoch_idx=1, end_of_epoch=lambda: False, state_dict=lambda: state, load_state_dict=print
        )

    def check(self, updates):
        """Weights and moments are those of an update, and of this place's experts."""
        expected = Trainer(self.data_parallel_rank, self.data_parallel_world_size, self.places, updates)
        for mine, other in zip(self.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(mine, other)
            buffers = [t.optimizer.optimizer.state[p]["momentum_buffer"] for t, p in ((self, mine), (expected, other))]
            assert torch.equal(*buffers)


Trainer.load_checkpoint = sharded_checkpoints.loading_directories(Trainer.load_checkpoint)


@pytest.fixture(autouse=True)
def fresh():
    yield
    last_save.failure = ""
    checkpoint_utils.save_checkpoint.__dict__.pop("best", None)


def in_world(work, folder, world=2):
    """Run `work(rank)` in so many processes with a gloo group; the first error of any is raised here."""
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()

    def run(rank):
        try:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            work(rank)
            torch.distributed.barrier()
        except BaseException:
            errors.put(f"rank {rank}: {traceback.format_exc()}")
            os._exit(1)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in processes] == [0] * world
    (folder / "rendezvous").unlink(missing_ok=True)


def test_two_processes_save_and_any_number_resumes(tmp_path):
    folder = tmp_path / "checkpoints"

    def train(rank):
        config, trainer = make_config(folder), Trainer(rank, 2, 2)
        for updates, loss in ((10, 2.0), (20, 1.0), (30, 3.0)):
            trainer.train_to(updates)
            save(config, trainer, loss)
        trainer.train_to(31)  # while it is being written
        last_save.check()

    in_world(train, tmp_path)
    assert names(folder) == [
        "checkpoint_1_20", "checkpoint_1_30", "checkpoint_1_30.pt", "checkpoint_best.pt", "checkpoint_last.pt",
    ]  # fmt: skip
    assert (folder / "checkpoint_best.pt").readlink() == Path("checkpoint_1_20")
    trainer = Trainer()
    extra, _ = checkpoint_utils.load_checkpoint(make_config(folder), trainer)
    trainer.check(30)
    assert extra["best"] == 1.0

    def resume(rank):
        trainer = Trainer(rank, 4, 4)
        checkpoint_utils.load_checkpoint(make_config(folder), trainer)
        trainer.check(30)

    in_world(resume, tmp_path, world=4)
    # One process goes on, and leaves one file.
    trainer.train_to(40)
    save(make_config(folder), trainer, 0.5)
    assert names(folder) == ["checkpoint_1_40.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())


def test_replicas_save_nothing_and_resume_alike(tmp_path):
    folder = tmp_path / "checkpoints"

    def train(rank):
        trainer = Trainer(rank, 4, 2, updates=10)
        save(make_config(folder), trainer)
        last_save.check()
        torch.distributed.barrier()
        trainer = Trainer(rank, 4, 2)
        checkpoint_utils.load_checkpoint(make_config(folder), trainer)
        trainer.check(10)

    in_world(train, tmp_path, world=4)
    assert names(folder / "checkpoint_last.pt") == [
        "experts-00000-of-00002.pt", "experts-00001-of-00002.pt", "manifest.json", "shared.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("poor", [0, 1])
def test_a_full_disk_on_one_rank(tmp_path, caplog, poor):
    folder = tmp_path / "checkpoints"
    initial = writing.Sink.__init__

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def train(rank):
        config, trainer = make_config(folder), Trainer(rank, 2, 2, updates=10)
        save(config, trainer, 2.0)
        last_save.check()
        if rank == poor:
            writing.Sink.__init__ = lambda self, file, digest: initial(self, Full(), digest)
        trainer.train_to(20)
        save(config, trainer, 1.0)
        text = rf"without its last checkpoint: .*experts-0000{poor}.*No space left on device"
        with pytest.raises(NotWritten, match=text) if rank <= poor else contextlib.nullcontext():
            last_save.check()  # the first process learns of all, and the others of their own
        writing.Sink.__init__ = initial
        torch.distributed.barrier()
        assert {path.name for path in folder.iterdir()} == {
            "checkpoint_1_10", "checkpoint_1_10.pt", "checkpoint_best.pt", "checkpoint_last.pt",
        }  # fmt: skip
        torch.distributed.barrier()
        trainer.train_to(30)
        save(config, trainer, 1.5)  # worse than the one that was not written, but better than what is there
        last_save.check()

    in_world(train, tmp_path)
    assert names(folder) == ["checkpoint_1_30", "checkpoint_1_30.pt", "checkpoint_best.pt", "checkpoint_last.pt"]


def test_a_damaged_shard_is_named_and_all_take_the_same_other_one(tmp_path):
    folder = tmp_path / "checkpoints"

    def train(rank):
        config, trainer = make_config(folder, keep_interval_updates=-1), Trainer(rank, 2, 2)
        for updates in (10, 20):
            trainer.train_to(updates)
            save(config, trainer)
        last_save.check()

    in_world(train, tmp_path)
    (folder / ".checkpoint_1_30.abc.saving").mkdir()
    path = folder / "checkpoint_1_20" / "experts-00001-of-00002.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

    def resume(rank):
        config, trainer = make_config(folder), Trainer(rank, 2, 2)
        checkpoint_utils.load_checkpoint(config, trainer)
        trainer.check(10)
        asked = make_config(folder, restore_file=str(folder / "checkpoint_1_20"))
        if rank == 1:
            with pytest.raises(CheckpointError, match=r"experts-00001-of-00002.pt is damaged.*--restore-file"):
                checkpoint_utils.load_checkpoint(asked, trainer)

    in_world(resume, tmp_path)
    assert not (folder / ".checkpoint_1_30.abc.saving").exists()
    complaints = []
    assert next(whole_checkpoints(folder, complaints.append)).num_updates == 10
    assert "experts-00001-of-00002.pt is damaged" in complaints[0]
    for each in saved_checkpoints(folder, print):
        (each.path / "shared.pt").unlink()
    with pytest.raises(CheckpointError, match=r"shared.pt is missing.* has no other checkpoint that is whole"):
        checkpoint_utils.load_checkpoint(make_config(folder), Trainer())


def test_experts_that_are_not_finite_on_one_rank_are_saved_by_none(tmp_path):
    folder = tmp_path / "checkpoints"

    def train(rank):
        trainer = Trainer(rank, 2, 2, updates=10)
        broken = "something of another process"
        if rank == 1:
            trainer.model.experts.w_in.data[0, 0, 0] = torch.nan
            broken = "experts.w_in"
        with pytest.raises(TrainingDiverged, match=rf"^{broken} is not finite any more at update 10"):
            save(make_config(folder), trainer)

    in_world(train, tmp_path)
    assert not folder.exists()


def test_while_updates_are_skipped_the_checkpoint_from_before_stays(tmp_path):
    folder = tmp_path / "checkpoints"

    def train(rank):
        config, trainer = make_config(folder), Trainer(rank, 2, 2)
        for updates in (10, 20, 30):
            trainer.train_to(updates)
            trainer.task.guard.consecutive = updates // 10 - 1
            save(config, trainer)
        last_save.check()
        torch.distributed.barrier()
        assert (folder / "checkpoint_good.pt").readlink() == Path("checkpoint_1_10")
        found = list(whole_checkpoints(folder, pytest.fail))
        assert [(each.num_updates, each.steady) for each in found] == [(10, True), (30, False)]
        torch.distributed.barrier()
        # Training went back to 10, saved that anew, and gives up what came after.
        trainer.train_to(10)
        trainer.task.guard.consecutive = 0
        save(config, trainer)
        last_save.check()
        if rank == 0:
            remove_given_up(folder, SavedCheckpoint(folder / "checkpoint_1_10", 10, steady=True))

    in_world(train, tmp_path)
    # As with single files, rotation has kept the numbered name of 30, which then was given up.
    assert names(folder) == ["checkpoint_1_10.2", "checkpoint_last.pt"]
    assert (folder / "checkpoint_last.pt").readlink() == Path("checkpoint_1_10.2")


def test_directories_of_the_user_are_never_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    trainer = Trainer(updates=10)
    save(make_config(folder), trainer)
    reshard(folder / "checkpoint_last.pt", folder / "checkpoint_of_4", 4)
    trainer.train_to(20)
    save(make_config(folder), trainer)
    assert names(folder) == ["checkpoint_1_20.pt", "checkpoint_last.pt", "checkpoint_of_4"]
    assert read_state(folder / "checkpoint_of_4")["optimizer_history"][-1]["num_updates"] == 10


def test_nothing_is_written_without_the_experts_of_others(tmp_path, caplog):
    save_checkpoint = sharded_checkpoints.only_with_all_experts(Trainer.save_checkpoint)
    save_checkpoint(Trainer(0, 2, 2), str(tmp_path / "crash.pt"), {})
    assert "crash.pt is not written: this process holds only its own experts" in caplog.text
    assert names(tmp_path) == []
    save_checkpoint(Trainer(), str(tmp_path / "crash.pt"), {})
    assert names(tmp_path) == ["crash.pt"]
