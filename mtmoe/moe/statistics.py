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
    gate_probs: Tensor
    """(tokens, num_experts) fp32: the gate's probabilities, padding included."""
    real: Tensor | None = None
    """(tokens,) bool, False for padding; None when all tokens are real."""
    cmr_gate_sum: Tensor | None = None
    """() fp32, with gradient: sum of the CMR gates; None without CMR."""
    cmr_gate_count: Tensor | None = None
    """() int64: tokens that `cmr_gate_sum` is over; None without CMR."""
    survivors: Tensor | None = None
    """(survivors,) int64: experts that took part; None when all did."""

    @property
    def entropy(self) -> Tensor:
        """() fp32, nats: mean over tokens of the entropy of the gate's probabilities; computed where it is read."""
        entropy: Tensor = torch.special.entr(self.gate_probs).sum(dim=-1)
        if self.real is not None:
            entropy = entropy.masked_fill(~self.real, 0)
        return entropy.sum() / self.tokens.clamp(min=1)

    @property
    def dropped_share(self) -> Tensor:
        """() fp32: share of the choices that found no slot; 0 when there was none."""
        return self.dropped / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def load(self) -> Tensor:
        """(num_experts or survivors,) fp32: each expert's share of the choices x their number; 1 is an even load."""
        per_expert = self.tokens_per_expert
        if self.survivors is not None:
            per_expert = per_expert[self.survivors]
        return per_expert * len(per_expert) / per_expert.sum().clamp(min=1)


def gather_statistics(
    chosen: RoutingDecision,
    seated: RoutingDecision,
    real: Tensor | None,
    gates: ConditionalGates | None,
    survivors: Tensor | None = None,
) -> RoutingStatistics:
    """Count what a batch's routing did.

    Args:
        chosen: the gate's decision.
        seated: the same after capacity.
        real: (tokens,) bool, False for padding; None when all tokens are real.
        gates: of CMR, if the layer has it.
        survivors: (survivors,) int64, the experts that took part; None when all did.

    Raises:
        ValueError: the gate's decision comes without counts.
    """
    counts = chosen.counts
    if counts is None:
        raise ValueError("gather_statistics needs a decision with counts, as gates return it")
    per_expert = counts.tokens_per_expert
    if seated.expert_index is chosen.expert_index:
        dropped = per_expert.new_zeros(())
    else:
        dropped = per_expert.sum() - (seated.expert_index >= 0).sum()
    return RoutingStatistics(
        tokens=counts.first_choice_per_expert.sum(),  # each real token has one first choice
        tokens_per_expert=per_expert,
        first_choice_per_expert=counts.first_choice_per_expert,
        probability_per_expert=counts.probability_per_expert.detach(),
        dropped=dropped,
        gate_probs=chosen.gate_probs.detach(),
        real=real,
        cmr_gate_sum=None if gates is None else gates.total,
        cmr_gate_count=None if gates is None else gates.count,
        survivors=survivors,
    )
