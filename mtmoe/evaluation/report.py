"""Evaluations and comparisons as files: JSON for programs, Markdown and one self-contained HTML page for people."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtmoe.evaluation.comparison import NOISE, Comparison
from mtmoe.evaluation.plot import plot_directions
from mtmoe.evaluation.samples import Sample
from mtmoe.files import write_json, write_text

FAMILY_NAMES = {
    "all": "all directions",
    "into_english": "into English",
    "out_of_english": "out of English",
    "non_english": "without English",
}
"""How a family of directions is called in a table."""

BUCKET_NAMES = {"all": "", "high": "high", "low": "low", "very_low": "very low"}
"""How a resource bucket is called in a table."""

NUMBER, TEXT = "right", "left"

Table = tuple[Sequence[tuple[str, str]], Sequence[Sequence[str]]]
"""(heading, alignment) of each column, and the rows."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #d8d8d8; text-align: left; vertical-align: top; }
th.right, td.right { text-align: right; }
figure { margin: 1rem 0; overflow-x: auto; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def write_reports(folder: Path, result: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write evaluation.json, evaluation.md, evaluation.html and samples.md, each atomically.

    evaluation.json comes last: where it stands, the others belong to it.
    """
    write_text(folder / "samples.md", samples_markdown(samples))
    write_text(folder / "evaluation.md", evaluation_markdown(result))
    write_text(folder / "evaluation.html", evaluation_html(result, samples))
    write_json(folder / "evaluation.json", result)


def direction_table(result: Mapping[str, Any]) -> Table:
    """Tabulate every direction, in the order of evaluation.json."""
    columns = [("direction", TEXT), ("bucket", TEXT), ("segments", NUMBER), *_figure_columns(), ("seconds", NUMBER)]
    rows = [
        [
            direction,
            BUCKET_NAMES.get(row.get("bucket") or "", "") or "–",
            str(row["sentences"]),
            *_figures(row),
            f"{row['seconds']:.1f}",
        ]
        for direction, row in result["directions"].items()
    ]
    return columns, rows


def group_table(result: Mapping[str, Any]) -> Table:
    """Tabulate the means over families and resource buckets."""
    columns = [("mean over", TEXT), ("bucket", TEXT), ("directions", NUMBER), *_figure_columns()]
    rows = [
        [FAMILY_NAMES[family], BUCKET_NAMES[bucket], str(row["directions"]), *_figures(row)]
        for family, by_bucket in result["groups"].items()
        for bucket, row in by_bucket.items()
    ]
    return columns, rows


def _figure_columns() -> list[tuple[str, str]]:
    headings = ("chrF++", "copying", "BLEU", "length", "off-target", "untranslated")
    return [(heading, NUMBER) for heading in headings]


def _figures(row: Mapping[str, Any]) -> list[str]:
    off_target = row.get("off_target")
    return [
        f"{row['chrf++']:.1f}",
        f"{row['copy_chrf++']:.1f}",
        f"{row['bleu']:.1f}",
        f"{row['length_ratio']:.2f}",
        "–" if off_target is None else f"{100 * off_target:.1f} %",
        f"{100 * row['untranslated']:.1f} %",
    ]


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Say in a few lines what was measured, from what, and how."""
    data = result["data"]
    limit = f"the first {data['limit']} segments of each direction" if data["limit"] else "all segments"
    model = result["model"].get("name") or result["model"].get("path") or "unnamed"
    decoding = ", ".join(f"{name} {value}" for name, value in result["decoding"].items())
    bleu = result["signatures"]["bleu"]
    lines = [
        f"Mean chrF++ over {len(result['directions'])} directions: {result['mean_chrf++']:.2f} "
        f"(copying the source: {result['mean_copy_chrf++']:.2f}); mean BLEU: {result['mean_bleu']:.2f}.",
        f"Model: {model}. Data: {data['recipe'] or data['folder']}, {data['split']} set, {limit}.",
        f"Decoding: {decoding}; {result['seconds']:.0f} s.",
        f"Resource buckets: {result['buckets']['description']}.",
        f"Off-target output: {result['off_target_method']}; share of the segments that can be judged.",
        f"chrF++: {result['signatures']['chrf++']}",
    ]
    for signature, directions in bleu.items():
        where = "" if len(bleu) == 1 else f" ({', '.join(directions)})"
        lines.append(f"BLEU: {signature}{where}")
    return lines


def evaluation_markdown(result: Mapping[str, Any]) -> str:
    """Write the report as Markdown."""
    summary = "\n".join(f"- {line}" for line in summary_lines(result))
    return (
        "\n\n".join(
            [
                "# Evaluation",
                summary,
                "## Directions",
                markdown_table(direction_table(result)),
                "## Means",
                'Every direction counts once in a mean. "Copying" is the score of the untouched source.',
                markdown_table(group_table(result)),
            ]
        )
        + "\n"
    )


def samples_markdown(samples: Sequence[Sample]) -> str:
    """Write the sample translations as Markdown; they are chosen by place in the test set, not by quality."""
    parts = ["# Sample translations", "Chosen by their place in the test set, evenly over the directions."]
    for number, sample in enumerate(samples, start=1):
        parts.append(
            f"## {number}. {sample.direction}\n\n"
            f"- source: {_markdown(sample.source)}\n"
            f"- reference: {_markdown(sample.reference)}\n"
            f"- output: {_markdown(sample.output)}"
        )
    return "\n\n".join(parts) + "\n"


def samples_text(samples: Sequence[Sample]) -> str:
    """Write the sample translations for a terminal."""
    return "\n\n".join(
        f"[{sample.direction}]\n  source     {sample.source}\n"
        f"  reference  {sample.reference}\n  output     {sample.output}"
        for sample in samples
    )


def evaluation_html(result: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """Write the report as one page that asks for nothing from outside: styles and plot stand in it."""
    summary = "".join(f"<li>{html.escape(line)}</li>" for line in summary_lines(result))
    picture = plot_directions(result["directions"])
    figure = (
        f"<figure>{picture}</figure>"
        if picture
        else "<p>The plot needs matplotlib: <code>pip install 'mtmoe[eval]'</code>.</p>"
    )
    sample_rows = [[sample.direction, sample.source, sample.reference, sample.output] for sample in samples]
    sample_columns = [(heading, TEXT) for heading in ("direction", "source", "reference", "output")]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Evaluation</h1>\n<ul>{summary}</ul>\n"
        f"{figure}\n<h2>Directions</h2>\n{html_table(direction_table(result))}\n"
        f"<h2>Means</h2>\n{html_table(group_table(result))}\n"
        f"<h2>Sample translations</h2>\n{html_table((sample_columns, sample_rows))}\n</body>\n</html>\n"
    )


def comparison_markdown(comparison: Comparison) -> str:
    """Write a comparison as Markdown, with stars for what stays significant after Holm's correction."""
    columns = [("direction", TEXT), *((name, NUMBER) for name in ("A", "B", "B − A")), ("", TEXT), ("p (Holm)", NUMBER)]
    rows = [
        [direction, f"{one.a:.2f}", f"{one.b:.2f}", f"{one.difference:+.2f}", one.stars, f"{one.p_holm:.4f}"]
        for direction, one in comparison.directions.items()
    ]
    group_columns = [("mean over", TEXT), ("bucket", TEXT), *((n, NUMBER) for n in ("directions", "A", "B", "B − A"))]
    group_rows = [
        [
            FAMILY_NAMES[family],
            BUCKET_NAMES[bucket],
            str(int(row["directions"])),
            f"{row['a']:.2f}",
            f"{row['b']:.2f}",
            f"{row['difference']:+.2f}",
        ]
        for family, by_bucket in comparison.groups.items()
        for bucket, row in by_bucket.items()
    ]
    parts = [
        f"# Comparison by {comparison.metric}",
        f"- A: {comparison.a}\n- B: {comparison.b}\n"
        f"- Test of each direction: paired {comparison.method}, {comparison.samples:,} samples, "
        f"seed {comparison.seed}; after Holm's correction `*` p < 0.05, `**` p < 0.01, `***` p < 0.001\n"
        + "\n".join(f"- {signature}" for signature in comparison.signatures),
        markdown_table((columns, rows)),
        markdown_table((group_columns, group_rows)),
        _verdict(comparison),
    ]
    for name, missing in (("A", comparison.only_a), ("B", comparison.only_b)):
        if missing:
            parts.append(f"Only in {name}, not compared: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _verdict(comparison: Comparison) -> str:
    over = comparison.over_directions
    text = (
        f"B − A over {len(comparison.directions)} directions: {over['mean_difference']:+.2f} "
        f"(95 % interval {over['interval_low']:+.2f} to {over['interval_high']:+.2f} over the choice of directions; "
        f"Wilcoxon p = {over['wilcoxon_p']:.4f}). Better in {over['better']:.0f} directions "
        f"({over['significantly_better']:.0f} significantly), worse in {over['worse']:.0f} "
        f"({over['significantly_worse']:.0f} significantly)."
    )
    if comparison.metric == "chrf++" and abs(over["mean_difference"]) < NOISE and over["wilcoxon_p"] >= 0.05:
        text += f" A mean difference below {NOISE} chrF++ from one seed each is noise."
    return text


def markdown_table(table: Table) -> str:
    """Lay out a table whose source is aligned too, so that it reads well on a screen."""
    columns, rows = table
    cells = [[text.replace("|", "\\|") for text in row] for row in ([heading for heading, _ in columns], *rows)]
    widths = [max(3, *(len(row[number]) for row in cells)) for number in range(len(columns))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if align == NUMBER else cell.ljust(width)
            for cell, width, (_, align) in zip(row, widths, columns, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = [
        "-" * (width - 1) + ":" if align == NUMBER else "-" * width
        for width, (_, align) in zip(widths, columns, strict=True)
    ]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def html_table(table: Table) -> str:
    """Lay out a table as HTML, every cell escaped; ``dir=auto`` sets Arabic or Hebrew from the right."""
    columns, rows = table
    head = "".join(f'<th class="{align}">{html.escape(heading)}</th>' for heading, align in columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{align}" dir="auto">{html.escape(cell)}</td>'
            for cell, (_, align) in zip(row, columns, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _markdown(text: str) -> str:
    """Show a segment as it is: backticks longer than any inside it, so that its mark-up stays text."""
    if not text:
        return "*(empty)*"
    fence = "`"
    while fence in text:
        fence += "`"
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"
