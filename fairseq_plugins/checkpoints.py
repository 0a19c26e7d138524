"""Checkpoints that survive a kill, a full disk and weights that are not finite; resuming from what is whole."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from fairseq_plugins.processes import from_first
from fairseq_plugins.update_guard import TrainingDiverged, find_broken
from mtmoe.checkpoint.writing import NotWritten, save
from mtmoe.errors import CheckpointError
from mtmoe.files import duplicate, remove_abandoned
from mtmoe.training.checkpoint_files import check_whole, read_header, whole_checkpoints

logger = logging.getLogger(__name__)

LAST, GOOD = "checkpoint_last.pt", "checkpoint_good.pt"


class LastSave:
    """Remembers whether the last attempt to save has failed."""

    def __init__(self) -> None:
        self.failure = ""
        """Why it failed; "" = it did not."""

    def check(self) -> None:
        """Call at the end of training.

        Raises:
            NotWritten: its last checkpoint is not on disk.
        """
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

    Raises:
        NotWritten: the disk is full or fails. The file of that name is as it was.
    """
    save(state, Path(filename), checksum=False)


def copy_checkpoint(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Give a checkpoint a second name, in the place of fairseq's function that copies files.

    Returns:
        False if `dst_path` exists and may not be replaced.
    """
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
        broken = find_broken(trainer.get_model(), trainer.optimizer)
        if broken:
            raise TrainingDiverged(
                f"{broken} is not finite any more at update {trainer.get_num_updates()}; nothing was saved"
            )
        guard = getattr(trainer.task, "guard", None)
        steady = guard is None or guard.consecutive == 0
        folder, keeper = Path(cfg.save_dir), trainer.data_parallel_rank == 0 and not trainer.checkpoint_suffix
        best = getattr(wrapped, "best", None)
        try:
            if keeper and not steady and not (folder / GOOD).exists():
                _keep_good(folder)
            saved = save_checkpoint(cfg, trainer, epoch_itr, val_loss)
        except (OSError, NotWritten) as error:
            if best is None:
                wrapped.__dict__.pop("best", None)
            else:
                wrapped.best = best  # else the next one that is as good would not be saved as the best
            last_save.failure = str(error)
            logger.warning("%s. Training goes on, and tries again at the next checkpoint", error)
            return None
        last_save.failure = ""
        if keeper and steady:
            (folder / GOOD).unlink(missing_ok=True)
        return saved

    return wrapped


def _keep_good(folder: Path) -> None:
    newest = next(whole_checkpoints(folder, logger.warning), None)
    if newest is not None and newest.steady:
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
        other = from_first(lambda: _instead_of_last(Path(cfg.save_dir)))
        if not other:
            return load_checkpoint(cfg, trainer, **kwargs)
        with _changed(cfg, restore_file=other, finetune_from_model=None):
            return load_checkpoint(cfg, trainer, **kwargs)

    return wrapped


def _instead_of_last(folder: Path) -> str:
    """The checkpoint to resume from if not ``checkpoint_last.pt``; "" = that one is whole, or there is none."""
    for path in remove_abandoned(folder, "checkpoint*.pt"):
        logger.warning("removed %s, which a killed process left half written", path)
    last = folder / LAST
    if not last.exists():
        return ""
    try:
        read_header(last)
        check_whole(last)
    except CheckpointError as error:
        logger.warning("%s", error)
        problem = error
    else:
        return ""
    newest = next(whole_checkpoints(folder, lambda text: None if str(last) in text else logger.warning(text)), None)
    if newest is None:
        raise CheckpointError(
            f"{problem}, and {folder} has no other checkpoint that is whole. Put one there as {LAST}, or move {last} "
            "away to start anew"
        )
    logger.warning("resuming from %s (update %d) instead of %s", newest.path, newest.num_updates, last)
    return str(newest.path)


@contextlib.contextmanager
def _changed(cfg: Any, **values: Any) -> Iterator[None]:
    before = {key: cfg[key] for key in values}
    with open_dict(cfg):
        try:
            cfg.update(values)
            yield
        finally:
            cfg.update(before)
