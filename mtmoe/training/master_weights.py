"""Wide copies of weights, which an optimiser updates in the place of those that the model computes with.

A weight in bf16 has 8 significant bits: an update below 1/256 of it would be lost. So the optimiser keeps the weight in
fp32, its master copy, updates that, and rounds the result into the model. The copies of experts, and their moments, may
also lie in the CPU's memory while the model is on a GPU: then only experts with tokens cross the bus, their gradients
one way and their weights back.

Sources: Micikevicius et al. 2018 (Mixed precision training), section 3.1; Ren et al. 2021 (ZeRO-Offload).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtmoe.kernels import adamw as kernels

NARROW = (torch.bfloat16, torch.float16)
"""Types of weights that want a master copy."""

MOMENTS = ("exp_avg", "exp_avg_sq")

COPIED_AT_ONCE = 1 << 24
"""Elements of gradients that are held in another type or place at a time: 64 MiB in fp32."""


def wide_dtype(parameter: Tensor) -> torch.dtype:
    """The type of a parameter's master copy and moments."""
    return torch.promote_types(parameter.dtype, torch.float32)


def new_state(parameter: Tensor, host: bool) -> dict[str, Any]:
    """The state of AdamW before the first update, with a master copy.

    Args:
        parameter: the weight that the model computes with.
        host: keep the state in the CPU's memory, pinned where the weight is on a GPU.
    """
    options: dict[str, Any] = {"dtype": wide_dtype(parameter)}
    if host:
        options |= {"device": "cpu", "pin_memory": parameter.is_cuda}
    state: dict[str, Any] = {name: torch.zeros_like(parameter, **options) for name in MOMENTS}
    state["step"] = torch.zeros((), dtype=torch.float32, device=state["exp_avg"].device)
    state["master"] = torch.empty_like(parameter, **options).copy_(parameter.detach())
    return state


def restored(parameter: Tensor, saved: Mapping[str, Any], master: bool, host: bool) -> dict[str, Any]:
    """A state from a checkpoint in the types and the place of this run, whatever those of the run before were.

    Args:
        parameter: the weight that the model computes with; it gets the digits of a saved master copy.
        saved: what an optimiser with or without master copies kept for it.
        master: keep a master copy.
        host: as in `new_state`.
    """
    device = torch.device("cpu") if host else parameter.device
    dtype = wide_dtype(parameter) if master else parameter.dtype
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if isinstance(value, Tensor):
            value = value.to(device, torch.float32 if name == "step" else dtype)
            if host and parameter.is_cuda and name != "step":
                value = value.pin_memory()
        state[name] = list(value) if isinstance(value, list) else value
    if "master" in state:
        with torch.no_grad():
            parameter.copy_(state["master"])
        if not master:
            del state["master"]
    elif master:
        state["master"] = new_state(parameter, host)["master"]
    return state


def in_batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters, as many at a time as have `COPIED_AT_ONCE` elements, but at least one."""
    batch: list[Tensor] = []
    for parameter in parameters:
        if batch and sum(each.numel() for each in batch) + parameter.numel() > COPIED_AT_ONCE:
            yield batch
            batch = []
        batch.append(parameter)
    if batch:
        yield batch


def update_experts(
    parameter: Tensor, state: Mapping[str, Any], experts: Sequence[int], age: Sequence[int], **options: Any
) -> None:
    """Update the master copies of the listed experts, and give the model their new weights.

    Args:
        parameter: (num_experts, …) contiguous, with a gradient.
        state: with a master copy; where that lies, the update runs.
        experts: different ones.
        age: see `mtmoe.kernels.adamw.update_experts`, also for the rest.
        options: the rest.
    """
    assert parameter.grad is not None
    master, num_experts = state["master"], len(parameter)
    at_once = max(1, COPIED_AT_ONCE // max(1, parameter.numel() // num_experts))
    for start in range(0, len(experts), at_once):
        listed = experts[start : start + at_once]
        gradients = fetch(parameter.grad, listed, master)
        for row, expert in enumerate(listed):
            own = slice(expert, expert + 1)
            kernels.update_experts(
                master[own], gradients[row : row + 1], state["exp_avg"][own], state["exp_avg_sq"][own], [0],
                [age[start + row]], **options,
            )  # fmt: skip
    publish(parameter, master, experts)


def replay(
    parameter: Tensor, state: Mapping[str, Any], experts: Sequence[int], ends: Sequence[int], rows: Tensor
) -> None:
    """Make up for updates without gradient on the master copies, and give the model the new weights.

    Args:
        parameter: (num_experts, …) contiguous.
        state: with a master copy.
        experts: different ones.
        ends: see `mtmoe.kernels.adamw.replay`.
        rows: (updates, 3), see there.
    """
    kernels.replay(state["master"], state["exp_avg"], state["exp_avg_sq"], experts, ends, rows)
    publish(parameter, state["master"], experts)


def fetch(gradient: Tensor, experts: Sequence[int], master: Tensor) -> Tensor:
    """Gradients of the listed experts, in the type and on the device of their master copies.

    The copies wait for each other: what is read is complete, and no buffer is written while it is being sent.

    Returns:
        (experts, …) contiguous, no part of `gradient`.
    """
    rows = torch.stack([gradient[expert] for expert in experts])
    if rows.device != master.device and rows.is_cuda:
        rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)  # the bus reads pinned memory
    return rows.to(master.device, master.dtype)


def publish(parameter: Tensor, master: Tensor, experts: Sequence[int]) -> None:
    """Round the master copies of the listed experts into the weights that the model computes with."""
    for expert in experts:
        # Through .data: a graph may hold these weights, but knows other experts of them.
        parameter.data[expert].copy_(master[expert])
