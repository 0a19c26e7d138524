"""How many tokens an expert takes, and which ones when more want in."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mtmoe.moe.config import MoEConfig
from mtmoe.moe.routing import RoutingDecision


def capacity_of(config: MoEConfig, tokens: int, training: bool) -> int | None:
    """Slots of one expert for a batch.

    Args:
        config: its ``capacity_factor``, ``eval_capacity_factor``, ``eval_capacity_token_fraction`` and
            ``eval_capacity`` count.
        tokens: tokens in the batch, padding included, as in GShard and NLLB.
        training: which of the factors applies.

    Returns:
        At least 1, or None if no token is ever dropped.
    """
    if not training and config.eval_capacity_token_fraction > 0:
        return max(1, math.ceil(config.eval_capacity_token_fraction * tokens))
    if not training and config.eval_capacity > 0:
        return config.eval_capacity
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor == 0:
        return None
    # The small term: 3 * 0.7 * 10 is 20.999… in floating point, and means 21.
    return max(1, int(config.top_k * factor * math.ceil(tokens / config.num_experts) + 1e-6))


def apply_capacity(expert_index: Tensor, priority: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
    """Seat tokens at their experts until the slots are taken: all first choices before any second choice.

    Args:
        expert_index: (tokens, top_k) int64, -1 where a choice is not routed (it takes no slot).
        priority: (tokens,) float, higher is seated first; None seats by position (Riquelme et al. 2021 call the former
            batch-prioritised routing).
        capacity: slots of each expert.

    Returns:
        slot, (tokens, top_k) int64: the place at its expert, from 0, or -1 for a choice without one; and
        keep, (tokens, top_k) bool: ``slot >= 0``.

    Source: Lepikhin et al. 2020 (GShard), algorithm 1, without its (tokens, experts, capacity) tensor.
    """
    tokens, top_k = expert_index.shape
    device = expert_index.device
    if priority is None:
        order = torch.arange(tokens, device=device)
    else:
        order = priority.argsort(descending=True, stable=True)
    # Choice-major: a stable sort by expert then keeps first choices before second ones within each expert.
    queue = expert_index[order].t().reshape(-1)  # (top_k * tokens,)
    by_expert = queue.argsort(stable=True)
    expert = queue[by_expert]
    counts = torch.bincount(expert + 1)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(queue), device=device) - starts[expert + 1]
    place = place.masked_fill((expert < 0) | (place >= capacity), -1)
    slot = torch.empty_like(queue)
    slot[by_expert] = place
    unordered = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    unordered[order] = slot.view(top_k, tokens).t()
    return unordered, unordered >= 0


def limit(decision: RoutingDecision, config: MoEConfig, training: bool) -> RoutingDecision:
    """Drop what exceeds capacity, and normalise the weights of what is left if the config says ``after_drop``."""
    expert_index, weight = decision.expert_index, decision.weight
    capacity = capacity_of(config, len(expert_index), training)
    if capacity is not None and capacity < len(expert_index):  # an expert cannot be chosen twice by one token
        priority = decision.gate_probs.detach().amax(dim=-1) if config.batch_prioritized else None
        _, keep = apply_capacity(expert_index, priority, capacity)
        expert_index, weight = expert_index.masked_fill(~keep, -1), weight.masked_fill(~keep, 0)
    if config.normalize_weights == "after_drop":
        eps = torch.finfo(weight.dtype).eps
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=eps)
    return replace(decision, expert_index=expert_index, weight=weight)
