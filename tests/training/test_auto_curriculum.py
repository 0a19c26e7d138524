import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import ConfigError
from mtmoe.training.auto_curriculum import STOPPED, TRAINING, WAITING, AutoCurriculum, DirectionState, fit_line
from mtmoe.training.sampling import temperature_probabilities

SIZES = {"en-de": 100_000, "en-ro": 8_000, "en-mk": 4_000, "en-is": 1_000}
PAIRS_OF_AN_UPDATE = 50


class World:
    """Directions whose loss falls until they have been memorised for their best number of epochs, then rises.

    Memorising fades while a direction waits, and what others teach goes on.
    """

    def __init__(self, plan, best, fading=0.3, noise=lambda update, name: 0.0):
        self.plan, self.best, self.fading, self.noise = plan, best, fading, noise
        self.epochs, self.memorised = dict.fromkeys(plan.sizes, 0.0), dict.fromkeys(plan.sizes, 0.0)

    def train(self, updates, temperature):
        active = self.plan.active(0)
        shares = temperature_probabilities({name: self.plan.sizes[name] for name in active}, temperature)
        for name in self.plan.sizes:
            epochs = shares.get(name, 0.0) * PAIRS_OF_AN_UPDATE * updates / self.plan.sizes[name]
            self.epochs[name] += epochs
            self.memorised[name] += epochs
            if name not in active:
                self.memorised[name] *= 1 - self.fading

    def losses(self, update):
        return {name: general(update) + self.extra(name) + self.noise(update, name) for name in self.plan.sizes}

    def extra(self, name):
        return 0.4 * abs(math.log((self.memorised[name] + 0.2) / self.best[name]))


def general(update):
    return 3 + math.exp(-update / 1500)


def simulate(best, total=10_000, interval=250, temperature=5.0, reload=False, **world):
    plan = AutoCurriculum(SIZES, temperature, total)
    world = World(plan, best, **world)
    decisions, sets = [], []
    for update in range(interval, total + 1, interval):
        world.train(interval, temperature)
        decisions += [(update, decision) for decision in plan.validated(update, world.losses(update), world.epochs)]
        sets.append(plan.active(update))
        if reload:  # as a run that is stopped at each validation
            state = json.loads(json.dumps(plan.state_dict()))
            plan = world.plan = AutoCurriculum(SIZES, temperature, total)
            plan.load_state_dict(state)
    return decisions, sets, world


BEST = {"en-de": 100.0, "en-ro": 6.0, "en-mk": 5.0, "en-is": 4.0}


def test_what_overfits_waits_and_trains_at_the_end():
    decisions, sets, world = simulate(BEST)
    first = {}
    for update, decision in decisions:
        first.setdefault(decision.direction, (update, decision))
    assert set(first) <= {"en-ro", "en-mk", "en-is"}  # the largest always trains
    update, decision = first["en-is"]
    assert decision.action == "wait"
    assert "over-fits: loss" in decision.reason
    assert 2.0 < decision.best_epochs < 6.0
    length = 10_000 - decision.starts  # shows it for its best epochs again
    seen = length * PAIRS_OF_AN_UPDATE * temperature_probabilities(SIZES, 5.0)["en-is"] / 1000
    assert seen == pytest.approx(decision.best_epochs, rel=0.05)
    assert all("en-is" not in each for each in sets[update // 250 - 1 : decision.starts // 250 - 2])
    assert "en-is" in sets[-1]
    assert all("en-de" in each for each in sets)
    # It would have been seen for so long without the plan, and ends with a lower loss than so.
    without = 10_000 * PAIRS_OF_AN_UPDATE * temperature_probabilities(SIZES, 5.0)["en-is"] / 1000
    assert without > 10 * BEST["en-is"]
    assert world.extra("en-is") < 0.4 * math.log(without / BEST["en-is"]) - 0.5


def test_the_fit_holds_back_what_has_not_yet_overfitted():
    decisions, _, world = simulate({**BEST, "en-ro": 12.0})
    held = [(update, d) for update, d in decisions if d.direction == "en-ro" and d.action == "wait"]
    assert held
    assert "times more" in held[0][1].reason
    assert world.epochs["en-ro"] < 12.0
    for update, decision in decisions:  # as many epochs are left at its return as are predicted
        if decision.direction == "en-ro" and decision.action in ("wait", "move"):
            share = temperature_probabilities(SIZES, 5.0)["en-ro"]
            left = (10_000 - decision.starts) * PAIRS_OF_AN_UPDATE * share / SIZES["en-ro"]
            assert left == pytest.approx(decision.best_epochs, rel=0.1), update


@given(st.integers(0, 2**16), st.sampled_from([100, 250, 900]))
def test_a_reloaded_state_decides_the_same(seed, interval):
    def noise(update, name):
        return 0.03 * math.sin(seed + update * 0.7 + len(name) * hash_of(name))

    def hash_of(name):
        return sum(map(ord, name)) % 17

    plain = simulate(BEST, interval=interval, noise=noise)
    again = simulate(BEST, interval=interval, noise=noise, reload=True)
    assert plain[:2] == again[:2]


def test_noise_on_falling_curves_decides_nothing():
    best = dict.fromkeys(SIZES, 1e6)
    decisions, sets, _ = simulate(best, noise=lambda update, name: 0.004 * (update // 250 % 2))
    assert not decisions
    assert set(sets) == {tuple(SIZES)}


def test_what_overfits_again_stops():
    plan = AutoCurriculum(SIZES, 5.0, 2000)
    epochs = dict.fromkeys(SIZES, 0.02)
    losses = [3.0, 2.5, 2.5, 2.6, 2.7, *[2.7] * 7, 2.4, 2.3, 2.3, 2.5, 2.6]
    statuses = []
    for number, loss in enumerate(losses, start=1):
        epochs["en-is"] = 0.5 * number
        plan.validated(100 * number, {**dict.fromkeys(SIZES, 3.0), "en-is": loss}, epochs)
        statuses.append(plan.directions["en-is"].status)
    assert statuses[:5] == [TRAINING] * 4 + [WAITING]
    assert statuses[5:] == [WAITING] * 6 + [TRAINING] * 5 + [STOPPED]
    assert plan.directions["en-is"].best_epochs == pytest.approx(1.25)
    assert plan.validated(100 * len(losses), dict.fromkeys(SIZES, 9.0), epochs) == []  # the same update again


def test_directions_without_validation_always_train():
    plan = AutoCurriculum(SIZES, 1.0, 1000)
    for update in range(50, 1000, 50):
        plan.validated(update, {"en-de": 3.0}, dict.fromkeys(SIZES, update / 10))
    assert plan.active(0) == tuple(SIZES)
    assert plan.next_boundary(0) is None


def test_best_is_the_latest_of_equal_means():
    state = DirectionState(losses=[3.0, 2.0, 2.0, 2.0, 2.1], epochs=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert state.best() == (2.0, 3.5)
    assert not state.overfits()


def test_the_line_is_robust_and_bounded():
    points = [(float(x), 2.0 + 0.25 * x) for x in range(8)]
    assert fit_line(points) == pytest.approx((2.0, 0.25))
    assert fit_line([*points, (3.5, 40.0)]) == pytest.approx((2.0, 0.25), abs=0.2)
    assert fit_line([(0.0, 0.0), (1.0, 9.0)])[1] == 0.5
    assert fit_line([(2.0, 1.0), (2.0, 3.0)]) == (2.0, 0.0)


def test_it_needs_an_end():
    with pytest.raises(ConfigError, match="the curriculum auto plans for the end of training; give --max-update"):
        AutoCurriculum(SIZES, 1.0, 0)
