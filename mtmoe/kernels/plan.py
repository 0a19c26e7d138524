"""The dispatch plan: which row of the grouped tokens belongs to which token, choice and expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """A permutation of the routed (token, choice) pairs that groups them by expert."""

    assignment: Tensor
    """(routed,) int64: flat position ``token * top_k + choice`` of each grouped row."""
    token: Tensor
    """(routed,) int64: the token of each grouped row."""
    slot: Tensor
    """(tokens, top_k) int64: the grouped row of each choice, -1 where it is not routed."""
    tokens_per_expert: Tensor
    """(num_experts,) int64."""
    segments: tuple[tuple[int, int, int], ...]
    """``(expert, first row, end row)`` of each expert that has rows, on the host: the loop bounds of grouped GEMMs."""
    complete: bool
    """No choice is -1, so no masking is needed."""

    @property
    def tokens(self) -> int:
        """Tokens before dispatch, those that go nowhere included."""
        return self.slot.shape[0]

    @property
    def top_k(self) -> int:
        """Choices a token has."""
        return self.slot.shape[1]

    @property
    def routed(self) -> int:
        """Rows after dispatch."""
        return self.assignment.shape[0]

    @property
    def num_experts(self) -> int:
        """Experts, those without tokens included."""
        return self.tokens_per_expert.shape[0]


def plan_dispatch(expert_index: Tensor, num_experts: int) -> DispatchPlan:
    """Sort the routed choices by expert, once for dispatch and combine.

    Args:
        expert_index: (tokens, top_k) int64 in [0, num_experts), or -1 where a choice is not routed.
        num_experts: number of experts.

    Returns:
        The plan. Within an expert the rows keep the order of the flat choices, so the result is deterministic.
    """
    tokens, top_k = expert_index.shape
    flat = expert_index.reshape(-1)
    # Shifted by one so that the not routed (-1) sort first and count as bin 0.
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    bounds = counts.tolist()
    if len(bounds) != num_experts + 1:
        raise ValueError(f"expert_index holds {int(flat.max())}, but there are only {num_experts} experts")
    unrouted = bounds[0]
    assignment = flat.argsort(stable=True)[unrouted:]
    slot = torch.full_like(flat, -1)
    slot[assignment] = torch.arange(len(assignment), device=flat.device)
    segments, start = [], 0
    for expert, rows in enumerate(bounds[1:]):
        if rows:
            segments.append((expert, start, start + rows))
        start += rows
    return DispatchPlan(
        assignment=assignment,
        token=assignment // top_k,
        slot=slot.view(tokens, top_k),
        tokens_per_expert=counts[1:],
        segments=tuple(segments),
        complete=unrouted == 0,
    )
