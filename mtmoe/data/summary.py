"""What was kept, what was dropped and why: the table on the screen, in summary.md and in summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtmoe.data.filters import REASONS
from mtmoe.data.recipe import SPLITS, Recipe

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Pair name -> split -> "read", "kept" or a reason -> number of pairs."""


def plain_counts(counts: Counts, pairs: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Order the counts, with "read" and "kept" everywhere and the reasons that occurred."""
    plain: dict[str, dict[str, dict[str, int]]] = {}
    for pair in pairs:
        plain[pair] = {}
        for split in SPLITS:
            counted = counts.get(pair, {}).get(split, {})
            row = {"read": counted.get("read", 0), "kept": counted.get("kept", 0)}
            plain[pair][split] = row | {reason: counted[reason] for reason in REASONS if counted.get(reason)}
    return plain


def table(counts: Counts) -> tuple[list[str], list[list[str]]]:
    """Give the header and rows of the table: a row a pair, and the sum of all in the last.

    Columns: kept in each split, read in all, and one for each reason that occurred.
    """
    reasons = [name for name in REASONS if any(row.get(name) for pair in counts.values() for row in pair.values())]
    header = ["pair", *SPLITS, "read", *(reason.replace("_", " ") for reason in reasons)]
    rows = []
    sums = [0] * (len(header) - 1)
    for name, splits in counts.items():
        numbers = [splits[split]["kept"] for split in SPLITS]
        numbers += [sum(row.get(column, 0) for row in splits.values()) for column in ("read", *reasons)]
        sums = [total + number for total, number in zip(sums, numbers, strict=True)]
        rows.append([name, *(f"{number:,}" for number in numbers)])
    rows.append(["all", *(f"{number:,}" for number in sums)])
    return header, rows


def markdown(recipe: Recipe, counts: Counts, data: Mapping[str, Any]) -> str:
    """Give summary.md."""
    header, rows = table(counts)
    lines = [f"# {recipe.name}", ""]
    lines += [f"{recipe.description.strip()}\n"] if recipe.description.strip() else []
    lines += [f"- Source: {' '.join(recipe.source.split())}", f"- Licence: {' '.join(recipe.licence.split())}"]
    lines += [f"- Attribution: {' '.join(recipe.attribution.split())}"] if recipe.attribution.strip() else []
    lines += [
        f"- Vocabulary: {data['vocabulary_size']:,} entries, of SentencePiece ({recipe.vocabulary.model}) and tags",
        f"- Fingerprint: `{data['fingerprint']}`",
        "",
        "Sentence pairs kept in train, valid and test, read in all, and dropped in all by reason:",
        "",
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    met = [name for name in REASONS if name.replace("_", " ") in header]
    lines += [f"- *{name.replace('_', ' ')}*: {REASONS[name]}" for name in met] + [""] * bool(met)
    lines += ["| language | train pairs | resource |", "| --- | ---: | --- |"]
    for code, level in data["resource"].items():
        pairs = sum(sizes["train"] for name, sizes in data["pairs"].items() if code in name.split("-"))
        lines.append(f"| {code} | {pairs:,} | {level.replace('_', ' ')} |")
    return "\n".join(lines) + "\n"
