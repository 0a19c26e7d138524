"""Restarts at the phases of a curriculum: fresh moments and warm-up, with the weights that there are."""

from __future__ import annotations

import logging
from typing import Any

from fairseq.trainer import Trainer

logger = logging.getLogger(__name__)


def restart_at_phases() -> None:
    """Let the trainer restart where its task says so; `mtmoe_translation` does with ``--curriculum-restart warmup``.

    Which phase an update is in follows from its number, and the moments of a phase are in its checkpoints, so that a
    resumed run goes on as an unbroken one.
    """
    begin_epoch, lr_step_update = Trainer.begin_epoch, Trainer.lr_step_update

    def restarting(self: Any, epoch: int) -> None:
        update = self.get_num_updates()
        if update and _restarted_at(self) == update:
            forget_moments(self.optimizer)
            logger.info("update %d: optimiser and learning rate begin anew for the next phase", update)
        begin_epoch(self, epoch)

    def counted_from_the_restart(self: Any) -> Any:
        begun = _restarted_at(self)
        if hasattr(self.lr_scheduler, "total_num_update"):  # it then ends where it would have ended
            self.lr_scheduler.total_num_update = self.lr_scheduler.cfg.total_num_update - begun
        self._num_updates -= begun
        try:
            return lr_step_update(self)
        finally:
            self._num_updates += begun

    Trainer.begin_epoch, Trainer.lr_step_update = restarting, counted_from_the_restart


def forget_moments(optimizer: Any) -> None:
    """Leave an optimiser of fairseq as it was before its first update; weights and options stay."""
    inner = optimizer.optimizer
    if hasattr(inner, "forget"):
        inner.forget()
    else:
        inner.state.clear()


def _restarted_at(trainer: Any) -> int:
    restarted_at = getattr(trainer.task, "restarted_at", None)
    return restarted_at(trainer.get_num_updates()) if restarted_at is not None else 0
