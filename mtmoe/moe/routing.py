"""What a gate decides, for any gate: the one type that passes between gate, capacity, masking and dispatch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtmoe.kernels.gating import ChoiceCounts


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Where each token goes. Padding goes nowhere: its choices are -1 and its weights 0."""

    expert_index: Tensor
    """(tokens, top_k) int64, best choice first; -1 where a choice is not routed."""
    weight: Tensor
    """(tokens, top_k) fp32, weight of each choice; 0 where it is not routed."""
    gate_probs: Tensor
    """(tokens, num_experts) fp32, each row sums to 1; padding rows too. 0 for experts that take no part."""
    losses: dict[str, Tensor]
    """Name -> () fp32, not yet weighted: ``load_balance`` (of the bilevel gate ``node_balance`` and ``inner_balance``),
    ``router_z``, with clusters ``cluster_variance``."""
    counts: ChoiceCounts | None = None
    """Sums over real tokens, of the gate's choice before capacity; a decision made by hand may leave them out."""
