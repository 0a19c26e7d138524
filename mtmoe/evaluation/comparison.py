"""Two finished evaluations side by side, with the paired significance of every difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtmoe.errors import DataError
from mtmoe.evaluation.buckets import group_directions, split_direction
from mtmoe.evaluation.metrics import METRICS, build_metric
from mtmoe.evaluation.significance import DEFAULT_SEED, METHODS, holm, mean_interval, paired_test, stars, wilcoxon
from mtmoe.evaluation.test_sets import read_json, read_lines

NOISE = 0.3
"""chrF++ on the mean of a group below which one seed says nothing, unless the test over directions does."""


@dataclass(frozen=True, slots=True)
class Run:
    """A folder that `mtmoe evaluate` wrote."""

    folder: Path
    """Where it lies."""
    result: dict[str, Any]
    """Its evaluation.json."""

    @classmethod
    def load(cls, path: Path) -> Run:
        """Open a run by its folder or by its evaluation.json.

        Raises:
            DataError: it is missing, damaged or of a newer format.
        """
        folder = path.parent if path.name.endswith(".json") else path
        file = path if path.name.endswith(".json") else path / "evaluation.json"
        result = read_json(file, "what `mtmoe evaluate` writes")
        if result.get("format", 1) != 1 or "directions" not in result:
            raise DataError(f"{file} is not an evaluation of a format that this version reads (1)")
        return cls(folder, result)

    @property
    def directions(self) -> dict[str, dict[str, Any]]:
        """Direction -> its figures."""
        return dict(self.result["directions"])

    def outputs(self, direction: str) -> list[str]:
        """The outputs of a direction; DataError if they are not kept."""
        return self._lines("hypotheses", direction)

    def references(self, direction: str) -> list[str]:
        """The references of a direction; DataError if they are not kept."""
        return self._lines("references", direction)

    def _lines(self, kind: str, direction: str) -> list[str]:
        path = self.folder / kind / f"{direction}.txt"
        if not path.is_file():
            raise DataError(f"{path} does not exist, so significance cannot be tested; evaluate {self.folder} again")
        lines = read_lines(path)
        sentences = self.directions[direction]["sentences"]
        if len(lines) != sentences:
            raise DataError(f"{path} has {len(lines)} lines where evaluation.json says {sentences}; evaluate again")
        return lines


@dataclass(frozen=True, slots=True)
class DirectionDifference:
    """One direction in both runs."""

    a: float
    """Score of the first run."""
    b: float
    """Score of the second run."""
    difference: float
    """b − a: positive where the second run is better."""
    p_value: float
    """Of the paired test, not corrected."""
    p_holm: float
    """Corrected for the number of directions."""
    stars: str
    """Of the corrected value: ``*`` 0.05, ``**`` 0.01, ``***`` 0.001."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that `mtmoe compare` shows."""

    a: str
    """The first run, the baseline."""
    b: str
    """The second run."""
    metric: str
    """chrf++ or bleu."""
    method: str
    """bootstrap or randomisation."""
    samples: int
    """Resamples or trials of each direction's test."""
    seed: int
    """Of the random numbers."""
    signatures: list[str]
    """sacrebleu's signatures of the metric; more than one where the tokeniser follows the language."""
    directions: dict[str, DirectionDifference]
    """Every direction that both runs have."""
    groups: dict[str, dict[str, dict[str, float]]]
    """family -> bucket -> {"directions", "a", "b", "difference"}; buckets are those of the first run."""
    over_directions: dict[str, float]
    """Wilcoxon's p over directions, mean difference with its 95 % interval, and how many directions gain or lose."""
    only_a: list[str]
    """Directions that only the first run has; they are not compared."""
    only_b: list[str]
    """Directions that only the second run has; they are not compared."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values for a JSON file."""
        return asdict(self)


def compare(
    path_a: Path,
    path_b: Path,
    *,
    metric: str = "chrf++",
    method: str = "bootstrap",
    samples: int = 0,
    seed: int = DEFAULT_SEED,
    advance: Callable[[int], object] | None = None,
) -> Comparison:
    """Compare two evaluations on the directions that both have.

    Args:
        path_a: folder or evaluation.json of the baseline.
        path_b: folder or evaluation.json of the other run.
        metric: "chrf++" or "bleu".
        method: "bootstrap" or "randomisation".
        samples: resamples or trials of each direction; 0 takes 1,000 or 10,000.
        seed: of the random numbers.
        advance: told of each direction that is done.

    Raises:
        DataError: no direction in common, other test sets, or outputs that are not kept.
        ValueError: an unknown metric or method.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; choose one of: {', '.join(METRICS)}")
    run_a, run_b = Run.load(path_a), Run.load(path_b)
    common = _common_directions(run_a, run_b)
    tested = {}
    for direction in common:
        target = split_direction(direction)[1]
        tested[direction] = paired_test(
            run_a.outputs(direction),
            run_b.outputs(direction),
            run_a.references(direction),
            target,
            metric=metric,
            method=method,
            samples=samples,
            seed=seed,
        )
        if advance:
            advance(1)
    corrected = holm({direction: result.p_value for direction, result in tested.items()})
    directions = {
        direction: DirectionDifference(
            result.a, result.b, result.difference, result.p_value, corrected[direction], stars(corrected[direction])
        )
        for direction, result in tested.items()
    }
    return Comparison(
        a=str(path_a),
        b=str(path_b),
        metric=metric,
        method=method,
        samples=samples or METHODS[method][1],
        seed=seed,
        signatures=_signatures(metric, common),
        directions=directions,
        groups=_compare_groups(directions, run_a),
        over_directions=_over_directions(directions, seed),
        only_a=[direction for direction in run_a.directions if direction not in common],
        only_b=[direction for direction in run_b.directions if direction not in common],
    )


def _common_directions(run_a: Run, run_b: Run) -> list[str]:
    rows_a, rows_b = run_a.directions, run_b.directions
    common = [direction for direction in rows_a if direction in rows_b]
    if not common:
        raise DataError(
            f"no direction is in both runs: {run_a.folder} has {', '.join(rows_a)}; "
            f"{run_b.folder} has {', '.join(rows_b)}"
        )
    other = [direction for direction in common if rows_a[direction]["test_set"] != rows_b[direction]["test_set"]]
    if other:
        sizes = ", ".join(
            f"{direction} ({rows_a[direction]['sentences']} and {rows_b[direction]['sentences']} segments)"
            for direction in other
        )
        raise DataError(
            f"{run_a.folder} and {run_b.folder} were scored on other test sets: {sizes}. "
            "Evaluate both with the same data, --split and --limit"
        )
    return common


def _signatures(metric: str, directions: list[str]) -> list[str]:
    found = []
    for direction in directions:
        scorer = build_metric(metric, split_direction(direction)[1])
        scorer.corpus_score(["x"], [["x"]])  # a signature exists once something was scored
        found.append(str(scorer.get_signature()))
    return sorted(set(found))


def _compare_groups(directions: Mapping[str, DirectionDifference], run: Run) -> dict[str, dict[str, dict[str, float]]]:
    rows = run.directions
    buckets = {direction: bucket for direction in directions if (bucket := rows[direction].get("bucket"))}
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for family, by_bucket in group_directions(directions, buckets).items():
        for bucket, members in by_bucket.items():
            mean_a = sum(directions[member].a for member in members) / len(members)
            mean_b = sum(directions[member].b for member in members) / len(members)
            group = {"directions": len(members), "a": mean_a, "b": mean_b, "difference": mean_b - mean_a}
            groups.setdefault(family, {})[bucket] = group
    return groups


def _over_directions(directions: Mapping[str, DirectionDifference], seed: int) -> dict[str, float]:
    differences = [one.difference for one in directions.values()]
    low, high = mean_interval(differences, seed=seed)
    return {
        "mean_difference": sum(differences) / len(differences),
        "interval_low": low,
        "interval_high": high,
        "wilcoxon_p": wilcoxon(differences),
        "better": sum(difference > 0 for difference in differences),
        "worse": sum(difference < 0 for difference in differences),
        "significantly_better": sum(one.difference > 0 and bool(one.stars) for one in directions.values()),
        "significantly_worse": sum(one.difference < 0 and bool(one.stars) for one in directions.values()),
    }
