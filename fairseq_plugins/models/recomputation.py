"""Activations that are computed twice instead of kept: fairseq's ``--checkpoint-activations`` for all layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class Recomputable:
    """A layer that may keep its inputs only, and run once more in the backward pass.

    Not fairseq's ``checkpoint_wrapper``: it runs the forward pass without a graph, which would cut off routing losses,
    and once more outside of autocast, whose gradients are of another forward pass. torch's function restores the state
    of the random number generators and autocast, so that masks and roundings are those of the first time.
    """

    recompute = False
    """Whether activations are computed twice in training."""
    offload = False
    """Whether the inputs wait for the backward pass in the CPU's memory."""
    training: bool

    def set_recomputation(self, cfg: Any) -> None:
        """Take over fairseq's ``checkpoint_activations`` and ``offload_activations``; the second implies the first."""
        self.offload = bool(cfg.offload_activations)
        self.recompute = bool(cfg.checkpoint_activations) or self.offload

    def run(self, function: Callable[..., Any], *arguments: Any, twice: bool = True) -> Any:
        """Call `function`, and keep no more than its arguments if that is asked for.

        Args:
            function: computes the layer.
            arguments: its arguments.
            twice: False where it changes its arguments, so that it may run only once.
        """
        if not (twice and self.recompute and self.training and torch.is_grad_enabled()):
            return function(*arguments)
        with saved_tensors_hooks(to_cpu, from_cpu) if self.offload else nullcontext():
            return checkpoint(function, *arguments, use_reentrant=False)


def to_cpu(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Where a tensor was, and the same in the CPU's memory, without a copy if it is there already."""
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    return tensor.device, torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)


def from_cpu(kept: tuple[torch.device, Tensor]) -> Tensor:
    """Undo `to_cpu`."""
    device, tensor = kept
    return tensor.to(device)
