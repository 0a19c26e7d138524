"""Pictures of an experiment's scores and losses."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from mtmoe.evaluation.experiment.figures import BASELINE, Picture, drawing, line_styles, new_figure, titles_of
from mtmoe.evaluation.experiment.runs import Experiment, ExperimentRun, mean, mean_over
from mtmoe.evaluation.experiment.tables import BUCKET_NAMES, ordered

Points = list[tuple[int, float]]

SETTLED = 0.3
"""Share of the training after which losses set the scale of a plot: the steep beginning would flatten the rest."""


def bucket_curve(runs: Sequence[ExperimentRun], name: str, directions: Sequence[str]) -> Points:
    """Mean over directions and seeds of a loss, at the updates that all seeds have."""
    by_seed = [
        {update: loss for update, one in run.curve(name) if (loss := mean_over(one, directions)) is not None}
        for run in runs
    ]
    by_seed = [curve for curve in by_seed if curve]
    if not by_seed:
        return []
    updates = sorted(set.intersection(*(set(curve) for curve in by_seed)))
    return [(update, mean([curve[update] for curve in by_seed])) for update in updates]


def plot_differences(results: Mapping[str, Any]) -> Picture | None:
    """chrF++ of each configuration above the baseline, by bucket; None before two configurations can be compared."""
    if not results["baselines"]:
        return None
    baseline = results["baselines"][0]
    differences = results["differences"][baseline]
    configs = [config for config in ordered(results) if differences.get(config, {}).get("all")]
    if not configs:
        return None
    buckets = [*results["buckets"], "all"]
    titles = titles_of(results)
    styles = line_styles(list(titles), results["baselines"])
    with drawing():
        figure = new_figure(2.2 * len(buckets) + 2.6, 0.32 * len(configs) + 1.3)
        axes = figure.subplots(1, len(buckets), sharey=True, sharex=True, squeeze=False)[0]
        for axis, bucket in zip(axes, buckets, strict=True):
            axis.axvline(0, color=BASELINE, linewidth=1)
            for place, config in enumerate(configs):
                one = differences[config]["all"].get(bucket)
                if one is not None:
                    _difference(axis, place, one, styles[config]["color"])
            axis.set_title(f"{BUCKET_NAMES[bucket]} resource" if bucket != "all" else "all directions")
            axis.grid(axis="x")
            axis.spines["left"].set_visible(False)
            axis.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(configs)), [titles[config] for config in configs])
        axes[0].invert_yaxis()
        figure.supxlabel(f"chrF++ above {titles[baseline]}", fontsize=9)
    return Picture(
        f"{results['experiment']}-differences",
        f"chrF++ above {titles[baseline]} by resource bucket. Large dots: mean over directions and seeds, filled where "
        "significant after Holm's correction; bars: 95 % interval over the choice of sentences; small dots: each seed.",
        figure,
    )


def _difference(axis: Any, place: int, one: Mapping[str, Any], colour: str) -> None:
    if "low" in one:
        axis.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    axis.plot(list(one["by_seed"].values()), [place + 0.28] * len(one["by_seed"]), ".", color=colour, markersize=3)
    filled = colour if one.get("stars") else "white"
    axis.plot(one["difference"], place, "o", color=colour, markerfacecolor=filled, markersize=6)


def plot_curves(experiment: Experiment, results: Mapping[str, Any]) -> Picture | None:
    """Validation loss of every configuration over the training, by bucket; None without curves."""
    curves = {
        bucket: {
            config: curve
            for config in ordered(results)
            if (curve := bucket_curve(experiment.configs[config], "valid", experiment.directions(bucket)))
        }
        for bucket in results["buckets"]
    }
    if not any(curves.values()):
        return None
    titles = titles_of(results)
    styles = line_styles(list(titles), results["baselines"])
    with drawing():
        figure = new_figure(3.4 * len(curves) + 2.2, 4.0)
        axes = figure.subplots(1, len(curves), squeeze=False)[0]
        drawn: dict[str, Any] = {}
        for axis, (bucket, by_config) in zip(axes, curves.items(), strict=True):
            for config, points in by_config.items():
                (drawn[config],) = axis.plot(
                    *zip(*points, strict=True), markersize=3.5, label=titles[config], **styles[config]
                )
                best = min(points, key=lambda point: (point[1], -point[0]))
                axis.plot(*best, marker=styles[config]["marker"], markersize=7, color=styles[config]["color"])
            _scale(axis, list(by_config.values()))
            axis.set_title(f"{BUCKET_NAMES[bucket]} resource")
            axis.set_xlabel("updates")
            axis.grid(axis="y")
        axes[0].set_ylabel("validation loss, bits a token")
        handles = [drawn[config] for config in ordered(results) if config in drawn]
        figure.legend(handles=handles, loc="outside right center", frameon=False)
    return Picture(
        f"{results['experiment']}-curves",
        "Validation loss by resource bucket, mean over its directions and over seeds. The large marker is where a "
        "configuration is at its best: what rises after it is over-fitting. The steep beginning is cut off.",
        figure,
    )


def plot_gaps(experiment: Experiment, results: Mapping[str, Any], bucket: str) -> Picture | None:
    """Validation against training loss in one bucket, a panel for each configuration; None without curves."""
    directions = experiment.directions(bucket)
    curves = {
        config: [bucket_curve(experiment.configs[config], name, directions) for name in ("valid", "train_sample")]
        for config in ordered(results)
    }
    curves = {config: both for config, both in curves.items() if both[0]}
    if not curves:
        return None
    titles = titles_of(results)
    styles = line_styles(list(titles), results["baselines"])
    reference = curves.get(results["baselines"][0]) if results["baselines"] else None
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    with drawing():
        figure = new_figure(2.5 * columns + 0.6, 2.0 * rows + 0.7)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for axis, (config, (valid, train)) in zip(axes, curves.items(), strict=False):
            if reference is not None and curves[config] is not reference:
                for points, dashes in zip(reference, ("-", "--"), strict=True):
                    if points:
                        axis.plot(*zip(*points, strict=True), color="#b5b5b5", linewidth=1.2, linestyle=dashes)
            colour = styles[config]["color"]
            axis.plot(*zip(*valid, strict=True), color=colour, linewidth=1.8)
            if train:
                axis.plot(*zip(*train, strict=True), color=colour, linewidth=1.4, linestyle="--")
            axis.plot(*min(valid, key=lambda point: (point[1], -point[0])), "o", color=colour, markersize=5)
            axis.set_title("\n".join(textwrap.wrap(titles[config], 34)), fontsize=8)
            axis.grid(axis="y")
        _scale(axes[0], [points for both in curves.values() for points in both if points])
        for axis in list(axes)[len(curves) :]:
            axis.set_axis_off()
        figure.supxlabel("updates", fontsize=9)
        figure.supylabel("loss, bits a token", fontsize=9)
    grey = "" if reference is None else f"; grey: {titles[results['baselines'][0]]}"
    return Picture(
        f"{results['experiment']}-gaps-{bucket.replace('_', '-')}",
        f"Loss of {BUCKET_NAMES[bucket]}-resource directions on validation text (solid, dot at its best) and on "
        f"training text read without dropout and masking (dashed){grey}. What lies between the two is learnt by heart.",
        figure,
    )


def _scale(axis: Any, curves: Sequence[Points]) -> None:
    last = max((points[-1][0] for points in curves), default=0)
    settled = [loss for points in curves for update, loss in points if update >= SETTLED * last]
    if settled:
        room = 0.06 * (max(settled) - min(settled)) or 0.1
        axis.set_ylim(min(settled) - room, max(settled) + room)
