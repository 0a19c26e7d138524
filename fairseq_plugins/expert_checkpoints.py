"""Resuming from a checkpoint that holds all experts, where processes share them out: each takes its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

STACKED = ("exp_avg", "exp_avg_sq", "master", "touched")
"""What an optimiser keeps of experts with a row for each."""


def take_local(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimiser's state with what it keeps of all experts cut to those of this process.

    Args:
        state: as torch's optimisers save it.
        parameters: in the order of the optimiser.
    """
    cut = dict(state["state"])
    for number, parameter in enumerate(parameters):
        local = getattr(parameter, "local_experts", None)
        if local is None or number not in cut or len(cut[number]["exp_avg"]) == len(parameter):
            continue
        names = [name for name in STACKED if name in cut[number]]
        cut[number] = {**cut[number], **{name: cut[number][name][local.start : local.stop] for name in names}}
    return {**state, "state": cut}
