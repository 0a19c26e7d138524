"""From the runs of an experiment to one set of figures: results.json, which tables and pictures are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mtmoe.errors import DataError
from mtmoe.evaluation.buckets import FAMILIES, families_of
from mtmoe.evaluation.experiment.runs import BUCKETS, Experiment, ExperimentRun, mean, mean_over, spread
from mtmoe.evaluation.experiment.significance import SAMPLES, Bootstrap, Resampled, compare_groups
from mtmoe.evaluation.significance import DEFAULT_SEED, holm, stars

METRICS = ("chrf++", "bleu")

SAME_SCORE = 0.005
"""chrF++ by which a score may differ from the one that the run recorded; fp32 sums differ by less than 0.0001."""

Figures = dict[str, Any]


def summarise(
    experiment: Experiment,
    references: Mapping[str, Sequence[str]] | None,
    *,
    split: str = "auto",
    baselines: Sequence[str] = ("moe", "dense"),
    samples: int = SAMPLES,
    seed: int = DEFAULT_SEED,
    advance: Callable[[int], object] | None = None,
) -> Figures:
    """Put the runs of an experiment side by side.

    Args:
        experiment: its runs.
        references: direction -> right translations of the split; None leaves differences without significance.
        split: "test", "valid", or "auto": test once every run was scored on it.
        baselines: configurations to compare with, the main one first; those without runs are left out.
        samples: resamples of the bootstrap.
        seed: of its random numbers.
        advance: told of each run whose outputs were scored.

    Returns:
        The content of results.json.

    Raises:
        DataError: outputs or routing tables are damaged, or do not fit the references.
    """
    split = experiment.split(split)
    groups = _groups(experiment)
    resampled: dict[str, dict[int, dict[str, Resampled]]] = {}
    if references is not None:
        bootstrap = Bootstrap(references, samples, seed)
        for run in experiment.runs:
            scored = bootstrap.run(run.hypotheses(split) if run.scores(split) else {})
            _check_references(run, split, scored)
            if scored:
                resampled.setdefault(run.config, {})[run.seed] = scored
            if advance:
                advance(1)
    configurations = {
        config: _configuration(experiment, runs, split, groups) for config, runs in experiment.configs.items()
    }
    differences = {
        baseline: _differences(baseline, configurations, resampled, groups)
        for baseline in baselines
        if baseline in configurations
    }
    return {
        "format": 1,
        "experiment": experiment.name,
        "split": split,
        "baselines": list(differences),
        "bootstrap": {"samples": samples, "seed": seed} if references is not None else None,
        "buckets": {bucket: _bucket(experiment, bucket) for bucket in BUCKETS if experiment.directions(bucket)},
        "configurations": configurations,
        "differences": differences,
    }


def _check_references(run: ExperimentRun, split: str, scored: Mapping[str, Resampled]) -> None:
    """Refuse references that are not those of the run: prepared anew, a data folder may hold other text.

    Raises:
        DataError: a score computed from outputs and references is not the run's own, or a direction is missing.
    """
    own = run.scores(split) if scored else {}
    other = [
        direction
        for direction, row in own.items()
        if direction not in scored or abs(scored[direction].score - row["chrf++"]) > SAME_SCORE
    ]
    if other:
        raise DataError(
            f"{run.path} was scored on other {split} text than the data has for {', '.join(other)}; give the data that "
            "it was trained on"
        )


def _bucket(experiment: Experiment, bucket: str) -> Figures:
    directions = experiment.directions(bucket)
    pairs = [experiment.pairs[direction] for direction in directions if direction in experiment.pairs]
    return {
        "directions": len(directions),
        "fewest_pairs": min(pairs, default=None),
        "most_pairs": max(pairs, default=None),
    }


def _groups(experiment: Experiment) -> dict[str, dict[str, list[str]]]:
    """Give family -> bucket, or "all", -> directions; the buckets are disjoint, and empty groups left out."""
    found: dict[str, dict[str, list[str]]] = {}
    for family in FAMILIES:
        for bucket in (*BUCKETS, "all"):
            members = [
                direction
                for direction, one in experiment.bucket.items()
                if bucket in (one, "all") and family in families_of(direction)
            ]
            if members:
                found.setdefault(family, {})[bucket] = members
    return found


def _configuration(
    experiment: Experiment, runs: Sequence[ExperimentRun], split: str, groups: Mapping[str, Mapping[str, list[str]]]
) -> Figures:
    scored = {run.seed: run.scores(split) for run in runs if run.scores(split)}
    return {
        "title": runs[0].title,
        "seeds": [run.seed for run in runs],
        "scored_seeds": sorted(scored),
        "machines": sorted({str(run.record["machine"]) for run in runs if run.record.get("machine")}),
        **{
            name: _over_seeds([value for run in runs if (value := run.number(name)) is not None])
            for name in ("updates", "seconds", "words_per_second", "parameters", "dropped_share")
        },
        "scores": {
            metric: {
                family: {bucket: _group_scores(scored, metric, directions) for bucket, directions in by_bucket.items()}
                for family, by_bucket in groups.items()
            }
            for metric in METRICS
        },
        "loss": {
            bucket: _loss(runs, experiment.directions(bucket)) for bucket in BUCKETS if experiment.directions(bucket)
        },
    }


def _over_seeds(values: Sequence[float]) -> Figures | None:
    """Mean and spread of a figure over seeds; None where no run has it."""
    return {"mean": mean(values), "spread": spread(values)} if values else None


def _group_scores(
    scored: Mapping[int, Mapping[str, Mapping[str, float]]], metric: str, directions: Sequence[str]
) -> Figures | None:
    by_seed = {}
    for seed, scores in scored.items():
        values = {direction: float(row[metric]) for direction, row in scores.items() if row.get(metric) is not None}
        value = mean_over(values, directions)
        if value is not None:
            by_seed[seed] = value
    figures = _over_seeds(list(by_seed.values()))
    return None if figures is None else {**figures, "by_seed": {str(seed): value for seed, value in by_seed.items()}}


def _loss(runs: Sequence[ExperimentRun], directions: Sequence[str]) -> Figures:
    """Where a bucket is at its best on validation text, where it ends, and how far training text lies below."""
    found: dict[str, list[float]] = {}
    for run in runs:
        valid = [
            (update, loss) for update, one in run.curve("valid") if (loss := mean_over(one, directions)) is not None
        ]
        if not valid:
            continue
        train = {update: mean_over(one, directions) for update, one in run.curve("train_sample")}
        # Of equal losses the later one, as in the rule for curricula.
        best_update, best = min(valid, key=lambda point: (point[1], -point[0]))
        end_update, end = valid[-1]
        figures = {"best_update": float(best_update), "best": best, "end": end, "rise": end - best}
        for name, update, loss in (("gap_at_best", best_update, best), ("gap_at_end", end_update, end)):
            of_train = train.get(update)
            if of_train is not None:
                figures[name] = loss - of_train
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    return {name: _over_seeds(values) for name, values in found.items()}


def _differences(
    baseline: str,
    configurations: Mapping[str, Figures],
    resampled: Mapping[str, Mapping[int, Mapping[str, Resampled]]],
    groups: Mapping[str, Mapping[str, list[str]]],
) -> Figures:
    """Give config -> family -> bucket -> difference to the baseline, Holm-corrected over configurations in a group."""
    found: dict[str, dict[str, Figures]] = {config: {} for config in configurations if config != baseline}
    for family, by_bucket in groups.items():
        for bucket, directions in by_bucket.items():
            group: dict[str, Figures] = {}
            for config in found:
                tested = compare_groups(resampled.get(baseline, {}), resampled.get(config, {}), directions)
                if tested is not None:
                    group[config] = asdict(tested)
                else:
                    plain = _untested(configurations[baseline], configurations[config], family, bucket)
                    if plain is not None:
                        group[config] = plain
            corrected = holm({config: one["p_value"] for config, one in group.items() if "p_value" in one})
            for config, one in group.items():
                one["by_seed"] = {str(seed): value for seed, value in one["by_seed"].items()}
                one["spread"] = spread(list(one["by_seed"].values()))
                if config in corrected:
                    one["p_holm"], one["stars"] = corrected[config], stars(corrected[config])
                found[config].setdefault(family, {})[bucket] = one
    return found


def _untested(baseline: Figures, other: Figures, family: str, bucket: str) -> Figures | None:
    """The difference of the scores alone, where outputs or references are not at hand."""
    a, b = (one["scores"]["chrf++"][family][bucket] for one in (baseline, other))
    seeds = [] if a is None or b is None else [seed for seed in a["by_seed"] if seed in b["by_seed"]]
    if not seeds:
        return None
    by_seed = {seed: b["by_seed"][seed] - a["by_seed"][seed] for seed in seeds}
    return {"difference": mean(list(by_seed.values())), "by_seed": by_seed}
