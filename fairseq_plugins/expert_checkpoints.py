"""Checkpoints of a run whose processes share out the experts: one file with all of them, as of one process.

The first process writes; the others of its group send it their experts, weights and moments, before it does. A
checkpoint so fits any number of processes: each takes its experts from what the first one reads.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mtmoe.parallel import ExpertParallel

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


def sharing(trainer: Any) -> ExpertParallel | None:
    """The ranks that share out the experts of a trainer's model; None where each has all of them."""
    parallel = getattr(trainer.task, "parallel", None)
    return parallel if parallel is not None and parallel.size > 1 else None


@contextlib.contextmanager
def all_experts(trainer: Any) -> Iterator[None]:
    """Let ``trainer.state_dict`` hold all experts in the first process; all have to enter together."""
    parallel = sharing(trainer)
    if parallel is None:
        yield
        return
    trainer.gathered_experts = _gather(trainer, parallel)
    try:
        yield
    finally:
        trainer.gathered_experts = None


def _gather(trainer: Any, parallel: ExpertParallel) -> dict[str, Any]:
    """Model weights by name, and under ``optimizer`` the state by number; empty but in the first process."""
    if parallel.layout.rank >= parallel.size:
        return {}  # the first group sends the same experts

    def gather(rows: Tensor) -> Tensor | None:
        whole = parallel.gather_experts(rows)
        return None if whole is None else whole.cpu()

    optimizer = None
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        optimizer = trainer.optimizer.state_dict()["state"]  # this first: it may bring weights up to date
    parameters = trainer.get_model().named_parameters()
    weights = {name: gather(value.detach()) for name, value in parameters if hasattr(value, "expert")}
    states: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(trainer.optimizer.params if optimizer is not None else ()):
        state = optimizer.get(number)
        if not hasattr(parameter, "expert") or not state:
            continue
        states[number] = {name: gather(state[name]) for name in MOMENTS}
        if "touched" in state:
            touched = gather(torch.tensor(state["touched"], device=parameter.device))
            states[number]["touched"] = None if touched is None else touched.tolist()
    return {"weights": weights, "states": states} if parallel.layout.rank == 0 else {}


def with_all_experts(state_dict: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap the trainer's method of that name: inside `all_experts` it holds them."""

    @functools.wraps(state_dict)
    def wrapped(trainer: Any) -> dict[str, Any]:
        state = state_dict(trainer)
        gathered = getattr(trainer, "gathered_experts", None)
        if gathered:
            state["model"].update(gathered["weights"])
            for number, values in gathered["states"].items():
                # A copy: what is there belongs to the optimiser.
                saved = state["last_optimizer_state"]["state"]
                saved[number] = {**saved[number], **values}
        return state

    return wrapped


def only_whole(save_checkpoint: Callable[..., str | None]) -> Callable[..., str | None]:
    """Wrap the trainer's method of that name: without the others' experts, nothing is written.

    fairseq's ``crash.pt`` is such a file: the process that fails writes it while the others go on, or wait.
    """

    @functools.wraps(save_checkpoint)
    def wrapped(trainer: Any, filename: str, extra_state: Any) -> str | None:
        if sharing(trainer) is not None and getattr(trainer, "gathered_experts", None) is None:
            logger.warning("%s is not written: this process holds only its own experts", filename)
            return None
        return save_checkpoint(trainer, filename, extra_state)

    return wrapped


def take_local(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimiser's state with the moments of all experts cut to those of this process.

    Args:
        state: as torch's optimisers save it.
        parameters: in the order of the optimiser.
    """
    cut = dict(state["state"])
    for number, parameter in enumerate(parameters):
        local = getattr(parameter, "local_experts", None)
        if local is None or number not in cut or len(cut[number]["exp_avg"]) == len(parameter):
            continue
        names = [name for name in (*MOMENTS, "touched") if name in cut[number]]
        cut[number] = {**cut[number], **{name: cut[number][name][local.start : local.stop] for name in names}}
    return {**state, "state": cut}
