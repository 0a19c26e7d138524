"""Auxiliary losses of routing. None is weighted here: the training criterion does that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance_loss(gate_probs: Tensor, expert_index: Tensor) -> Tensor:
    """Penalise experts that draw many tokens and much probability at once.

    ``num_experts * sum_e(share_e * mean_prob_e)``: 1.0 when balanced, `num_experts` when one expert takes all.
    The gradient flows through the probabilities only.

    Args:
        gate_probs: (tokens, num_experts) fp32, each row sums to 1.
        expert_index: (tokens, top_k) int64, best choice first; only the first counts, before capacity. -1 chooses no
            expert, but the token counts in both means.

    Returns:
        () fp32, without unit: a mean over tokens, not yet weighted.

    Raises:
        ValueError: there are no tokens, so the shares are undefined.

    Source: Fedus et al. 2021 (Switch Transformer), section 2.2; Lepikhin et al. 2020 (GShard).
    """
    tokens, num_experts = gate_probs.shape
    if tokens == 0:
        raise ValueError("load_balance_loss needs at least one token, got none; skip the loss for an empty batch")
    first_choices = torch.bincount(expert_index[:, 0] + 1, minlength=num_experts + 1)[1:]
    return load_balance_of_counts(first_choices, gate_probs.sum(dim=0), tokens)


def load_balance_of_counts(first_choices: Tensor, probability: Tensor, tokens: Tensor | int) -> Tensor:
    """`load_balance_loss` from sums over tokens that a gate has already.

    Args:
        first_choices: (num_experts,) int64, tokens whose best choice each expert is.
        probability: (num_experts,) fp32, gate probability summed over tokens; gets a gradient.
        tokens: what both sums are divided by, at least 1; a () tensor or a number.
    """
    # Divided one after the other: their product, tokens², would leave fp32's exact integers at 4097 tokens.
    share = first_choices.to(probability.dtype) / tokens
    return torch.dot(share, probability) * len(probability) / tokens


def router_z_loss(gate_logits: Tensor) -> Tensor:
    """Keep the gate's logits small: the mean squared log-partition.

    Args:
        gate_logits: (tokens, num_experts) fp32.

    Returns:
        () fp32, without unit: a mean over tokens, not yet weighted.

    Raises:
        ValueError: there are no tokens.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.
    """
    if gate_logits.shape[0] == 0:
        raise ValueError("router_z_loss needs at least one token, got none; skip the loss for an empty batch")
    return gate_logits.logsumexp(dim=-1).square().mean()


def cluster_variance_loss(
    probability: Tensor, tokens: Tensor | int, clusters: int, *, scale: str = "mean", gap: Tensor | None = None
) -> Tensor:
    """Hold experts of one cluster alike: the variance of their probabilities, so that each learns from similar tokens.

    ``num_experts * mean over clusters of variance over a cluster's experts(probability / tokens)``; a variance here is
    divided by the number of experts, so that a cluster of one has none.

    Args:
        probability: (num_experts,) fp32, gate probability summed over tokens, the experts of a cluster side by side;
            gets a gradient. Under cluster-level expert dropout only the experts that take part.
        tokens: that the sums are over, at least 1; a () tensor or a number.
        clusters: their number; 1 takes the variance over all experts (type 0 of MoEC).
        scale: ``mean``, or ``sum`` for the variance of the sums over `tokens`, which, times the tokens of a batch, is
            the loss of MoEC's release.
        gap: () fp32 of `cluster_gap`; the variance is divided by ``exp(gap)`` (type 2). None leaves that out.

    Returns:
        () fp32, not yet weighted.

    Source: Xie et al. 2022 (MoEC).
    """
    variance: Tensor = (probability / tokens).view(clusters, -1).var(dim=1, correction=0).mean()
    if gap is not None:
        variance = variance / gap.exp()
    return variance * len(probability) * (tokens if scale == "sum" else 1)


def cluster_gap(gate_probs: Tensor, tokens: Tensor | int, clusters: int, real: Tensor | None = None) -> Tensor:
    """How clearly tokens prefer as many experts as a cluster has to the next ones.

    A token's probabilities are sorted and cut into `clusters` groups; the mean of the best group less that of the next
    one, averaged over tokens.

    Args:
        gate_probs: (tokens, num_experts) fp32; gets a gradient.
        tokens: real tokens, at least 1.
        clusters: their number, at least 2.
        real: (tokens,) bool, False for padding; None when every token is real.

    Returns:
        () fp32, from 0 (even) to clusters / num_experts.

    Source: Xie et al. 2022 (MoEC), type 2 of its variance loss.
    """
    groups = gate_probs.sort(dim=-1, descending=True).values.unflatten(1, (clusters, -1)).mean(dim=-1)
    gap: Tensor = groups[:, 0] - groups[:, 1]
    if real is not None:
        gap = gap.masked_fill(~real, 0)
    return gap.sum() / tokens


def cmr_budget_loss(gate_sums: Sequence[Tensor], token_counts: Sequence[Tensor], budget: float) -> Tensor:
    """Hold the share of tokens that use the experts near a budget, over all CMR layers together.

    ``|sum of gates / number of gates - budget|``: one budget for the model, the absolute value outside the sum, so that
    layers may differ.

    Args:
        gate_sums: a () fp32 tensor for each layer, the sum of its gates over real tokens.
        token_counts: a () tensor for each layer, its number of real tokens.
        budget: wanted mean gate, in [0, 1].

    Returns:
        () fp32, without unit, not yet weighted; 0 when there is no token at all.

    Raises:
        ValueError: there are no layers, or the budget is outside [0, 1].

    Source: NLLB Team 2022 and Elbayad et al. 2022, Conditional MoE Routing.
    """
    if not gate_sums:
        raise ValueError("cmr_budget_loss needs at least one CMR layer")
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"budget={budget} must be between 0 and 1")
    total, count = torch.stack(list(gate_sums)).sum(), torch.stack(list(token_counts)).sum()
    # An all-padding batch has no mean; `total` is 0 then, and so is the result, with a gradient path.
    return torch.where(count > 0, (total / count.clamp(min=1) - budget).abs(), total)
