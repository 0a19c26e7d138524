"""Go back to the last good checkpoint when training has diverged, with a lower learning rate, some times at most."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.logging import metrics

from fairseq_plugins.checkpoints import last_save
from fairseq_plugins.processes import from_first
from fairseq_plugins.update_guard import TrainingDiverged, find_broken
from mtmoe.checkpoint.sharded import remove_unnamed
from mtmoe.training.checkpoint_files import SavedCheckpoint, whole_checkpoints

logger = logging.getLogger(__name__)

ADVICE = (
    "Resume with a lower --lr, a longer --warmup-updates or --clip-norm 1 (with --reset-lr-scheduler for a new "
    "schedule), or try --autocast off"
)


def recovering(train: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap fairseq's function of that name, which trains for an epoch."""

    @functools.wraps(train)
    def wrapped(cfg: Any, trainer: Any, task: Any, epoch_itr: Any) -> Any:
        while True:
            try:
                valid_losses, should_stop = train(cfg, trainer, task, epoch_itr)
            except TrainingDiverged as error:
                go_back(cfg, trainer, task, epoch_itr, error)
                continue
            ends = epoch_itr.next_epoch_idx > (cfg.optimization.max_epoch or math.inf)
            if should_stop or ends or trainer.get_lr() <= cfg.optimization.stop_min_lr:
                last_save.check()
            return valid_losses, should_stop

    return wrapped


def go_back(cfg: Any, trainer: Any, task: Any, epoch_itr: Any, error: TrainingDiverged) -> None:
    """Put everything back to where the last good checkpoint was taken, and lower the learning rate.

    The checkpoint is saved again as ``checkpoint_last.pt`` with the new learning rate and the count, so that a run
    that is killed now goes on as this one.

    Raises:
        TrainingDiverged: all rollbacks are used up, or there is no checkpoint to go back to.
    """
    guard = getattr(task, "guard", None)
    if guard is None:  # another task than ours
        raise error
    limit = task.cfg.rollbacks
    if guard.rollbacks >= limit:
        done = f"training went back to a checkpoint {guard.rollbacks} times already" if limit else "--rollbacks is 0"
        raise TrainingDiverged(f"{error}. {done}; the last checkpoint is good. {ADVICE}") from error
    last_save.settle()  # the newest checkpoint may still be under way
    rollbacks, lr_scale = guard.rollbacks + 1, guard.lr_scale * task.cfg.rollback_lr_factor
    folder, seconds = Path(cfg.checkpoint.save_dir), trainer.cumulative_training_time()
    # From where the last rollback went to, training has diverged again: rather go to an older one, unless a newer one
    # has been saved since.
    wanted = {"until": trainer.get_num_updates(), "avoid": guard.rolled_back_to}
    for checkpoint in from_first(lambda: list(whole_checkpoints(folder, logger.warning, **wanted))):
        guard.release()
        if hasattr(trainer.optimizer, "release_experts"):
            trainer.optimizer.release_experts()
        # train() was left in the middle: its statistics are still open, and full of what is given up.
        metrics.reset()
        metrics.log_start_time("wall", priority=790, round=0)
        extra_state = trainer.load_checkpoint(str(checkpoint.path))
        epoch_itr.load_state_dict(extra_state["train_iterator"])
        trainer.lr_step(epoch_itr.epoch)
        if not find_broken(trainer.get_model(), trainer.optimizer):
            break
        logger.warning("%s holds weights that are not finite", checkpoint.path)
    else:
        raise TrainingDiverged(f"{error}. There is no good checkpoint in {folder} to go back to. {ADVICE}") from error
    guard.rollbacks, guard.lr_scale, guard.rolled_back_to = rollbacks, lr_scale, checkpoint.num_updates
    guard.consecutive = 0
    trainer._previous_training_time = seconds  # time that was spent in vain counts for --stop-time-hours
    logger.warning(
        "%s. Going back to %s (update %d), with the learning rate times %g from there on; rollback %d of %d",
        error, checkpoint.path.name, checkpoint.num_updates, lr_scale, rollbacks, limit,
    )  # fmt: skip
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    last_save.settle()
    rotates = cfg.checkpoint.keep_interval_updates > 0 and trainer.data_parallel_rank == 0
    if rotates and not last_save.failure:
        remove_given_up(folder, checkpoint)


def remove_given_up(folder: Path, target: SavedCheckpoint) -> None:
    """Remove numbered checkpoints from after the one that training went back to: rotation takes them for the newest."""
    for path in folder.glob("checkpoint_*_*.pt"):
        match = re.fullmatch(r"checkpoint_\d+_(\d+)\.pt", path.name)
        if match and int(match[1]) > target.num_updates:
            path.unlink()
            logger.warning("removed %s, which is of the updates that were given up", path)
    remove_unnamed(folder)
