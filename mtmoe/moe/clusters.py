"""Clusters of experts (MoEC): which experts take part in training at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtmoe.moe.config import MoEConfig


def surviving_experts(config: MoEConfig, seed: int, update: int, layer: int) -> Tensor | None:
    """Draw the experts that take part under cluster-level expert dropout; in each cluster equally many.

    A function of its arguments alone: a resumed run draws as an unbroken one, all processes draw alike, and torch's
    generator is left alone. For ``config.cluster_expert_dropout_interval`` updates the draw stays the same. It is made
    for each cluster by itself, unlike in the paper, so that none is ever empty.

    Args:
        config: ``expert_clusters``, ``cluster_expert_dropout`` and its interval.
        seed: of the run.
        update: number of updates done, from 0.
        layer: number of the layer in its model, so that layers differ.

    Returns:
        (survivors,) int64, rising numbers of experts; None when all take part.

    Source: Xie et al. 2022 (MoEC).
    """
    if config.cluster_expert_dropout == 0:
        return None
    key = (seed % 2**64, update // config.cluster_expert_dropout_interval, layer)
    draws = np.random.default_rng(key).random((config.expert_clusters, config.num_experts // config.expert_clusters))
    chosen = np.sort(draws.argsort(axis=1)[:, : config.cluster_survivors], axis=1)  # (clusters, survivors of one)
    first = np.arange(config.expert_clusters)[:, None] * draws.shape[1]
    return torch.from_numpy((chosen + first).reshape(-1))
