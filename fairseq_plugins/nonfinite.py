"""Skip an update whose loss or gradient is not finite; stop training when too many follow each other."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from torch import Tensor

from mtmoe.errors import MtmoeError

logger = logging.getLogger(__name__)


class TrainingDiverged(MtmoeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Watches the gradient norm that fairseq computes anyway, so that nothing more is waited for.

    A skipped update counts as an update: learning rate and curriculum go on, and a resumed run stays in step.
    fp16 optimisers are left alone, since their loss scaling lives on overflows.

    Args:
        limit: skipped updates in a row after which training stops; 0 = never.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        """Updates skipped since the start of training, over all resumes."""
        self.consecutive = 0
        """Updates skipped in a row up to now."""
        self._skip = False
        self._watched: FairseqOptimizer | None = None

    def watch(self, optimizer: FairseqOptimizer) -> None:
        """Look at every gradient norm of `optimizer` from now on."""
        scales = (FP16Optimizer, MemoryEfficientFP16Optimizer, AMPOptimizer)
        if optimizer is self._watched or isinstance(optimizer, scales):
            return
        self._watched = optimizer
        clip = optimizer.clip_grad_norm

        def clip_grad_norm(max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
            norm = clip(max_norm, aggregate_norm_fn)
            self._skip = not bool(torch.isfinite(norm).all())
            # fairseq takes a norm that is not finite for a fatal error; 0 lets the update pass, and `step` skips it.
            return torch.zeros_like(norm) if self._skip else norm

        optimizer.clip_grad_norm = clip_grad_norm

    def poison(self, loss: Tensor) -> Tensor:
        """The loss, such that a value that is not finite makes the gradient NaN: every process then sees it."""
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)

    def step(self, optimizer: FairseqOptimizer, update: int) -> None:
        """Let the optimiser step, or skip and count.

        Raises:
            TrainingDiverged: `limit` updates in a row have been skipped.
        """
        if not self._skip:
            self.consecutive = 0
            optimizer.step()
            return
        self._skip = False
        self.skipped += 1
        self.consecutive += 1
        logger.warning(
            "update %d skipped: its loss or gradient is not finite (%d in a row, %d in all)",
            update, self.consecutive, self.skipped,
        )  # fmt: skip
        if self.limit and self.consecutive >= self.limit:
            raise TrainingDiverged(
                f"{self.consecutive} updates in a row had a loss or gradient that is not finite, "
                f"up to update {update}; the last checkpoint is good. "
                "Resume with a lower --lr, a longer --warmup-updates or --clip-norm 1 "
                "(with --reset-lr-scheduler for a new schedule), or try --autocast off. "
                "--max-nonfinite-updates sets this limit."
            )
