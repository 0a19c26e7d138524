"""Average the weights of several checkpoints of one training, as of its last ones: often a better model than any."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint
from mtmoe.checkpoint.stored import StoredModel
from mtmoe.checkpoint.tensors import ComputedTensors, Recipe, dtype_of, rows_of, shape_of
from mtmoe.errors import CheckpointError

SAVED_BY_UPDATE = re.compile(r"checkpoint(_\d+_)?\d+\.pt|checkpoint_last\.pt")
"""Checkpoints along a run: of epochs, of updates, the last; not the best, which is one of them again."""


def average(models: Mapping[str, StoredModel]) -> StoredModel:
    """The mean of each weight; computed when it is asked for, in fp64, and rounded once to the format of the first.

    Args:
        models: what each is called -> the model; all of one shape, vocabulary and languages.

    Raises:
        CheckpointError: they do not match; the text names each difference.
    """
    if len(models) < 2:
        raise CheckpointError(f"an average needs two models or more, not {len(models)}")
    (first_name, first), *others = models.items()
    for name, other in others:
        differing = differences(first, other)
        if differing:
            raise CheckpointError(f"{first_name} and {name} are no models of one training: {'; '.join(differing)}")
    parts = [model.tensors for model in models.values()]
    recipes = {
        name: Recipe(
            shape_of(first.tensors, name),
            dtype_of(first.tensors, name),
            lambda begin, end, name=name: _mean(parts, name, begin, end),  # type: ignore[misc]
        )
        for name in first.tensors
    }
    averaged = replace(first, tensors=ComputedTensors(recipes))
    return averaged.after("averaged", models=[Path(name).name for name in models])


def differences(a: StoredModel, b: StoredModel) -> list[str]:
    """What keeps two models from being averaged, compared or continued with each other; nothing if all is alike."""
    found = config_differences(a.config, b.config)
    for name, one, two in (("dict.txt", a.dictionary, b.dictionary), ("spm.model", a.sentencepiece, b.sentencepiece)):
        if one.read_bytes() != two.read_bytes():
            found.append(f"{name} is not the same file")
    for field in ("languages", "encoder_langtok", "decoder_start", "tags"):
        one, two = getattr(a.languages, field), getattr(b.languages, field)
        if one != two:
            found.append(f"{field} is {one!r} and {two!r}")
    if not found:
        found = [
            f"{name} is {dtype_of(a.tensors, name)} and {dtype_of(b.tensors, name)}"
            for name in a.tensors
            if dtype_of(a.tensors, name) != dtype_of(b.tensors, name)
        ][:1]
    return found


def config_differences(a: TransformerConfig, b: TransformerConfig) -> list[str]:
    """The fields in which two shapes differ, with both values."""
    found = []
    ours, theirs = a.to_json(), b.to_json()
    for key in ours | theirs:
        one, two = ours.get(key), theirs.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += [f"{key}.{name} is {one[name]!r} and {two[name]!r}" for name in one if one[name] != two[name]]
        elif one != two:
            found.append(f"{key} is {_short(one)} and {_short(two)}")
    return found


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The checkpoints of a run with the most updates behind them, oldest first.

    Args:
        run: the run's folder, or the folder of its checkpoints.
        count: how many.

    Raises:
        CheckpointError: there are fewer, or one is damaged.
    """
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("checkpoint*.pt")):
        if SAVED_BY_UPDATE.fullmatch(path.name):
            updates = read_fairseq_checkpoint(path).updates
            if updates is not None:
                found.setdefault(updates, path)  # checkpoint_last.pt is often one of the others again
    if len(found) < count:
        names = ", ".join(f"{path.name} (update {updates})" for updates, path in sorted(found.items())) or "none"
        raise CheckpointError(
            f"{folder} has {len(found)} checkpoints of different updates, not {count}: {names}. "
            "Training keeps more with --keep-interval-updates or --keep-last-epochs"
        )
    return [found[updates] for updates in sorted(found)[-count:]]


def _mean(parts: Sequence[Mapping[str, Tensor]], name: str, begin: int, end: int) -> Tensor:
    total = rows_of(parts[0], name, begin, end).to(torch.float64, copy=True)
    for part in parts[1:]:
        total += rows_of(part, name, begin, end)
    return (total / len(parts)).to(dtype_of(parts[0], name))


def _short(value: object) -> str:
    return "an object" if isinstance(value, dict) else repr(value)
