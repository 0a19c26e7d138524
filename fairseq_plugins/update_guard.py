"""Skip an update that is not finite or far too large; give training up when too many follow each other."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from torch import Tensor, nn

from fairseq_plugins.processes import largest
from mtmoe.errors import MtmoeError
from mtmoe.training.spikes import SpikeDetector

logger = logging.getLogger(__name__)

NOT_FINITE = "its loss or gradient is not finite"


class TrainingDiverged(MtmoeError):
    """Training cannot go on from the weights that it has; a checkpoint from before may do."""


class UpdateGuard:
    """Watches the gradient norm that fairseq computes anyway, so that nothing more is waited for.

    A skipped update counts as an update: learning rate and curriculum go on, and a resumed run stays in step.
    fp16 optimisers are left alone, since their loss scaling lives on overflows.

    Args:
        limit: skipped updates in a row after which training has diverged; 0 = never.
        spike_factor: skip an update whose gradient norm is more than that many times the running median; 0 = off.
    """

    def __init__(self, limit: int, spike_factor: float = 0.0) -> None:
        self.limit = limit
        self.spikes = SpikeDetector(spike_factor)
        self.skipped = 0
        """Updates skipped since the start of training, over all resumes."""
        self.skipped_spikes = 0
        """Those of them that were finite, but far too large."""
        self.consecutive = 0
        """Updates skipped in a row up to now."""
        self.rollbacks = 0
        """Times that training has gone back to a checkpoint."""
        self.rolled_back_to = -1
        """Update of that checkpoint, the last time; -1 = never."""
        self.lr_scale = 1.0
        """What the schedule's learning rate is multiplied by."""
        self._reason = ""
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
            value = float(norm)  # the one time that an update is waited for
            self._reason = "" if math.isfinite(value) else NOT_FINITE
            if self._reason:
                # fairseq takes a norm that is not finite for a fatal error; 0 lets it pass, and `step` skips it.
                return torch.zeros_like(norm)
            median = self.spikes.exceeded(value)
            if median:
                self._reason = (
                    f"its gradient norm {value:.3g} is more than {self.spikes.factor:g} times the median {median:.3g}"
                )
            return norm

        optimizer.clip_grad_norm = clip_grad_norm

    def release(self) -> None:
        """Let go of the optimiser that is being watched, since another one takes its place."""
        self._watched = None

    def poison(self, loss: Tensor) -> Tensor:
        """The loss, such that a value that is not finite makes the gradient NaN: every process then sees it."""
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)

    def step(self, optimizer: FairseqOptimizer, model: nn.Module, update: int) -> None:
        """Let the optimiser step, or skip and count.

        Raises:
            TrainingDiverged: `limit` updates in a row have been skipped, or weights are not finite any more.
        """
        reason, self._reason = self._reason, ""
        if not reason:
            self.consecutive = 0
            self._scaled_step(optimizer)
            return
        self.skipped += 1
        self.skipped_spikes += reason != NOT_FINITE
        self.consecutive += 1
        logger.warning(
            "update %d skipped: %s (%d in a row, %d in all)", update, reason, self.consecutive, self.skipped
        )
        if reason == NOT_FINITE:
            broken = find_broken(model, optimizer)
            if broken:
                raise TrainingDiverged(f"{broken} is not finite any more after update {update - 1}")
        if self.limit and self.consecutive >= self.limit:
            raise TrainingDiverged(
                f"{self.consecutive} updates in a row had a loss or gradient that is not finite, or far too large, "
                f"up to update {update} (--max-nonfinite-updates sets this limit)"
            )

    def log(self) -> None:
        """Add to the metrics of an update what has happened up to now; nothing while all is well."""
        if self.skipped:
            metrics.log_scalar("skipped_updates", self.skipped, weight=0, priority=520)
        if self.skipped_spikes:
            metrics.log_scalar("skipped_spikes", self.skipped_spikes, weight=0, priority=521)
        if self.rollbacks:
            metrics.log_scalar("rollbacks", self.rollbacks, weight=0, priority=522)
            metrics.log_scalar("lr_scale", self.lr_scale, weight=0, priority=301)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: a resumed run decides as an unbroken one."""
        return {
            "skipped_updates": self.skipped,
            "skipped_spikes": self.skipped_spikes,
            "consecutive_skipped": self.consecutive,
            "rollbacks": self.rollbacks,
            "rolled_back_to": self.rolled_back_to,
            "lr_scale": self.lr_scale,
            "gradient_norms": self.spikes.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; a checkpoint of an older version has the first and the third only."""
        self.skipped = state["skipped_updates"]
        self.skipped_spikes = state.get("skipped_spikes", 0)
        self.consecutive = state["consecutive_skipped"]
        self.rollbacks = state.get("rollbacks", 0)
        self.rolled_back_to = state.get("rolled_back_to", -1)
        self.lr_scale = state.get("lr_scale", 1.0)
        self.spikes.restore(state.get("gradient_norms", []))

    def _scaled_step(self, optimizer: FairseqOptimizer) -> None:
        if self.lr_scale == 1.0:
            optimizer.step()
            return
        # For the step only: the schedulers read the rate back that they have set.
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.lr_scale
            optimizer.step()
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def find_broken(model: nn.Module, optimizer: FairseqOptimizer) -> str:
    """Name a weight or a value of the optimiser's state that is not finite; "" = there is none in any process.

    One pass over all of them; all processes have to call this together.
    """
    found = next((name for name, value in _values(model, optimizer) if not _finite(value)), "")
    return (found or "something of another process") if largest(int(bool(found))) else ""


def _values(model: nn.Module, optimizer: FairseqOptimizer) -> Iterator[tuple[str, Tensor]]:
    names = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name
        yield name, parameter.detach()
    for parameter, state in optimizer.optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor):
                yield f"{key} of {names.get(parameter, 'a parameter')} in the optimiser", value


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() == 0:
        return True
    # A sum tells at the speed of memory, 10 times that of a maximum; only a sum that overflows says too little.
    return math.isfinite(float(value.sum())) or math.isfinite(float(torch.linalg.vector_norm(value, float("inf"))))
