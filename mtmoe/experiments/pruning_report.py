"""Curves of pruning as a Markdown page and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtmoe.checkpoint.expert_scores import RANDOM
from mtmoe.evaluation.experiment.figures import BASELINE, COLOURS, GRID, MARKERS, Picture, drawing, new_figure
from mtmoe.evaluation.report import markdown_table
from mtmoe.evaluation.significance import stars

Figures = Mapping[str, Any]


def markdown_report(results: Figures) -> str:
    """Tables of the mean loss, of the worst direction, and of size, memory and loading.

    Args:
        results: of `PruningCurves.results`, with ``footprints`` if they were measured.
    """
    settings = results["settings"]
    directions = settings["directions"]
    lines = [
        "# Pruning: what is lost when experts go",
        "",
        f"{results['experts']} experts in all MoE layers; chrF++ of the full model {results['mean']:.2f}, the mean "
        f"over {len(directions)} directions: {', '.join(directions)}. Beam {settings['beam']}.",
        "",
        "Mean chrF++ lost, and the most that a direction loses, by share of the experts removed. Stars: better than "
        f"random removal, the mean of {len(settings['seeds'])} draws (paired bootstrap over sentences, Holm's "
        "correction over all cells).",
        "",
        markdown_table(_loss_table(results["curves"])),
        "",
    ]
    if any(point["mean_lost_into_english"] is not None for curve in results["curves"] for point in curve["points"]):
        lines += ["Into English alone, mean chrF++ lost, and the length ratio there:", ""]
        lines += [markdown_table(_english_table(results["curves"])), ""]
    if results.get("footprints"):
        lines += ["Size of the folder, memory that a process grows by with the model, and seconds of loading it:", ""]
        lines += [markdown_table(_footprint_table(results["footprints"])), ""]
    return "\n".join(lines)


def _loss_table(curves: Sequence[Figures]) -> Any:
    rows = []
    for curve in curves:
        cells = []
        for point in curve["points"]:
            sure = point.get("against_random", {})
            mark = stars(sure["p"]) if sure and sure["gain"] > 0 else ""
            cells.append(f"{point['mean_lost']:.2f}{mark} ({point['worst_lost']:.2f} {point['worst']})")
        rows.append([curve["name"], *cells])
    return _columns(curves), rows


def _english_table(curves: Sequence[Figures]) -> Any:
    rows = []
    for curve in curves:
        cells = []
        for point in curve["points"]:
            ratios = [value for name, value in point["length_ratio"].items() if name.partition("-")[2] == "en"]
            cells.append(f"{point['mean_lost_into_english']:.2f} ({sum(ratios) / len(ratios):.2f})")
        rows.append([curve["name"], *cells])
    return _columns(curves), rows


def _columns(curves: Sequence[Figures]) -> list[tuple[str, str]]:
    points = curves[0]["points"] if curves else []
    return [("curve", "left"), *((f"{point['removed']:g} % ({point['kept']} stay)", "right") for point in points)]


def _footprint_table(footprints: Sequence[Figures]) -> Any:
    columns = [(name, "right") for name in ("removed", "folder, MB", "memory, MB", "loading, s")]
    rows = [
        [f"{one['removed']:g} %", f"{one['folder_mb']:.1f}", f"{one['memory_mb']:.1f}", f"{one['load_seconds']:.2f}"]
        for one in footprints
    ]
    return columns, rows


def plot_losses(results: Figures) -> Picture:
    """Draw mean chrF++ against the share removed, a panel for each scope, random removal in all of them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    curves = results["curves"]
    scopes = list(dict.fromkeys(curve["scope"] for curve in curves if curve["metric"] != RANDOM))
    ways = list(dict.fromkeys(_way(curve) for curve in curves if curve["metric"] != RANDOM))
    with drawing():
        figure = new_figure(3.6 * len(scopes), 3.4)
        axes = figure.subplots(1, len(scopes), sharey=True, squeeze=False)[0]
        for axis, scope in zip(axes, scopes, strict=True):
            axis.set_title(f"scope: {scope}")
            axis.axhline(results["mean"], color=GRID, linewidth=1.5)
            for curve in curves:
                if curve["metric"] == RANDOM:
                    _draw_random(axis, curve, results["mean"])
                elif curve["scope"] == scope:
                    place = ways.index(_way(curve))
                    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
                    _line(axis, curve, results["mean"], label=_way(curve), **style)
            axis.set_xlabel("experts removed, %")
            axis.grid(axis="y")
        axes[0].set_ylabel("chrF++, mean over directions")
        axes[0].legend(frameon=False, fontsize="small")
    caption = "chrF++ against the share of experts removed; the grey band is the range of random removals."
    return Picture("pruning", caption, figure)


def _way(curve: Figures) -> str:
    return " ".join(word for word in (curve["metric"], curve["rule"], curve["method"]) if word not in ("layer", "drop"))


def _line(axis: Any, curve: Figures, full: float, **style: Any) -> None:
    shares = [0.0, *(point["removed"] for point in curve["points"])]
    scores = [full, *(full - point["mean_lost"] for point in curve["points"])]
    axis.plot(shares, scores, linewidth=1.3, markersize=4, **style)


def _draw_random(axis: Any, curve: Figures, full: float) -> None:
    shares = [point["removed"] for point in curve["points"]]
    worst, best = (
        [full - extreme(point["mean_lost_by_seed"]) for point in curve["points"]] for extreme in (max, min)
    )
    axis.fill_between(shares, worst, best, color=GRID)
    _line(axis, curve, full, label=curve["name"], color=BASELINE, linestyle="--")
