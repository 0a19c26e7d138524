"""What pruning costs: chrF++ against the share of experts removed, for metrics and scopes, beside random removal.

Everything is a function of the model, the data and the settings, and outputs are kept by what was removed: a stopped
experiment goes on where it was, a new metric that removes the same experts costs nothing, and figures are made anew
from outputs each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtmoe.checkpoint import StoredModel
from mtmoe.checkpoint.expert_scores import METRICS, RANDOM, SCOPES, Scope
from mtmoe.checkpoint.expert_selection import ExpertSelection
from mtmoe.errors import ConfigError
from mtmoe.evaluation.decoding import HypothesisStore
from mtmoe.evaluation.experiment.significance import Bootstrap, Resampled, compare_groups
from mtmoe.evaluation.metrics import score
from mtmoe.evaluation.significance import holm
from mtmoe.evaluation.test_sets import TestSet
from mtmoe.experiments.pruning import Pruner, PruningOptions, translate_sets
from mtmoe.routing_table import RoutingTable

Figures = dict[str, Any]

FULL = "full"
"""Name of the outputs of the model with all its experts."""


@dataclass(frozen=True, slots=True, order=True)
class Curve:
    """One way to prune, at all shares."""

    scope: str
    metric: str
    rule: str = "layer"
    method: str = "drop"

    @property
    def name(self) -> str:
        """Such as ``language importance``; rule and method are named where they are not the usual ones."""
        unusual = [word for word, usual in ((self.rule, "layer"), (self.method, "drop")) if word != usual]
        scope = [] if self.metric == RANDOM else [self.scope]
        return " ".join([*scope, self.metric, *unusual])


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSettings:
    """What is measured."""

    directions: tuple[str, ...]
    """Directions; each is pruned for as its curve's scope says, and translated with what that leaves."""
    removed: tuple[float, ...] = (25.0, 50.0, 60.0, 70.0, 80.0, 90.0)
    """Shares of the experts that go, in percent."""
    metrics: tuple[str, ...] = ("importance", "top1", "load-balance", "confidence")
    """Metrics, each with every scope."""
    scopes: tuple[str, ...] = ("language", "pair", "set", "global")
    """Scopes, as of `mtmoe prune`."""
    rules: tuple[str, ...] = ("layer",)
    """Ways of selection."""
    methods: tuple[str, ...] = ("drop",)
    """What becomes of the others."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Draws of random removal, the control."""
    balance: tuple[int, int] | None = None
    """Parts of encoder and decoder in what stays."""
    beam: int = 4
    """Hypotheses kept."""
    max_tokens: int = 2048
    """Source tokens of a batch."""
    samples: int = 2000
    """Resamples of the significance test."""

    def __post_init__(self) -> None:
        if not self.directions:
            raise ConfigError("an experiment needs at least one direction")
        for share in self.removed:
            if not 0 < share < 100:
                raise ConfigError(f"removed={share:g} must be above 0 and below 100, in percent")
        for name, values, allowed in (("scope", self.scopes, SCOPES), ("metric", self.metrics, tuple(METRICS))):
            for value in values:
                if value not in allowed:  # random removal is always there, once
                    raise ConfigError(f"{name}={value!r} is unknown; choose one of: {', '.join(allowed)}")

    def curves(self) -> list[Curve]:
        """All curves; random removal, which knows no scope, last."""
        usual = [
            Curve(scope, metric, rule, method)
            for scope in self.scopes
            for metric in self.metrics
            for rule in self.rules
            for method in self.methods
        ]
        return usual + [Curve("global", RANDOM, rule, method) for rule in self.rules for method in self.methods]


@dataclass(frozen=True, slots=True)
class Point:
    """One pruned version of one curve, for one direction."""

    curve: Curve
    removed: float
    """Percent of the experts."""
    seed: int
    """Of random removal; 0 for other curves."""
    direction: str


@dataclass(slots=True)
class Job:
    """One set of experts that stay, and the directions to translate with them."""

    pruner: Pruner
    selection: ExpertSelection
    directions: list[str] = field(default_factory=list)


class PruningCurves:
    """The experiment on one model.

    Args:
        model: with all its experts.
        fingerprint: that identifies it.
        table: of its routing.
        test_sets: direction -> text to translate; not the text that the table was counted on, for figures that count.
        settings: what is measured.
        folder: where outputs are kept.
    """

    def __init__(
        self,
        model: StoredModel,
        fingerprint: str,
        table: RoutingTable,
        test_sets: Mapping[str, TestSet],
        settings: CurveSettings,
        folder: Path,
    ) -> None:
        self.model, self.fingerprint, self.table = model, fingerprint, table
        self.test_sets, self.settings, self.folder = test_sets, settings, folder
        self._pruners: dict[tuple[Curve, int, str], Pruner] = {}
        self._any = Pruner(model, table, Scope.of(table, "global"), PruningOptions(balance=settings.balance))

    def keep(self, removed: float) -> int:
        """Experts that stay when so many percent go."""
        return round(self._any.total * (1 - removed / 100))

    def shares(self) -> list[float]:
        """Shares that leave every layer its top_k."""
        return [share for share in self.settings.removed if self.keep(share) >= self._any.fewest]

    def points(self) -> Iterator[Point]:
        """All that is measured, but the full model."""
        for curve in self.settings.curves():
            for removed in self.shares():
                for seed in self.settings.seeds if curve.metric == RANDOM else (0,):
                    for direction in self.settings.directions:
                        yield Point(curve, removed, seed, direction)

    def pruner(self, curve: Curve, seed: int, direction: str) -> Pruner:
        """The pruner of a curve for one direction."""
        key = (curve, seed, direction if curve.scope != "global" else "")
        if key not in self._pruners:
            options = PruningOptions(
                metric=curve.metric, rule=curve.rule, balance=self.settings.balance, method=curve.method, seed=seed
            )
            if curve.scope == "global":
                scope = Scope.of(self.table, "global")
            else:
                scope = Scope.of(self.table, curve.scope, directions=[direction])
            self._pruners[key] = Pruner(self.model, self.table, scope, options)
        return self._pruners[key]

    def job_of(self, point: Point) -> tuple[str, Job]:
        """The name of a point's outputs, equal for equal models, and what makes them."""
        pruner = self.pruner(point.curve, point.seed, point.direction)
        selection = pruner.choose(self.keep(point.removed))
        if selection.is_all:
            return FULL, Job(pruner, selection)
        parts: list[Any] = [[*map(str, layer), list(kept)] for layer, kept in selection.kept.items()]
        if point.curve.method == "merge":  # what is merged depends on the usage too
            parts.append({" ".join(map(str, layer)): usage.tolist() for layer, usage in pruner.usage.items()})
        name = hashlib.sha256(json.dumps([point.curve.method, parts]).encode()).hexdigest()[:16]
        return name, Job(pruner, selection)

    def jobs(self) -> dict[str, Job]:
        """All distinct models to translate with, the full one first, each with its directions."""
        everything = self._any.choose(self._any.total)
        jobs = {FULL: Job(self._any, everything, list(self.settings.directions))}
        for point in self.points():
            name, job = self.job_of(point)
            directions = jobs.setdefault(name, job).directions
            if point.direction not in directions:
                directions.append(point.direction)
        return jobs

    def store(self, name: str) -> HypothesisStore:
        """Where the outputs of one set of experts are kept."""
        settings = self.settings
        made_by = {"model": self.fingerprint, "pruned": name, "beam": settings.beam, "max_tokens": settings.max_tokens}
        return HypothesisStore(self.folder / "outputs" / name, made_by)

    def run(self, report: Callable[[str], object]) -> None:
        """Translate what has not been translated yet.

        Args:
            report: told a line about each model.
        """
        jobs = self.jobs()
        for number, (name, job) in enumerate(jobs.items(), start=1):
            store = self.store(name)
            missing = [self.test_sets[one] for one in job.directions if store.load(self.test_sets[one]) is None]
            stay = f"{job.selection.total} of {self._any.total} experts"
            if not missing:
                report(f"[{number}/{len(jobs)}] {name}: {stay}, done before")
                continue
            model = job.pruner.build(job.selection) if name != FULL else self.model
            outputs = translate_sets(model, missing, beam=self.settings.beam, max_tokens=self.settings.max_tokens)
            for one in missing:
                store.save(one, outputs[one.direction], 0.0)
            report(f"[{number}/{len(jobs)}] {name}: {stay}, {len(missing)} directions translated")

    def results(self) -> Figures:
        """Figures of all curves from the outputs that are there.

        Raises:
            ConfigError: outputs are missing; `run` makes them.
        """
        scores = _Scores(self)
        full = scores.of(FULL, self.settings.directions)
        curves = [self._curve(curve, scores, full) for curve in self.settings.curves()]
        _test_against_random(curves)
        return {
            "model": self.fingerprint,
            "experts": self._any.total,
            "settings": asdict(self.settings),
            "full": {direction: one.figures for direction, one in full.items()},
            "mean": sum(one.figures["chrf++"] for one in full.values()) / len(full),
            "curves": [{key: value for key, value in curve.items() if key != "scored"} for curve in curves],
        }

    def _curve(self, curve: Curve, scores: _Scores, full: Mapping[str, _Scored]) -> Figures:
        points: list[Figures] = []
        scored: dict[float, dict[int, dict[str, Resampled]]] = {}
        for removed in self.shares():
            by_seed: dict[int, dict[str, _Scored]] = {}
            for seed in self.settings.seeds if curve.metric == RANDOM else (0,):
                by_seed[seed] = {
                    direction: scores.of(self.job_of(Point(curve, removed, seed, direction))[0], [direction])[direction]
                    for direction in self.settings.directions
                }
            scored[removed] = {
                seed: {direction: one.resampled for direction, one in found.items()} for seed, found in by_seed.items()
            }
            points.append({"removed": removed, "kept": self.keep(removed), **_losses(full, list(by_seed.values()))})
        return {"name": curve.name, **asdict(curve), "points": points, "scored": scored}


@dataclass(frozen=True, slots=True)
class _Scored:
    """One direction's outputs of one model."""

    figures: dict[str, float]
    """chrf++ and length_ratio."""
    resampled: Resampled


class _Scores:
    """Scores of outputs, each computed once."""

    def __init__(self, curves: PruningCurves) -> None:
        self._curves = curves
        references = {direction: one.references for direction, one in curves.test_sets.items()}
        self._bootstrap = Bootstrap(references, curves.settings.samples)
        self._known: dict[tuple[str, str], _Scored] = {}

    def of(self, name: str, directions: Sequence[str]) -> dict[str, _Scored]:
        found = {}
        for direction in directions:
            if (name, direction) not in self._known:
                self._known[name, direction] = self._score(name, direction)
            found[direction] = self._known[name, direction]
        return found

    def _score(self, name: str, direction: str) -> _Scored:
        test_set = self._curves.test_sets[direction]
        decoded = self._curves.store(name).load(test_set)
        if decoded is None:
            raise ConfigError(f"the outputs of {name} for {direction} are missing; run the experiment to its end first")
        one = score(test_set.sources, decoded.outputs, test_set.references, test_set.target)
        resampled = self._bootstrap.run({direction: decoded.outputs})[direction]
        return _Scored({"chrf++": one.chrf, "length_ratio": one.length_ratio}, resampled)


def _losses(full: Mapping[str, _Scored], seeds: Sequence[Mapping[str, _Scored]]) -> Figures:
    """chrF++ lost at one point of a curve; the mean over seeds, by direction and in the mean."""
    lost = {
        direction: sum(before.figures["chrf++"] - one[direction].figures["chrf++"] for one in seeds) / len(seeds)
        for direction, before in full.items()
    }
    length = {
        direction: sum(one[direction].figures["length_ratio"] for one in seeds) / len(seeds) for direction in full
    }
    into_english = [value for direction, value in lost.items() if direction.partition("-")[2] == "en"]
    worst = max(lost, key=lost.__getitem__)
    by_seed = [sum(full[d].figures["chrf++"] - one[d].figures["chrf++"] for d in full) / len(full) for one in seeds]
    return {
        "lost": lost,
        "length_ratio": length,
        "mean_lost": sum(lost.values()) / len(lost),
        "mean_lost_by_seed": by_seed,
        "mean_lost_into_english": sum(into_english) / len(into_english) if into_english else None,
        "worst": worst,
        "worst_lost": lost[worst],
        "above_1": sum(value > 1 for value in lost.values()),
    }


def _test_against_random(curves: Sequence[Figures]) -> None:
    """Add to each point what it gains against random removal of as much, with Holm's correction over all points."""
    controls = {(curve["rule"], curve["method"]): curve for curve in curves if curve["metric"] == RANDOM}
    found: dict[str, tuple[Figures, float]] = {}
    for curve in curves:
        control = controls[curve["rule"], curve["method"]]
        if curve is control:
            continue
        for point in curve["points"]:
            random = control["scored"][point["removed"]]
            mine = curve["scored"][point["removed"]][0]
            difference = compare_groups(random, dict.fromkeys(random, mine), list(mine))
            assert difference is not None  # they have all seeds and directions in common
            point["against_random"] = {
                "gain": difference.difference,
                "low": difference.low,
                "high": difference.high,
                "better": difference.better,
                "worse": difference.worse,
                "wilcoxon_p": difference.wilcoxon_p,
            }
            found[f"{curve['name']} {point['removed']}"] = (point, difference.p_value)
    corrected = holm({name: p_value for name, (_, p_value) in found.items()})
    for name, (point, _) in found.items():
        point["against_random"]["p"] = corrected[name]
