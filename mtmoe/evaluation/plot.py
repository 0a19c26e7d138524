"""The picture of an evaluation: chrF++ of every direction beside what copying earns, coloured by resource bucket."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
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
        from matplotlib.backends.backend_svg import FigureCanvasSVG
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
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
