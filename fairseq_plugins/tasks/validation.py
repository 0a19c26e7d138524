"""What a validation says beside fairseq's own: means over directions, to be plotted and to choose checkpoints by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq.logging import metrics

from mtmoe.errors import ConfigError
from mtmoe.evaluation.buckets import assign_buckets, group_directions

TRAIN_SAMPLE = "train_sample"
"""Name of the training pairs that are scored at each validation, in `fairseq`'s sense of a subset and in the log."""

Groups = Mapping[str, Sequence[str]]
"""Name of a mean, such as ``nll_low`` -> its directions."""


def read_groups(data: Path, directions: Sequence[str]) -> Groups:
    """The means that are logged: ``nll_mean`` of all directions and, with data.json, one for each resource bucket.

    The buckets are those of `mtmoe evaluate`: as in the papers' tables, ``nll_low`` is the mean of *all* directions
    that are not high, so it includes those of ``nll_very_low``.

    Args:
        data: folder that `mtmoe prepare` wrote.
        directions: those of the run.
    """
    path = data / "data.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    buckets = assign_buckets(directions, described).of
    groups = group_directions(directions, buckets).get("all", {})
    return {"nll_mean" if name == "all" else f"nll_{name}": members for name, members in groups.items()}


def check_metric(name: str, directions: Sequence[str], groups: Groups) -> None:
    """Find out before training that no validation will give the metric that checkpoints are to be chosen by.

    Raises:
        ConfigError: it is one of ours by its name, but not of this run.
    """
    known = ["nll_loss", *groups, *(f"nll_loss_{direction}" for direction in directions)]
    if name.startswith("nll_") and name not in known:
        raise ConfigError(f"--best-checkpoint-metric {name} is not logged in this run; choose from: {', '.join(known)}")


def log_means(logging_outputs: Sequence[Mapping[str, Any]], groups: Groups) -> None:
    """Log the mean of each group's losses by direction; nothing in training, which has no losses by direction.

    Every direction counts once. A direction without validation pairs is left out of the means.
    """
    if not any(name.startswith("nll_loss_") for name in logging_outputs[0]):
        return

    def mean_of(members: Sequence[str]) -> Any:
        def mean(meters: Any) -> float:
            losses = [meters[f"nll_loss_{name}"].avg for name in members if f"nll_loss_{name}" in meters]
            return round(sum(losses) / len(losses), 3) if losses else float("nan")

        return mean

    for name, members in groups.items():
        metrics.log_derived(name, mean_of(members), priority=35)
