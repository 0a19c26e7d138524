"""Pictures, coloured by resource bucket: chrF++ of every direction, and validation curves of a run."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {"high": "#0072b2", "low": "#e69f00", "very_low": "#d55e00", None: "#0072b2"}
LABELS = {"high": "high resource", "low": "low resource", "very_low": "very low resource", None: "model"}
COPY_COLOUR = "#9a9a9a"


def plot_directions(directions: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Draw one pair of bars a direction.

    Args:
        directions: direction -> figures, as in evaluation.json.

    Returns:
        An SVG element to stand in a page, the same bytes for the same figures; None without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        logger.warning("matplotlib is not installed, so the report has no plot")
        return None
    names = list(directions)
    positions = range(len(names))
    buckets = [directions[name].get("bucket") for name in names]
    # hashsalt and the missing date keep the bytes the same; the salt otherwise is random for each process.
    with rc_context({"svg.hashsalt": "mtmoe", "svg.fonttype": "path"}):
        figure = Figure(figsize=(max(6.0, 0.45 * len(names) + 2), 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(
            [position - 0.2 for position in positions],
            [directions[name]["chrf++"] for name in names],
            width=0.4,
            color=[COLOURS[bucket] for bucket in buckets],
        )
        axes.bar(
            [position + 0.2 for position in positions],
            [directions[name]["copy_chrf++"] for name in names],
            width=0.4,
            color=COPY_COLOUR,
        )
        axes.set_xticks(list(positions), names, rotation=60 if len(names) > 8 else 0)
        axes.set_ylabel("chrF++")
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
        # "low" holds "very low" in the means; here each direction has the one colour of its own bucket.
        shown = [bucket for bucket in COLOURS if bucket in buckets]
        handles = [Patch(color=COLOURS[bucket], label=LABELS[bucket]) for bucket in shown]
        handles.append(Patch(color=COPY_COLOUR, label="copying the source"))
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
        return _svg(figure)


def plot_curves(
    losses: Mapping[str, Sequence[tuple[int, float]]],
    sampled: Mapping[str, Sequence[tuple[int, float]]],
    buckets: Mapping[str, str],
) -> str | None:
    """Draw validation losses against updates: a panel of means by bucket, then one for each pair of languages.

    Args:
        losses: direction -> (update, validation loss).
        sampled: the same of training pairs, drawn dashed; may be empty.
        buckets: direction -> resource bucket; each direction counts in its own bucket alone.

    Returns:
        An SVG element, the same bytes for the same figures; None without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed, so there is no plot")
        return None
    panels: dict[str, list[str]] = {}
    for name in losses:
        panels.setdefault("-".join(sorted(name.split("-"))), []).append(name)
    columns = min(4, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    with rc_context({"svg.hashsalt": "mtmoe", "svg.fonttype": "path"}):
        figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        axes = [figure.add_subplot(rows, columns, place + 1) for place in range(len(panels) + 1)]
        axes[0].set_title("means by resource", fontsize="medium")
        for bucket in [bucket for bucket in COLOURS if bucket in set(map(buckets.get, losses))]:
            members = [name for name in losses if buckets.get(name) == bucket]
            for curves, dashed in ((losses, False), (sampled, True)):
                _draw(axes[0], _mean([curves[name] for name in members if name in curves]), COLOURS[bucket],
                      label="" if dashed else LABELS[bucket] if bucket else "all", dashed=dashed)  # fmt: skip
        for panel, (pair, names) in zip(axes[1:], panels.items(), strict=True):
            panel.set_title(pair, fontsize="medium")
            for name, shade in zip(names, (1.0, 0.45), strict=False):
                colour = COLOURS[buckets.get(name)]
                _draw(panel, losses[name], colour, label=name, shade=shade)
                _draw(panel, sampled.get(name, []), colour, dashed=True, shade=shade)
        for panel in axes:
            panel.legend(frameon=False, fontsize="small")
            panel.spines[["top", "right"]].set_visible(False)
        figure.supxlabel("updates", fontsize="medium")
        what = "validation loss (dashed: training pairs), bits a token" if sampled else "validation loss, bits a token"
        figure.supylabel(what, fontsize="medium")
        return _svg(figure)


def _draw(
    axes: Any, curve: Sequence[tuple[int, float]], colour: str, *, label: str = "", dashed: bool = False,
    shade: float = 1.0,
) -> None:  # fmt: skip
    if curve:
        style = {"linestyle": "--", "linewidth": 1.0} if dashed else {"linewidth": 1.6}
        axes.plot(*zip(*curve, strict=True), color=colour, alpha=shade, label=label or "_", **style)


def _mean(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Mean of curves at the updates that all of them have."""
    points = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*map(set, points))) if points else []
    return [(update, sum(each[update] for each in points) / len(points)) for update in common]


def _svg(figure: Any) -> str:
    """The figure as an SVG element, without a date, so that equal figures are equal bytes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
