"""A curriculum that training finds for itself, with no first run; our own method.

Every direction trains from update 0. At each validation:

1. *Return.* A waiting direction trains again from the validation that is nearest to its planned return.
2. *Measure.* A direction over-fits once its last `PATIENCE` losses all lie more than `MARGIN` above its best, the
   lowest mean of two validations in a row. The effective epochs at that best are its *best epochs* E. It waits, and
   returns so that the end of training shows it for E epochs again: ``k = E * n / (B * p)`` updates before the end, but
   for at most half of what is left. Here n are its training pairs, p its share of the sampling with all directions
   active, and B the sentence pairs of an update so far. If it over-fits again after its return, it stops for good.
3. *Predict.* From two measured directions on, ``log E = a + b * log n`` is fitted through them: b is the median slope
   over all pairs of them (Theil and Sen), within `SLOPES`, a the median. A direction that has been seen more often than
   the fit allows and still improves counts as measured there, and goes on. Another one, for which more than `EXCESS`
   times its predicted E are left, waits before it over-fits, until ``k = E * n / (B * p)`` updates before the end; k is
   computed anew at each validation. What it has been seen before is not taken off: it fades while it waits.

Directions with at least half as many pairs as the largest always train. The same sampling temperature holds in every
active set. All that decides is in the validation losses and the state, which a checkpoint keeps. It wants some 20
validations in a run: none of this happens in between.

After NLLB Team 2022, section 6.4, in that a direction should train for about as long as it takes to its best, and at
the end. What differs: that length is found during training, and a direction has trained before it waits.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mtmoe.errors import ConfigError
from mtmoe.training.sampling import temperature_probabilities

MARGIN = 0.01
"""Share above its best from which a loss says that a direction over-fits."""

PATIENCE = 2
"""Validations in a row that have to say so."""

EXCESS = 1.25
"""Of its predicted best epochs, what may be left to a direction without its being made to wait."""

SLOPES = (-0.5, 0.5)
"""Bounds of b, so that a fit through directions of like size does not run away at others."""

TRAINING, WAITING, STOPPED = "training", "waiting", "stopped"


@dataclass(slots=True)
class DirectionState:
    """Where a direction stands."""

    status: str = TRAINING
    starts: int = 0
    """While it waits: update at which it is to return."""
    best_epochs: float | None = None
    """Effective epochs at its best, once it has over-fitted."""
    returned: bool = False
    losses: list[float] = field(default_factory=list)
    """Validation losses since it has been training without a break."""
    epochs: list[float] = field(default_factory=list)
    """Effective epochs at these."""

    def best(self) -> tuple[float, float]:
        """(loss, effective epochs) of the two validations in a row with the lowest mean; the latest of equal ones."""
        points = zip(itertools.pairwise(self.losses), itertools.pairwise(self.epochs), strict=True)
        means = [(sum(losses) / 2, sum(epochs) / 2) for losses, epochs in points]
        return min(means, key=lambda mean: (mean[0], -mean[1]))

    def overfits(self) -> bool:
        """Whether the last losses all lie above the best by the margin."""
        if len(self.losses) < 2 + PATIENCE:
            return False
        return min(self.losses[-PATIENCE:]) > self.best()[0] * (1 + MARGIN)


@dataclass(frozen=True, slots=True)
class Decision:
    """A change of the plan, for the log."""

    direction: str
    action: str
    """"wait", "move" (its return), "return" or "stop"."""
    starts: int
    """Update of its return; that of the decision where it returns, 0 where it stops."""
    epochs: float
    """Effective epochs so far."""
    best_epochs: float | None
    """Measured or predicted."""
    reason: str


class AutoCurriculum:
    """Decides at each validation which directions train; stands in for a `mtmoe.training.curriculum.Schedule`.

    Args:
        sizes: direction -> training pairs.
        temperature: of sampling.
        max_update: total updates of the run.

    Raises:
        ConfigError: `max_update` is not set, so that there is no end to plan for.
    """

    boundaries: tuple[int, ...] = (0,)
    """Nothing is fixed beforehand."""

    def __init__(self, sizes: Mapping[str, int], temperature: float, max_update: int) -> None:
        if max_update <= 0:
            raise ConfigError("the curriculum auto plans for the end of training; give --max-update")
        self.sizes, self.max_update = dict(sizes), max_update
        self.shares = temperature_probabilities(sizes, temperature)
        self.directions = {name: DirectionState() for name in sizes}
        self.last_update = 0
        largest = max(self.sizes.values())
        self.always = {name for name, size in self.sizes.items() if 2 * size >= largest}
        """Directions that always train."""

    def active(self, update: int) -> tuple[str, ...]:
        """Directions that train now, whatever the update."""
        return tuple(name for name, state in self.directions.items() if state.status == TRAINING)

    def next_boundary(self, update: int) -> int | None:
        """None: only a validation changes the active directions."""
        return None

    def validated(self, update: int, losses: Mapping[str, float], epochs: Mapping[str, float]) -> list[Decision]:
        """Take the results of a validation, and plan anew.

        Args:
            update: number of updates so far; a second validation at one update changes nothing.
            losses: direction -> validation loss; a direction without one always trains.
            epochs: direction -> effective epochs so far.

        Returns:
            What has changed.
        """
        interval, self.last_update = update - self.last_update, update
        seen = sum(epochs[name] * size for name, size in self.sizes.items())
        if interval <= 0 or seen <= 0 or update >= self.max_update:
            return []
        updates_per_epoch = {  # with all directions active, as at the end
            name: size * update / (seen * self.shares[name]) for name, size in self.sizes.items() if size
        }
        known = {name: self.directions[name] for name in updates_per_epoch if name in losses}
        for name, state in known.items():
            if state.status == TRAINING:
                state.losses.append(losses[name])
                state.epochs.append(epochs[name])
        decisions = []
        for name, state in known.items():
            if state.status == WAITING and update + interval / 2 >= state.starts:
                state.status, state.starts, state.returned, state.losses, state.epochs = TRAINING, 0, True, [], []
                reason = "as many updates are left as it should train"
                decisions.append(Decision(name, "return", update, epochs[name], state.best_epochs, reason))
        for name, state in known.items():
            if state.status == TRAINING and name not in self.always and state.overfits():
                decisions.append(self._overfitted(name, state, update, epochs[name], updates_per_epoch[name]))
        predicted = self._predict(epochs)
        for name, state in known.items():
            if name in predicted and name not in self.always:
                decisions += self._foresee(
                    name, state, update, interval, epochs[name], predicted[name], updates_per_epoch[name]
                )
        return decisions

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides, as plain values."""
        directions = {name: asdict(state) for name, state in self.directions.items()}
        return {"last_update": self.last_update, "directions": directions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.last_update = state["last_update"]
        for name in self.directions:
            if name in state["directions"]:
                self.directions[name] = DirectionState(**state["directions"][name])

    def _overfitted(
        self, name: str, state: DirectionState, update: int, epochs: float, updates_per_epoch: float
    ) -> Decision:
        loss, best_epochs = state.best()
        rise = f"loss {state.losses[-1]:.3f}, was {loss:.3f} after {best_epochs:.1f} epochs"
        if state.returned:
            state.status = STOPPED
            return Decision(name, "stop", 0, epochs, state.best_epochs, f"over-fits again: {rise}")
        state.status, state.best_epochs = WAITING, best_epochs
        length = min(best_epochs * updates_per_epoch, (self.max_update - update) / 2)
        state.starts = self.max_update - round(length)
        return Decision(name, "wait", state.starts, epochs, best_epochs, f"over-fits: {rise}")

    def _foresee(
        self, name: str, state: DirectionState, update: int, interval: int, epochs: float, best_epochs: float,
        updates_per_epoch: float,
    ) -> list[Decision]:  # fmt: skip
        """Make a direction wait before it over-fits, or move the return of one that waits for that reason."""
        if state.best_epochs is not None or state.returned or state.status == STOPPED:
            return []
        starts = self.max_update - round(best_epochs * updates_per_epoch)
        if state.status == WAITING:
            moved, state.starts = starts != state.starts, starts
            return [Decision(name, "move", starts, epochs, best_epochs, "the fit has changed")] if moved else []
        left = (self.max_update - update) / updates_per_epoch
        if best_epochs <= epochs or left <= EXCESS * best_epochs or starts - update < 2 * interval:
            return []
        state.status, state.starts = WAITING, starts
        reason = f"would be seen {left:.1f} times more, {best_epochs:.1f} should do"
        return [Decision(name, "wait", starts, epochs, best_epochs, reason)]

    def _predict(self, epochs: Mapping[str, float]) -> dict[str, float]:
        """Direction -> best epochs by the fit; nothing before two directions have been measured."""
        measured = {
            name: (math.log(self.sizes[name]), math.log(state.best_epochs))
            for name, state in self.directions.items()
            if state.best_epochs
        }
        if len(measured) < 2:
            return {}
        intercept, slope = fit_line(list(measured.values()))
        for name, state in self.directions.items():
            if name not in measured and state.status == TRAINING and epochs.get(name, 0.0) > 0:
                point = (math.log(self.sizes[name]), math.log(epochs[name]))
                if point[1] > intercept + slope * point[0]:
                    measured[name] = point
        intercept, slope = fit_line(list(measured.values()))
        return {name: math.exp(intercept + slope * math.log(size)) for name, size in self.sizes.items() if size > 0}


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Fit ``y = a + b * x`` by medians: outliers do not count, and the order of the points does not either.

    Args:
        points: (x, y); at least one. Where all x are equal, b is 0.

    Returns:
        (a, b), b within `SLOPES`.

    Source: Theil 1950; Sen 1968.
    """
    slopes = [(y - v) / (x - u) for (x, y), (u, v) in itertools.combinations(points, 2) if x != u]
    slope = min(max(statistics.median(slopes), SLOPES[0]), SLOPES[1]) if slopes else 0.0
    return statistics.median(y - slope * x for x, y in points), slope
