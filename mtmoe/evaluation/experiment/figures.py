"""How the pictures of an experiment look, and how they leave as SVG or PNG: the same bytes for the same figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtmoe.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow, which is too pale for a line on white: told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v")
BASELINE, SECOND_BASELINE = "#000000", "#8a8a8a"
GRID = "#dddddd"
SHARES = "Blues"
"""Colour map of shares: its lightness falls evenly, so it reads in grey and without colour vision too."""

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "svg.hashsalt": "mtmoe",
    "svg.fonttype": "path",
}

DPI = 110


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished picture."""

    name: str
    """Of its file, without ending."""
    caption: str
    """What it shows and how to read it."""
    figure: Any
    """matplotlib's figure; it is laid out once, since each further drawing would move it by a hair."""

    def __post_init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with drawing():
            FigureCanvasAgg(self.figure).draw()
        self.figure.set_layout_engine("none")

    def png(self) -> bytes:
        """The picture as PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        buffer = io.BytesIO()
        with drawing():
            FigureCanvasAgg(self.figure).print_png(buffer, metadata={"Software": None}, pil_kwargs={"optimize": True})
        return buffer.getvalue()

    def svg_address(self) -> str:
        """The picture as SVG in a ``data:`` address, so that the ids of two pictures on a page cannot meet."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.StringIO()
        with drawing():
            FigureCanvasSVG(self.figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue().encode()).decode()}"


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the style of all pictures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install 'mtmoe[eval]'") from error
    with rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def line_styles(configs: Sequence[str], baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each configuration, the same in every picture: black and grey are the baselines."""
    styles: dict[str, dict[str, Any]] = {}
    others = sorted(config for config in configs if config not in baselines)
    for number, config in enumerate(others):
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        styles[config] = {"color": COLOURS[number % len(COLOURS)], "marker": marker, "linewidth": 1.3}
    for config, colour in zip(baselines, (BASELINE, SECOND_BASELINE), strict=False):
        styles[config] = {"color": colour, "marker": "o", "linewidth": 2.0}
    return styles


def heat_map(
    axes: Axes,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    top: float = 1.0,
    numbers: bool = False,
) -> Any:
    """Draw a matrix of shares from 0 to `top`, with its numbers in the cells where there is room; returns the image."""
    image = axes.imshow(values, cmap=SHARES, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # Thin white lines between cells.
    axes.set_xticks([position - 0.5 for position in range(1, len(columns))], minor=True)
    axes.set_yticks([position - 0.5 for position in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    if numbers:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value > 0.6 * top else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def percent_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """Put a scale in percent beside a picture."""
    from matplotlib.ticker import PercentFormatter

    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), fraction=0.03, pad=0.01)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label(label)


def titles_of(results: Mapping[str, Any]) -> dict[str, str]:
    """Configuration -> how people call it."""
    return {config: str(one["title"]) for config, one in results["configurations"].items()}
