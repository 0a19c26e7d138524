"""What a layer's routing did with a batch: read by logs, reports and pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtmoe.moe.conditional import ConditionalGates
from mtmoe.moe.routing import RoutingDecision


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """Counts over the real tokens of one forward pass; nothing here has a gradient but `cmr_gate_sum`."""

    tokens: Tensor
    """() int64: real tokens."""
    tokens_per_expert: Tensor
    """(num_experts,) int64: tokens that chose an expert, in any place, before capacity."""
    first_choice_per_expert: Tensor
    """(num_experts,) int64: tokens whose best choice an expert was, before capacity."""
    probability_per_expert: Tensor
    """(num_experts,) fp32: gate probability summed over tokens."""
    dropped: Tensor
    """() int64: choices that found no slot."""
    entropy: Tensor
    """() fp32, nats: mean over tokens of the entropy of the gate's probabilities."""
    cmr_gate_sum: Tensor | None = None
    """() fp32, with gradient: sum of the CMR gates; None without CMR."""
    cmr_gate_count: Tensor | None = None
    """() int64: tokens that `cmr_gate_sum` is over; None without CMR."""

    @property
    def dropped_share(self) -> Tensor:
        """() fp32: share of the choices that found no slot; 0 when there was none."""
        return self.dropped / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def load(self) -> Tensor:
        """(num_experts,) fp32: each expert's share of the choices x num_experts; 1 is an even load."""
        choices = self.tokens_per_expert.sum().clamp(min=1)
        return self.tokens_per_expert * len(self.tokens_per_expert) / choices


def gather_statistics(
    chosen: RoutingDecision, seated: RoutingDecision, real: Tensor | None, gates: ConditionalGates | None
) -> RoutingStatistics:
    """Count what a batch's routing did.

    Args:
        chosen: the gate's decision.
        seated: the same after capacity.
        real: (tokens,) bool, False for padding; None when all tokens are real.
        gates: of CMR, if the layer has it.
    """
    probs = chosen.gate_probs.detach()
    if real is not None:
        probs = probs[real]
    num_experts = probs.shape[1]
    # Unrouted choices are -1: shifted by one they fall into a bin of their own, which is cut off.
    counts = torch.bincount(chosen.expert_index.reshape(-1) + 1, minlength=num_experts + 1)[1:]
    first = torch.bincount(chosen.expert_index[:, 0] + 1, minlength=num_experts + 1)[1:]
    tokens = torch.tensor(len(probs), device=probs.device)
    entropy = torch.special.entr(probs).sum() / tokens.clamp(min=1)
    return RoutingStatistics(
        tokens=tokens,
        tokens_per_expert=counts,
        first_choice_per_expert=first,
        probability_per_expert=probs.sum(dim=0),
        dropped=counts.sum() - (seated.expert_index >= 0).sum(),
        entropy=entropy,
        cmr_gate_sum=None if gates is None else gates.total,
        cmr_gate_count=None if gates is None else gates.count,
    )
