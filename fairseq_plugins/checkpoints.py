"""Checkpoints that survive a kill, a full disk and weights that are not finite; resuming from what is whole."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fairseq_plugins import sharded_checkpoints
from fairseq_plugins.processes import distributed, first_problem, from_first
from fairseq_plugins.sharded_checkpoints import changed, place_of, recording
from fairseq_plugins.update_guard import TrainingDiverged, find_broken
from mtmoe.checkpoint.sharded import BackgroundWriter, give_name, remove_abandoned_saves, remove_unnamed
from mtmoe.checkpoint.writing import NotWritten, save
from mtmoe.errors import CheckpointError
from mtmoe.files import duplicate, remove_abandoned
from mtmoe.training.checkpoint_files import (
    SavedCheckpoint,
    check_whole,
    read_header,
    saved_checkpoints,
    whole_checkpoints,
)

logger = logging.getLogger(__name__)

LAST, GOOD = "checkpoint_last.pt", "checkpoint_good.pt"


class LastSave:
    """The last attempt to save: whether it has failed, and what still writes in the background."""

    def __init__(self) -> None:
        self.failure = ""
        """Why it failed; "" = it did not, or is still under way."""
        self._writer = BackgroundWriter()
        self._undo: Callable[[], None] = lambda: None

    def start(self, job: Callable[[], None], undo: Callable[[], None]) -> None:
        """Write in the background; the save before has been settled.

        Args:
            job: writes.
            undo: is called if that fails, when the save is settled.
        """
        self._undo = undo
        self._writer.submit(job)

    def settle(self) -> None:
        """Wait for what is being written; if that fails, say so, and remember it for `check`."""
        try:
            self._writer.wait()
        except (OSError, CheckpointError) as error:
            self._undo()
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Remember a failure, and say that training goes on."""
        self.failure = str(error)
        logger.warning("%s. Training goes on, and tries again at the next checkpoint", error)

    def check(self) -> None:
        """Call at the end of training; waits for what is being written.

        Raises:
            NotWritten: its last checkpoint is not on disk.
        """
        self.settle()
        if self.failure:
            raise NotWritten(
                f"training ends without its last checkpoint: {self.failure}. "
                "The checkpoint before is whole; make room, and run the same command again to go on from it"
            )


last_save = LastSave()
"""The one of this process: it has one save directory."""


# Writing


def write_checkpoint(state: Any, filename: str, async_write: bool = False) -> None:
    """Write a checkpoint, in fairseq's place of that function; atomic, and always before it returns.

    With expert parallelism it is only copied here, see `fairseq_plugins.sharded_checkpoints`.

    Raises:
        NotWritten: the disk is full or fails. The file of that name is as it was.
    """
    collector = recording()
    if collector is not None:
        collector.write(state, filename)
    else:
        save(state, Path(filename), checksum=False)


def copy_checkpoint(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Give a checkpoint a second name, in the place of fairseq's function that copies files.

    Returns:
        False if `dst_path` exists and may not be replaced.
    """
    collector = recording()
    if collector is not None and Path(src_path) in collector.names:
        collector.names.append(Path(dst_path))
        return True
    if Path(dst_path).exists() and not overwrite:
        return False
    duplicate(src_path, dst_path)
    return True


# Saving and rotation


def saving(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap fairseq's function of that name: check before, and go on after a failure.

    fairseq removes old checkpoints once the new one is written and renamed. While updates are being skipped, the
    newest one from before stays as ``checkpoint_good.pt`` whatever the options of rotation are: those saved since may
    already hold what makes training diverge.
    """

    @functools.wraps(save_checkpoint)
    def wrapped(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: float | None) -> str | None:
        if cfg.no_save:
            return save_checkpoint(cfg, trainer, epoch_itr, val_loss)
        last_save.settle()
        sharded = place_of(trainer).expert_parallel_size > 1
        broken = find_broken(trainer.get_model(), trainer.optimizer)
        if broken:
            raise TrainingDiverged(
                f"{broken} is not finite any more at update {trainer.get_num_updates()}; nothing was saved"
            )
        if hasattr(trainer.optimizer, "gather_state"):
            trainer.optimizer.gather_state()  # not in fairseq's own place for it, where a process may fail alone
        guard = getattr(trainer.task, "guard", None)
        steady = guard is None or guard.consecutive == 0
        folder, keeper = Path(cfg.save_dir), trainer.data_parallel_rank == 0 and not trainer.checkpoint_suffix
        best = getattr(wrapped, "best", None)

        def forget_best() -> None:
            """Else the next one that is as good would not be saved as the best."""
            if best is None:
                wrapped.__dict__.pop("best", None)
            else:
                wrapped.best = best

        def keeping_good() -> str | None:
            if keeper and not steady and not (folder / GOOD).exists():
                _keep_good(folder)
            return save_checkpoint(cfg, trainer, epoch_itr, val_loss)

        def tidy() -> None:
            if keeper and steady:
                (folder / GOOD).unlink(missing_ok=True)
            if keeper and saved is not None:
                remove_unnamed(folder, spare_last=sharded)

        saved, job = None, None
        try:
            if sharded:
                saved, job = sharded_checkpoints.save(keeping_good, cfg, trainer, epoch_itr)
            else:
                saved = keeping_good()
        except (OSError, NotWritten) as error:
            forget_best()
            last_save.fail(error)
            return None
        last_save.failure = ""
        if job is not None:
            last_save.start(lambda: (job(), tidy()), forget_best)
        elif not sharded:
            tidy()
        return saved

    return wrapped


def _keep_good(folder: Path) -> None:
    newest = next(whole_checkpoints(folder, logger.warning), None)
    if newest is not None and newest.steady:
        if newest.path.is_dir():
            give_name(newest.path.resolve(), folder / GOOD)
        else:
            duplicate(newest.path, folder / GOOD)
        logger.warning("updates are being skipped: %s stays as %s", newest.path.name, GOOD)


# Resuming


def loading(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap fairseq's function of that name: where ``checkpoint_last.pt`` is damaged, take the newest that is whole."""

    @functools.wraps(load_checkpoint)
    def wrapped(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        last_save.failure = ""
        if trainer.checkpoint_suffix or cfg.restore_file != LAST:
            return load_checkpoint(cfg, trainer, **kwargs)  # a file of each process, or the very file that is asked for
        other = _instead_of_last(Path(cfg.save_dir))
        if not other:
            return load_checkpoint(cfg, trainer, **kwargs)
        with changed(cfg, restore_file=other, finetune_from_model=None):
            return load_checkpoint(cfg, trainer, **kwargs)

    return wrapped


def _instead_of_last(folder: Path) -> str:
    """The checkpoint to resume from if not ``checkpoint_last.pt``; "" = that one is whole, or there is none.

    All processes call this together, and share out the files that are to be checked.
    """
    last = folder / LAST
    problem, candidates = from_first(lambda: _candidates(folder))
    for checkpoint in candidates:
        problem = first_problem(_problem(checkpoint.path))
        if not problem:
            if checkpoint.path == last:
                return ""
            logger.warning("resuming from %s (update %d) instead of %s", checkpoint.path, checkpoint.num_updates, last)
            return str(checkpoint.path)
        logger.warning("%s", problem)
    if not problem:
        return ""
    raise CheckpointError(
        f"{problem}, and {folder} has no other checkpoint that is whole. Put one there as {LAST}, or move {last} "
        "away to start anew"
    )


def _candidates(folder: Path) -> tuple[str, list[SavedCheckpoint]]:
    """What is wrong with the header of ``checkpoint_last.pt``, and what to resume from, in this order."""
    for path in [*remove_abandoned(folder, "checkpoint*.pt"), *remove_abandoned_saves(folder)]:
        logger.warning("removed %s, which a killed process left half written", path)
    last = folder / LAST
    if not os.path.lexists(last):
        return "", []
    first, problem = [], ""
    try:
        if not last.exists():
            raise CheckpointError(f"{last} leads to {last.readlink()}, which does not exist")
        first.append(read_header(last))
    except CheckpointError as error:
        problem = str(error)
        logger.warning("%s", problem)

    def complain(text: str) -> None:
        if str(last) not in text:
            logger.warning("%s", text)

    others = saved_checkpoints(folder, complain)
    return problem, [*first, *(each for each in others if not (first and each.path.samefile(last)))]


def _problem(path: Path) -> str:
    """What is wrong with this process's part of a checkpoint's files; "" = nothing."""
    rank = torch.distributed.get_rank() if distributed() else 0
    try:
        check_whole(path, rank, torch.distributed.get_world_size() if distributed() else 1)
    except CheckpointError as error:
        return str(error)
    return ""
