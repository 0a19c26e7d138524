"""What a model folder tells about itself: the model card (README.md), data and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtmoe import languages
from mtmoe.checkpoint.inspection import describe, experts_text, history_lines, size_text
from mtmoe.checkpoint.stored import StoredModel, read_json
from mtmoe.errors import CheckpointError, UnknownLanguage

DATA_FIELDS = ("recipe", "source", "licence", "attribution", "fingerprint")
"""What of ``data.json``, which `mtmoe prepare` writes, goes with a model."""

FIGURES = ("chrf++", "bleu", "sentences")
"""What of a direction in ``evaluation.json`` goes with a model; the hash of its test set as well."""


def read_data(folder: Path) -> dict[str, Any]:
    """What prepared data says about itself, for `StoredModel.data`.

    Args:
        folder: that `mtmoe prepare` wrote. Nothing comes of one without ``data.json``, as older versions left.

    Raises:
        CheckpointError: its ``data.json`` is damaged.
    """
    path = folder / "data.json"
    if not path.is_file():
        return {}
    values = read_json(path)
    pairs = values.get("pairs", {}) if isinstance(values, dict) else None
    if not isinstance(pairs, dict) or not all(isinstance(splits, dict) for splits in pairs.values()):
        raise CheckpointError(f"{path} lacks pairs; prepare the data again")
    found = {name: values[name] for name in DATA_FIELDS if values.get(name)}
    return found | {"train_pairs": {pair: splits.get("train", 0) for pair, splits in pairs.items()}}


def read_figures(path: Path) -> dict[str, Any]:
    """The figures of an evaluation, for `StoredModel.figures`.

    Args:
        path: ``evaluation.json`` as `mtmoe evaluate` writes it.

    Raises:
        CheckpointError: it is missing, damaged, or something else.
    """
    values = read_json(path)
    directions = values.get("directions") if isinstance(values, dict) else None
    if not isinstance(directions, dict) or not directions or not all(
        isinstance(each, dict) and isinstance(each.get("chrf++"), int | float) for each in directions.values()
    ):
        raise CheckpointError(f"{path} is no evaluation; give the evaluation.json that `mtmoe evaluate` writes")
    kept = (*FIGURES, "test_set")
    return {
        "mean_chrf++": _mean(directions, "chrf++"),
        "mean_bleu": _mean(directions, "bleu"),
        "directions": {
            name: {key: each[key] for key in kept if each.get(key) is not None} for name, each in directions.items()
        },
    }


def model_card(name: str, model: StoredModel) -> str:
    """The README.md of a model folder, in Markdown.

    Args:
        name: of the folder.
        model: what is in it.
    """
    about = describe(model)
    lines = _front_matter(model) + [f"# {name}", "", _summary(about), ""]
    lines += [f"Translates between: {', '.join(_named(code) for code in model.languages.languages)}.", ""]
    lines += ["```", f'mtmoe translate --model {name} --from {_example(model)} "…"', "```", ""]
    if model.data:
        lines += ["## Data", "", *_data_lines(model.data), ""]
    if model.figures:
        lines += ["## Figures", "", *_figure_lines(model.figures), ""]
    if model.history:
        lines += ["## What was done to it", ""]
        lines += [f"{number}. {line}" for number, line in enumerate(history_lines(model.history), start=1)] + [""]
    lines += [
        "## Checking a copy", "",
        "`checksums.json` has the size and SHA-256 of each file; `mtmoe inspect --verify FOLDER` compares them.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _front_matter(model: StoredModel) -> list[str]:
    """What the Hugging Face hub reads, so that a folder can be put there as it is."""
    codes = [f"- {code.replace('_', '-')}" for code in model.languages.languages]
    return ["---", "library_name: mtmoe", "pipeline_tag: translation", "language:", *codes, "---", ""]


def _summary(about: Mapping[str, Any]) -> str:
    experts = ", ".join(
        f"{experts_text(side)} (top-{side['top_k']}) in {side['moe_layers']} of {side['layers']} {name} layers"
        for name, side in (("encoder", about["encoder"]), ("decoder", about["decoder"]))
        if side["moe_layers"]
    )
    kind = f"Mixture-of-Experts: {experts}" if experts else "dense"
    return (
        f"A multilingual translation model, {kind}; "
        f"{about['encoder']['layers']} + {about['decoder']['layers']} layers, "
        f"width {about['d_model']}; {about['parameters']:,} parameters, of which a token uses "
        f"{about['active_parameters']:,}; {' and '.join(about['dtypes'])}, {size_text(about['weight_bytes'])}."
    )


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    titles = {"recipe": "Recipe", "source": "Source", "licence": "Licence", "attribution": "Attribution"}
    lines = [f"- {title}: {data[key]}" for key, title in titles.items() if data.get(key)]
    pairs = data.get("train_pairs", {})
    if pairs:
        lines.append(f"- Sentence pairs for training: {sum(pairs.values()):,} in {len(pairs)} language pairs")
    return lines


def _figure_lines(figures: Mapping[str, Any]) -> list[str]:
    rows = ["| direction | segments | chrF++ | BLEU |", "|---|---:|---:|---:|"]
    for direction, each in sorted(figures["directions"].items()):
        bleu = f"{each['bleu']:.1f}" if "bleu" in each else ""
        rows.append(f"| {direction} | {each.get('sentences', '')} | {each['chrf++']:.1f} | {bleu} |")
    mean_bleu = figures.get("mean_bleu")
    mean = f"| **mean** | | **{figures['mean_chrf++']:.1f}** | {'' if mean_bleu is None else f'{mean_bleu:.1f}'} |"
    return [*rows, mean]


def _mean(directions: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
    values = [each[metric] for each in directions.values() if isinstance(each.get(metric), int | float)]
    return sum(values) / len(values) if len(values) == len(directions) else None


def _named(code: str) -> str:
    try:
        return f"{languages.name(code)} ({code})"
    except UnknownLanguage:
        return code


def _example(model: StoredModel) -> str:
    known = model.languages
    source, target = (known.directions[0].split("-") if known.directions else (known.languages[0], known.languages[-1]))
    return f"{source} --to {target}"
