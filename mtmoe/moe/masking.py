"""Masking against over-fitting: EOM, FOM and gating dropout. Everything draws from torch's global generator, or by
`mtmoe.moe.keyed` where keys are given, and only in training with a rate above 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mtmoe.moe.config import MoEConfig
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.routing import RoutingDecision


def mask_expert_outputs(
    decision: RoutingDecision, config: MoEConfig, training: bool, keys: DrawKeys | None = None
) -> RoutingDecision:
    """Expert Output Masking: hide each (token, expert) output with probability `config.eom`.

    A hidden output adds nothing and gets no gradient, and the other weights stay as they were, so the pair need not be
    computed at all: it leaves the decision, and EOM saves its share of the experts' work.

    Args:
        decision: after capacity and normalisation.
        config: ``eom`` and ``masking_scale``.
        training: masks in training; in evaluation ``masking_scale="eval"`` multiplies the weights by ``1 - eom``.
        keys: what the draws depend on; None draws from torch's generator.

    Returns:
        The decision with hidden choices at -1, or with scaled weights.

    Source: Elbayad et al. 2022, and its release: the unit is the (token, expert) pair, not the token.
    """
    rate = config.eom
    if rate == 0:
        return decision
    if not training:
        if config.masking_scale == "inverted":
            return decision
        return replace(decision, weight=decision.weight * (1 - rate))
    weight = decision.weight
    draws = torch.rand_like(weight) if keys is None else keys.uniform("eom", weight.shape[1], weight.dtype)
    hidden = draws < rate
    decision = hide(decision, hidden)
    if config.masking_scale == "inverted":
        return replace(decision, weight=decision.weight / (1 - rate))
    return decision


def hide(decision: RoutingDecision, hidden: Tensor) -> RoutingDecision:
    """Take choices out of a decision; the other weights stay.

    Args:
        decision: after capacity.
        hidden: (tokens, top_k) bool, or (tokens, 1) for all choices of a token.
    """
    return replace(
        decision,
        expert_index=decision.expert_index.masked_fill(hidden, -1),
        weight=decision.weight.masked_fill(hidden, 0),
    )


def mask_final_output(y: Tensor, config: MoEConfig, training: bool, keys: DrawKeys | None = None) -> Tensor:
    """Final Output Masking: hide a token's whole output of the layer with probability `config.fom`.

    Args:
        y: (tokens, d_model), before the residual connection; with CMR after its mixture.
        config: ``fom`` and ``masking_scale``.
        training: masks in training; in evaluation ``masking_scale="eval"`` multiplies by ``1 - fom``.
        keys: what the draws depend on; None draws from torch's generator.

    Returns:
        A tensor like `y`.

    Source: Elbayad et al. 2022.
    """
    rate = config.fom
    if rate == 0:
        return y
    if not training:
        return y if config.masking_scale == "inverted" else y * (1 - rate)
    draws = torch.rand(y.shape[0], 1, device=y.device) if keys is None else keys.uniform("fom", 1)
    y = y.masked_fill(draws < rate, 0)
    return y / (1 - rate) if config.masking_scale == "inverted" else y


def gating_is_dropped(config: MoEConfig, training: bool, keys: DrawKeys | None = None) -> bool:
    """Whether this is a drawn step of gating dropout: one draw for the whole layer, the consensus of the paper.

    Args:
        config: its ``gating_dropout`` counts.
        training: evaluation never drops.
        keys: what the draw depends on, so that all processes draw alike; None draws from torch's generator.
    """
    if config.gating_dropout == 0 or not training:
        return False
    draw = torch.rand(()).item() if keys is None else keys.once("gating_dropout")
    return draw < config.gating_dropout


def drop_gating(
    decision: RoutingDecision, config: MoEConfig, training: bool, keys: DrawKeys | None = None
) -> RoutingDecision:
    """Gating dropout, emulated in one process: on a drawn step no token leaves its rank.

    Experts are split over ``config.ranks`` ranks in blocks, tokens in as many blocks. On a drawn step a chosen expert
    is replaced by the one with the same offset on the token's own rank: what skipping the all-to-all does to the
    buffers. The weights stay the gate's. In mode ``gate_expert`` the experts are skipped altogether.

    Args:
        decision: after capacity.
        config: ``gating_dropout``, its mode and ranks.
        training: evaluation leaves the decision alone.
        keys: of `gating_is_dropped`.

    Returns:
        The same decision, or one that stays local or goes nowhere.

    Source: Liu et al. 2022 (Gating Dropout).
    """
    if not gating_is_dropped(config, training, keys):
        return decision
    if config.gating_dropout_mode == "gate_expert":
        return skip_experts(decision)
    tokens, local_experts = len(decision.expert_index), config.num_experts // config.ranks
    rank = torch.arange(tokens, device=decision.expert_index.device) * config.ranks // max(tokens, 1)
    return stay_local(decision, local_experts, rank[:, None] * local_experts)


def skip_experts(decision: RoutingDecision) -> RoutingDecision:
    """The decision with nothing routed: Gate-Expert-Drop."""
    nowhere = torch.full_like(decision.expert_index, -1)
    return replace(decision, expert_index=nowhere, weight=torch.zeros_like(decision.weight))


def stay_local(decision: RoutingDecision, local_experts: int, first: Tensor | int = 0) -> RoutingDecision:
    """The decision with each expert replaced by the one with its offset on another rank: Gate-Drop.

    Args:
        decision: after capacity.
        local_experts: that each rank holds.
        first: number of the rank's first expert, or (tokens, 1) int64 for each token; 0 gives offsets.
    """
    index = decision.expert_index
    return replace(decision, expert_index=torch.where(index < 0, index, first + index % local_experts))
