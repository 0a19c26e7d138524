"""Updates whose gradient is far larger than those before it: bad batches, and the first sign of divergence."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from mtmoe.errors import ConfigError

WINDOW = 128
"""Gradient norms that an update is compared with, and of the warm-up before the first comparison."""


class SpikeDetector:
    """Tells a gradient norm that exceeds a multiple of the running median.

    The median of the last `WINDOW` norms, spikes among them: it does not move for some outliers, but follows a lasting
    change (a curriculum's next phase, another loss weight) after half a window at the latest.

    Args:
        factor: how many times the median a norm may be; 0 = any.

    Raises:
        ConfigError: the factor would take ordinary updates for spikes.
    """

    def __init__(self, factor: float) -> None:
        if factor != 0 and not factor > 1:
            raise ConfigError(f"spike-factor={factor:g} must be more than 1 times the median, or 0 for no guard")
        self.factor = factor
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def exceeded(self, norm: float) -> float:
        """Judge the norm of an update, a finite number, by those before it; then remember it.

        Returns:
            The median that a spike exceeds `factor` times; 0 = it is no spike, or the window is not full yet.
        """
        if not self.factor:
            return 0.0
        median = statistics.median(self._norms) if len(self._norms) == WINDOW else float("inf")
        self._norms.append(norm)
        return median if norm > self.factor * median else 0.0

    def state(self) -> list[float]:
        """The norms, oldest first, for a checkpoint."""
        return list(self._norms)

    def restore(self, norms: Sequence[float]) -> None:
        """Take back what `state` gave."""
        self._norms = deque(norms, maxlen=WINDOW)
