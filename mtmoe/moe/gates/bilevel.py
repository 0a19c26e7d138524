"""The bi-level gate of SMILE: a token chooses a node, then experts inside it."""

from __future__ import annotations

import torch
from torch import Tensor

from mtmoe.kernels.gating import ChoiceCounts, ExpertChoice, choose_experts, count_choices
from mtmoe.moe.config import MoEConfig
from mtmoe.moe.gates.topk import TopKGate
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.losses import load_balance_of_counts
from mtmoe.moe.routing import RoutingDecision
from mtmoe.parallel import ExpertParallel


class BiLevelGate(TopKGate):
    """Send each token to one node of `expert_nodes`, and to the `top_k` best places there.

    Two softmaxes, ``p`` over the n nodes and ``q`` over the m places of a node, come from one linear map of width
    n + m; the output of the expert in place j of node i has the weight ``p_i q_j``. All experts of a token are in one
    node, so that its row goes to one host where nodes are hosts. With one node, or nodes of one expert and `top_k` 1,
    this is Switch's gate.

    Each level has a load balance loss of its own: ``node_balance``, ``n sum_i f_i P_i``, and ``inner_balance``,
    ``m sum_j f_j Q_j``; f is the share of first choices. Both are 1 when balanced. ``router_z`` adds up the two
    routers'; one with a single choice decides nothing and has none.

    The paper chooses one expert; `top_k` above 1, and policies for the choices after the first, are ours.

    Source: He et al. 2022 (SMILE).
    """

    def __init__(self, config: MoEConfig, backend: str | None = None, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config, backend, parallel, rows=config.expert_nodes + config.node_experts)

    def forward(
        self,
        x: Tensor,
        real: Tensor | None = None,
        survivors: Tensor | None = None,
        keys: DrawKeys | None = None,
    ) -> RoutingDecision:
        """Choose a node and experts inside it, before any capacity; arguments and result as in `TopKGate`.

        The decision's `gate_probs` are ``p_i q_j``, without a gradient.

        Raises:
            ValueError: there are `survivors`, which need a gate that compares all experts.
        """
        if survivors is not None:
            raise ValueError("the bilevel gate takes no survivors: they would leave nodes of unequal size")
        config = self.config
        node_logits, inner_logits = self.logits(x, keys=keys).split([config.expert_nodes, config.node_experts], dim=1)
        node = choose_experts(node_logits, 1, real=real, backend=self.backend)
        inner = choose_experts(
            inner_logits,
            config.top_k,
            policy=config.second_expert_policy,
            threshold=config.second_expert_threshold,
            draws=self._draws(inner_logits, keys) if self.training else None,
            real=real,
            backend=self.backend,
        )
        index = torch.where(
            inner.expert_index < 0, inner.expert_index, node.expert_index * config.node_experts + inner.expert_index
        )
        gate_probs = (node.gate_probs.detach()[:, :, None] * inner.gate_probs.detach()[:, None, :]).flatten(1)
        summed = gate_probs if real is None else gate_probs.masked_fill(~real[:, None], 0)
        routers = [each for each in (node, inner) if each.gate_probs.shape[1] > 1]
        squared = sum((each.counts.squared_log_partition for each in routers), gate_probs.new_zeros(()))
        counts = ChoiceCounts(*count_choices(index, config.num_experts), summed.sum(dim=0), squared)
        losses = self._losses(_side_by_side(node, inner, squared), real)
        return RoutingDecision(index, node.weight * inner.weight, gate_probs, losses, counts)

    def _losses(self, choice: ExpertChoice, real: Tensor | None) -> dict[str, Tensor]:
        nodes, sums = self.config.expert_nodes, self._sums(choice, real)
        tokens = max(sums.tokens, 1) if isinstance(sums.tokens, int) else sums.tokens.clamp(min=1)
        probability, divisor = (sums.probability, tokens) if sums.with_padding is None else sums.with_padding
        firsts = sums.first_choices
        return {
            "node_balance": load_balance_of_counts(firsts[:nodes], probability[:nodes], divisor),
            "inner_balance": load_balance_of_counts(firsts[nodes:], probability[nodes:], divisor),
            "router_z": sums.squared_log_partition / tokens,
        }


def _side_by_side(node: ExpertChoice, inner: ExpertChoice, squared: Tensor) -> ExpertChoice:
    """Both levels as one choice among n + m, so that their sums over ranks are one step."""

    def join(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], dim=-1)

    return ExpertChoice(
        join(node.expert_index, inner.expert_index),
        join(node.weight, inner.weight),
        join(node.gate_probs, inner.gate_probs),
        ChoiceCounts(
            join(node.counts.tokens_per_expert, inner.counts.tokens_per_expert),
            join(node.counts.first_choice_per_expert, inner.counts.first_choice_per_expert),
            join(node.counts.probability_per_expert, inner.counts.probability_per_expert),
            squared,
        ),
    )
