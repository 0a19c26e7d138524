"""Gradients of experts that are shared out: what the trainer's average over the world must not touch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from mtmoe.parallel.expert_parallel import ExpertParallel

EXPERT_GRADIENT_SCALES = ("world_size", "sqrt_world_size")
"""world_size: the gradient of one process with the whole batch; sqrt_world_size: that times the root of the
expert-parallel size (NLLB)."""


def reduce_expert_gradients(
    parameters: Iterable[nn.Parameter], parallel: ExpertParallel, scale: str = "world_size"
) -> None:
    """Do for the gradients of experts what the average over the world does for those of replicated parameters.

    A rank's gradient of its experts is that of the losses of all ranks of its expert-parallel group already, since the
    exchange brought them there: summed over the ranks that hold the same experts, it is that of all losses. Replicated
    parameters get the sum over all ranks divided by the world size; so do experts here, in mode ``world_size``.

    Args:
        parameters: experts' weights; one without a gradient takes part with zeros where others may have one.
        parallel: the ranks.
        scale: one of `EXPERT_GRADIENT_SCALES`.

    Raises:
        ValueError: the scale is unknown.

    Sources: NLLB Team 2022 and Artetxe et al. 2021 for sqrt_world_size, which lowers the step less than the exact
    average because an expert's batch is smaller.
    """
    if scale not in EXPERT_GRADIENT_SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of: {', '.join(EXPERT_GRADIENT_SCALES)}")
    layout = parallel.layout
    factor = 1 / layout.world_size
    if scale == "sqrt_world_size":
        factor *= math.sqrt(layout.expert_parallel_size)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.mul_(factor)
        if layout.data_parallel_size > 1:
            distributed.all_reduce(parameter.grad, group=parallel.groups.data_parallel)


def total_norm(replicated: Tensor, experts: Tensor, parallel: ExpertParallel) -> Tensor:
    """Norm of the gradient of the whole model, bit for bit the same on all ranks of a group.

    Args:
        replicated: () norm of the gradients that all ranks share.
        experts: () norm of the gradients of this rank's experts.
        parallel: the ranks; all of an expert-parallel group have to call this.

    Returns:
        () ``sqrt(replicated² + sum over the group of experts²)``, the type of `replicated`.
    """
    squares = [torch.zeros_like(experts, dtype=torch.float64) for _ in range(parallel.size)]
    distributed.all_gather(squares, experts.double().square(), group=parallel.groups.expert_parallel)
    # Added up here in the order of the ranks: the clip coefficient must not differ by a rounding error.
    return (replicated.double().square() + torch.stack(squares).sum()).sqrt().to(replicated.dtype)
