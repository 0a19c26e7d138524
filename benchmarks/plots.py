"""Plots of the benchmarks; matplotlib is imported where it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Record, ratio, timed_peers

COLORS = {
    "ours": "#d1495b",
    "dense": "#66717e",
    "deepspeed": "#2e86ab",
    "deepspeed_dropless": "#7fb7d3",
    "hugging_face": "#edae49",
    "grouped_mm": "#8d6a9f",
    "megablocks": "#3c896d",
    "tutel": "#a7c957",
}


def plot_layer(groups: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Bars of the headline's ratios, and the curve of the cost over the number of experts."""
    which = "forward_backward"
    for title, records in groups.items():
        timed = [record for record in records if ratio(record, which, "ours", "dense")]
        if not timed:
            continue
        if title == "headline":
            plot_ratios(timed, which, folder / "layer-ratios.svg")
        elif title == "curve":
            plot_curve(timed, which, folder / "layer-experts.svg")


def plot_ratios(records: Sequence[Record], which: str, path: Path) -> None:
    """Bars: time of each peer over the dense network's, by number type and experts."""
    pyplot = start_pyplot()
    dtypes = list(dict.fromkeys(record["key"]["case"]["dtype"] for record in records))
    peers = [name for name in timed_peers(records, which) if name != "dense"]
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(4 * len(dtypes), 3.6), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        own = [record for record in records if record["key"]["case"]["dtype"] == dtype]
        for index, name in enumerate(peers):
            values = [ratio(record, which, name, "dense") or 0.0 for record in own]
            places = [position + (index - (len(peers) - 1) / 2) * 0.8 / len(peers) for position in range(len(own))]
            bars = axis.bar(places, values, 0.8 / len(peers), label=name, color=COLORS[name])
            axis.bar_label(bars, [f"{value:.1f}" if value else "" for value in values], fontsize=6)
        axis.axhline(1.0, color=COLORS["dense"], linewidth=1, linestyle="--")
        axis.set_xticks(range(len(own)), [f"{record['key']['case']['num_experts']} experts" for record in own])
        axis.set_title(dtype)
        axis.set_yscale("log")
    axes[0][0].set_ylabel("time / dense FFN of the same FLOPs")
    axes[0][-1].legend(fontsize=7)
    _save(figure, path)


def plot_curve(records: Sequence[Record], which: str, path: Path) -> None:
    """Lines: time over the number of experts at the same tokens and FLOPs, and the two limits."""
    pyplot = start_pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 4))
    experts = [record["key"]["case"]["num_experts"] for record in records]
    for name in timed_peers(records, which):
        points = [
            (count, 1e3 * record["peers"][name][which]["median"])
            for count, record in zip(experts, records, strict=True)
            if which in record["peers"].get(name, {})
        ]
        axis.plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS[name])
    for limit, style in (("gemm", ":"), ("bandwidth", "--")):
        values = [1e3 * record["limits"][which][limit] for record in records]
        axis.plot(experts, values, style, color="black", linewidth=1, label=f"limit: {limit}")
    axis.set_xscale("log", base=2)
    axis.set_xticks(experts, [str(count) for count in experts])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("experts")
    axis.set_ylabel("ms, forward and backward")
    axis.legend(fontsize=7)
    _save(figure, path)


def plot_losses(runs: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path) -> None:
    """Loss against updates of several runs over each other.

    Args:
        runs: run -> ``train`` and ``valid`` -> (update, loss) pairs.
        path: the picture's file.
    """
    pyplot = start_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, split in zip(axes, ("train", "valid"), strict=True):
        for index, (name, curves) in enumerate(runs.items()):
            if curves.get(split):
                axis.plot(*zip(*curves[split], strict=True), label=name, linewidth=1, color=f"C{index}")
        axis.set_title(f"{split} loss")
        axis.set_xlabel("updates")
    axes[0].set_ylabel("nll, bits a token")
    axes[0].legend(fontsize=7)
    _save(figure, path)


def start_pyplot() -> Any:
    """Matplotlib without a screen; the same figures give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mtmoe"  # the same figures give the same file
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=120)
    start_pyplot().close(figure)
