"""An experiment as files: results.json, a part of a Markdown page with PNGs, and one HTML page for all experiments."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe.evaluation.experiment.figures import Picture
from mtmoe.evaluation.experiment.plots import plot_curves, plot_differences, plot_gaps
from mtmoe.evaluation.experiment.routing_plots import (
    plot_experts,
    plot_shared,
    plot_similarity,
    plot_specialisation,
)
from mtmoe.evaluation.experiment.runs import Experiment
from mtmoe.evaluation.experiment.tables import (
    BUCKET_NAMES,
    explanation,
    group_table,
    main_table,
    markdown,
    ordered,
    significance_table,
    training_table,
    write_between_markers,
)
from mtmoe.evaluation.report import STYLE, html_table
from mtmoe.files import replacing, write_text

PAGE_STYLE = """
body { max-width: 84rem; }
section { margin-top: 3rem; }
.scroll { overflow-x: auto; }
td, th { white-space: nowrap; }
figure img { max-width: 100%; height: auto; }
figcaption { max-width: 60rem; color: #444; font-size: .9em; }
h2 { border-top: 2px solid #1c1c1c; padding-top: .5rem; }
"""


@dataclass(frozen=True, slots=True)
class Pictures:
    """All pictures of an experiment."""

    scores: list[Picture]
    """Differences and curves."""
    routing: list[Picture]
    """What the gates do."""
    main: list[Picture]
    """Those of both that a page of text shows."""

    @classmethod
    def draw(cls, experiment: Experiment, results: Mapping[str, Any]) -> Pictures:
        """Draw what there are runs for.

        The routing of single configurations is that of the main baseline and of the best configuration with experts.
        """
        shown = shown_configs(experiment, results)
        overview = [plot_differences(results), plot_curves(experiment, results)]
        gaps = [plot_gaps(experiment, results, bucket) for bucket in results["buckets"]]
        single = [(plot_experts(experiment, config), plot_similarity(experiment, config)) for config in shown]
        across = [plot_shared(experiment, results), plot_specialisation(experiment, results)]
        main = [*overview, *gaps[:1], *(picture for pair in single[-1:] for picture in pair), *across]
        return cls(
            _drawn([*overview, *gaps]),
            _drawn([*(picture for pair in single for picture in pair), *across]),
            _drawn(main),
        )


def _drawn(pictures: Sequence[Picture | None]) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def shown_configs(experiment: Experiment, results: Mapping[str, Any]) -> list[str]:
    """The configurations whose routing is shown: the first baseline, and the best of the others, that have experts."""
    routed = [
        config for config in ordered(results) if any(run.routing() is not None for run in experiment.configs[config])
    ]
    first = [config for config in results["baselines"][:1] if config in routed]
    best = [config for config in routed if config not in results["baselines"]][:1]
    return first + best


def write_markdown(page: Path, experiment: Experiment, results: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Put tables and pictures between the experiment's markers in `page`, and the PNGs beside it."""
    for picture in pictures:
        with replacing(page.parent / f"{picture.name}.png") as temporary:
            temporary.write_bytes(picture.png())
    links = [(f"{picture.name}.png", picture.caption) for picture in pictures]
    write_between_markers(page, experiment.name, markdown(results, links))


def write_html(path: Path, experiments: Sequence[tuple[Mapping[str, Any], Pictures]]) -> None:
    """Write one page about several experiments that asks for nothing from outside."""
    body = "\n".join(_section(results, pictures) for results, pictures in experiments)
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Experiments</title>\n<style>{STYLE}{PAGE_STYLE}</style>\n</head>\n<body>\n<h1>Experiments</h1>\n"
        f"{body}\n</body>\n</html>\n",
    )


def _section(results: Mapping[str, Any], pictures: Pictures) -> str:
    notes = "".join(f"<li>{_code(line)}</li>" for line in explanation(results))
    parts = [
        f"<h2>{html.escape(results['experiment'])}</h2>",
        f"<ul>{notes}</ul>",
        _table(main_table(results)),
        *(_figure(picture) for picture in pictures.scores),
        "<h3>By group of directions</h3>",
        _table(group_table(results)),
        *(part for bucket in (*results["buckets"], "all") for part in _sureness(results, bucket)),
        "<h3>Over-fitting, speed and size</h3>",
        _table(training_table(results)),
        "<h3>Routing</h3>" if pictures.routing else "",
        *(_figure(picture) for picture in pictures.routing),
    ]
    return f'<section id="{html.escape(results["experiment"], quote=True)}">\n' + "\n".join(parts) + "\n</section>"


def _sureness(results: Mapping[str, Any], bucket: str) -> list[str]:
    table = significance_table(results, bucket)
    return [f"<h3>How sure the difference is: {BUCKET_NAMES[bucket]}</h3>", _table(table)] if table[1] else []


def _table(table: Any) -> str:
    return f'<div class="scroll">{html_table(table)}</div>'


def _figure(picture: Picture) -> str:
    caption = html.escape(picture.caption, quote=True)
    image = f'<img src="{picture.svg_address()}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _code(line: str) -> str:
    """Escape a line in which `backticks` mark what stands in a table."""
    parts = html.escape(line).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
