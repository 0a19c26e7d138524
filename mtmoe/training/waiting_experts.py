"""What experts whose updates wait have missed; see `mtmoe.training.expert_adamw`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn


def horizon(betas: tuple[float, float]) -> int:
    """Updates after an expert's last gradient whose momentum still counts.

    By Cauchy–Schwarz ``|exp_avg| <= C sqrt(exp_avg_sq)`` with ``C**2 = (1 - beta1)**2 / ((1 - beta2) (1 - r**2))``, so
    the n-th update without gradient moves a weight by at most ``lr C r**n`` (the bias corrections are near 1 by then),
    and all from the n-th on by ``lr C r**n / (1 - r)``. That is to be below ``2**-25 lr``, the rounding error of one
    fp32 update of size lr.

    Raises:
        ValueError: beta1**2 >= beta2, so that momentum does not fade.
    """
    beta1, beta2 = betas
    ratio = beta1 / math.sqrt(beta2)
    if ratio >= 1:
        raise ValueError(f"betas={betas}: exact expert updates need beta1**2 < beta2; choose dense updates instead")
    if beta1 == 0:
        return 0
    bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio**2))
    return max(0, math.ceil(math.log(2**-25 * (1 - ratio) / bound) / math.log(ratio)))


@dataclass
class Bank:
    """Stacked weights of one layer's experts, and what each of them has missed."""

    parameters: list[nn.Parameter]
    group: dict[str, Any]
    step: int
    touched: list[int]
    """Of each expert the update that its moments are of; 0 = it never had a gradient."""
    current: list[int]
    """Of each expert the update that its weights are of."""
    used: set[int] = field(default_factory=set)
    """Experts that may have a gradient now."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """Learning rate and weight decay of the last updates, up to `step`."""

    def missed(self, experts: Sequence[int]) -> tuple[list[int], list[int], np.ndarray]:
        """Those of the experts whose weights change, and their updates for `kernels.replay`, in fp64."""
        beta1, beta2 = self.group["betas"]
        current, touched = (np.array([each[expert] for expert in experts]) for each in (self.current, self.touched))
        counts = self.step - current
        owner = np.repeat(np.arange(len(experts)), counts)
        step = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + current[owner] + 1
        rates = np.array(self.history)[step - 1 - self.step]  # counted from the end
        since = step - touched[owner]
        moves = (since <= horizon((beta1, beta2))) & (touched[owner] > 0)
        since = np.where(moves, since, 0)
        # exp_avg_sq would be smaller by beta2**since: its root is taken once, and its factor goes into the others.
        root = beta2 ** (since / 2) / np.sqrt(1 - beta2**step)
        rows = np.stack(
            [
                1 - rates[:, 0] * rates[:, 1],
                np.where(moves, rates[:, 0] * beta1**since / (1 - beta1**step) / root, 0),
                np.where(moves, self.group["eps"] / root, 1),
            ],
            axis=1,
        )
        kept = moves | (rows[:, 0] != 1)
        sizes = np.bincount(owner[kept], minlength=len(experts))
        changed = np.flatnonzero(sizes)
        return [experts[int(i)] for i in changed], np.cumsum(sizes[changed]).tolist(), rows[kept]
