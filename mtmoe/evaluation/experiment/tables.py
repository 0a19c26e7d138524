"""The tables of an experiment, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtmoe.evaluation.report import NUMBER, TEXT, Table, markdown_table
from mtmoe.files import write_text

BUCKET_NAMES = {"very_low": "very low", "low": "low", "high": "high", "all": "all"}
"""How a bucket is called in a heading."""

FAMILY_NAMES = {"out_of_english": "en→x", "into_english": "x→en", "non_english": "x→y", "all": "all"}
"""How a group of directions is called."""

MISSING = "–"


def ordered(results: Mapping[str, Any]) -> list[str]:
    """Configurations as tables list them: baselines, then the others by very-low-resource chrF++, best first."""
    configurations = results["configurations"]

    def key(config: str) -> tuple[float, str]:
        scores = configurations[config]["scores"]["chrf++"].get("all", {})
        group = scores.get("very_low") or scores.get("all")
        return (-group["mean"] if group else 0.0, config)

    others = [config for config in configurations if config not in results["baselines"]]
    return [*results["baselines"], *sorted(others, key=key)]


def main_table(results: Mapping[str, Any]) -> Table:
    """Mean chrF++ of each bucket over all its directions, and the difference to the main baseline."""
    buckets = [*results["buckets"], "all"]
    baselines = results["baselines"]
    columns = [("configuration", TEXT), ("seeds", NUMBER)]
    for bucket in buckets:
        columns += [(BUCKET_NAMES[bucket], NUMBER), *([("Δ", NUMBER)] if baselines else [])]
    columns += [(f"Δ all to {_title(results, baseline)}", NUMBER) for baseline in baselines[1:]]
    rows = []
    for config in ordered(results):
        one = results["configurations"][config]
        row = [one["title"], str(len(one["scored_seeds"]) or MISSING)]
        for bucket in buckets:
            row.append(_score(one["scores"]["chrf++"].get("all", {}).get(bucket)))
            if baselines:
                row.append(_difference(results, baselines[0], config, "all", bucket))
        row += [_difference(results, baseline, config, "all", "all") for baseline in baselines[1:]]
        rows.append(row)
    return columns, rows


def group_table(results: Mapping[str, Any]) -> Table:
    """The same for each group of directions: a row for each configuration, a column for each group and bucket."""
    groups = [
        (family, bucket)
        for bucket in (*results["buckets"], "all")
        for family in FAMILY_NAMES
        if family != "all" and any(_cell(results, config, family, bucket) for config in results["configurations"])
    ]
    columns = [("configuration", TEXT)]
    columns += [(f"{BUCKET_NAMES[bucket]} {FAMILY_NAMES[family]}", NUMBER) for family, bucket in groups]
    baseline = results["baselines"][0] if results["baselines"] else None
    rows = []
    for config in ordered(results):
        cells = []
        for family, bucket in groups:
            cell = _score(_cell(results, config, family, bucket))
            if baseline and config != baseline and cell != MISSING:
                cell += f" ({_difference(results, baseline, config, family, bucket)})"
            cells.append(cell)
        rows.append([results["configurations"][config]["title"], *cells])
    return columns, rows


def significance_table(results: Mapping[str, Any], bucket: str) -> Table:
    """How sure the difference to the main baseline is on one bucket: over sentences, over seeds and over directions."""
    headings = ("Δ", "95 % interval", "p", "p (Holm)", "each seed", "better", "worse", "Wilcoxon p")
    columns = [("configuration", TEXT), *((heading, NUMBER) for heading in headings)]
    rows = []
    for config in ordered(results):
        baselines = results["baselines"]
        one = None
        if baselines and config != baselines[0]:
            one = results["differences"][baselines[0]][config].get("all", {}).get(bucket)
        if one is None or "p_value" not in one:
            continue
        rows.append(
            [
                _title(results, config),
                f"{one['difference']:+.2f}{one['stars']}",
                f"{one['low']:+.2f} to {one['high']:+.2f}",
                f"{one['p_value']:.4f}",
                f"{one['p_holm']:.4f}",
                ", ".join(f"{value:+.2f}" for value in one["by_seed"].values()),
                str(one["better"]),
                str(one["worse"]),
                f"{one['wilcoxon_p']:.4f}",
            ]
        )
    return columns, rows


def training_table(results: Mapping[str, Any]) -> Table:
    """Over-fitting by bucket, speed, size and dropped tokens."""
    buckets = list(results["buckets"])
    columns = [("configuration", TEXT)]
    for heading in ("best update", "rise", "gap at best", "gap at end"):
        columns += [(f"{heading}: {BUCKET_NAMES[bucket]}", NUMBER) for bucket in buckets]
    columns += [(name, NUMBER) for name in ("updates", "words/s", "parameters, M", "dropped, %")]
    rows = []
    for config in ordered(results):
        one = results["configurations"][config]
        row = [one["title"]]
        for name, digits in (("best_update", 0), ("rise", 2), ("gap_at_best", 2), ("gap_at_end", 2)):
            row += [_number(one["loss"].get(bucket, {}).get(name), digits) for bucket in buckets]
        row += [_number(one["updates"], 0), _number(one["words_per_second"], 0)]
        row += [_number(one["parameters"], 1, scale=1e-6), _number(one["dropped_share"], 1)]
        rows.append(row)
    return columns, rows


def explanation(results: Mapping[str, Any]) -> list[str]:
    """Say in a few lines what the tables show, and how it was computed."""
    parts = []
    for bucket, one in results["buckets"].items():
        pairs = "" if one["fewest_pairs"] is None else f" of {one['fewest_pairs']:,} to {one['most_pairs']:,} pairs"
        parts.append(f"{BUCKET_NAMES[bucket]}: {one['directions']} directions{pairs}")
    text = "test" if results["split"] == "test" else "validation"
    lines = [
        f"chrF++ on the {text} set, mean over directions, each counting once, ± standard deviation over seeds.",
        f"Buckets are disjoint (low does not include very low). {'; '.join(parts)}.",
    ]
    if results["baselines"]:
        lines.append(
            f"Δ is the difference to {_title(results, results['baselines'][0])} over the seeds that both have, ± "
            "standard deviation over these."
        )
    if results["baselines"] and results["bootstrap"]:
        lines.append(
            "Significance: paired bootstrap over the sentences of all directions of a group "
            f"({results['bootstrap']['samples']:,} resamples, both directions of a pair drawn together, mean over "
            "directions and seeds); after Holm's correction for the number of configurations `*` p < 0.05, `**` "
            "p < 0.01, `***` p < 0.001. It tells whether other sentences would show a difference between these very "
            "trainings; what another seed does, the standard deviation tells. Better, worse and Wilcoxon's p count "
            "directions, in the mean over seeds."
        )
    lines.append(
        "Losses are bits a token. Best update: where a bucket's mean validation loss is lowest; rise: validation loss "
        "at the end above that; gap: validation loss above that of training text, read without dropout and masking."
    )
    return lines


def markdown(results: Mapping[str, Any], pictures: Sequence[tuple[str, str]] = ()) -> str:
    """Write tables, pictures and what they mean.

    Args:
        results: of `summarise`.
        pictures: (file, what it shows), by their path from the page.
    """
    parts = [
        "\n".join(f"- {line}" for line in explanation(results)),
        markdown_table(main_table(results)),
        "By group of directions, with the difference to the baseline:",
        markdown_table(group_table(results)),
        *_sureness(results),
        "Over-fitting, speed and size:",
        markdown_table(training_table(results)),
        *(f"![{caption}]({file})\n\n*{caption}*" for file, caption in pictures),
    ]
    return "\n\n".join(parts)


def _sureness(results: Mapping[str, Any]) -> list[str]:
    bucket = next(iter(results["buckets"]), "all")
    table = significance_table(results, bucket)
    if not table[1]:
        return []
    return [f"How sure the difference is for {BUCKET_NAMES[bucket]}-resource directions:", markdown_table(table)]


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of `name` in a page; a page without them gets them at its end."""
    begin, end = f"<!-- {name}: begin, written by eval/experiment.py -->", f"<!-- {name}: end -->"
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    block = f"{begin}\n\n{text.strip()}\n\n{end}"
    before, found, rest = page.partition(begin)
    if found and end in rest:
        page = before + block + rest.partition(end)[2]
    else:
        page = f"{page.rstrip()}\n\n{block}\n".lstrip()
    write_text(path, page)


def _title(results: Mapping[str, Any], config: str) -> str:
    return str(results["configurations"][config]["title"])


def _cell(results: Mapping[str, Any], config: str, family: str, bucket: str) -> Any:
    return results["configurations"][config]["scores"]["chrf++"].get(family, {}).get(bucket)


def _score(figure: Mapping[str, Any] | None) -> str:
    return _number(figure, 2)


def _difference(results: Mapping[str, Any], baseline: str, config: str, family: str, bucket: str) -> str:
    if config == baseline:
        return ""
    figure = results["differences"][baseline][config].get(family, {}).get(bucket)
    if figure is None:
        return MISSING
    around = "" if figure["spread"] is None else f" ± {figure['spread']:.2f}"
    return f"{figure['difference']:+.2f}{around}{figure.get('stars', '')}"


def _number(figure: Mapping[str, Any] | None, digits: int, scale: float = 1.0) -> str:
    if figure is None:
        return MISSING
    text = f"{scale * figure['mean']:,.{digits}f}"
    around = figure["spread"]
    # A size is the same for every seed; saying ± 0 of it says nothing.
    return text if not around else f"{text} ± {scale * around:,.{digits}f}"
