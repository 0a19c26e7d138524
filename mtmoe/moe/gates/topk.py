"""The top-k gate of Switch (k = 1), GShard and NLLB (k = 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtmoe.kernels.gating import ChoiceCounts, ExpertChoice, by_columns, choose_experts, draw_for_policy
from mtmoe.moe.config import MoEConfig
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.losses import cluster_gap, cluster_variance_loss, load_balance_of_counts
from mtmoe.moe.routing import RoutingDecision
from mtmoe.parallel import ExpertParallel


class TopKGate(nn.Module):
    """Send each token to the `top_k` experts with the highest logits of one linear map; it has a bias if `gate_bias`.

    Args:
        config: of the layer.
        backend: forces an implementation, as in `MoELayer`.
        parallel: the ranks whose batches the losses are over; None for this process alone.
        width: of a row of weights; None takes d_model.
        rows: of weights; None takes one for each expert.

    Sources: Lepikhin et al. 2020 (GShard), Fedus et al. 2021 (Switch), NLLB Team 2022.
    """

    def __init__(
        self,
        config: MoEConfig,
        backend: str | None = None,
        parallel: ExpertParallel | None = None,
        width: int | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backend, self.parallel = config, backend, parallel
        self.weight = nn.Parameter(torch.empty(rows or config.num_experts, width or config.d_model))
        self.bias = nn.Parameter(torch.zeros(len(self.weight))) if config.gate_bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(config.d_model), 1 / math.sqrt(config.d_model))

    def forward(
        self,
        x: Tensor,
        real: Tensor | None = None,
        survivors: Tensor | None = None,
        keys: DrawKeys | None = None,
    ) -> RoutingDecision:
        """Choose experts, before any capacity.

        Args:
            x: (tokens, d_model), any float type.
            real: (tokens,) bool, False for padding; None when every token is real.
            survivors: (survivors,) int64, the experts to choose from, rising; None for all. For the others the decision
                has probability 0, and the losses are as if there were none.
            keys: what draws depend on; None draws from torch's generator.

        Returns:
            The decision. Weights are normalised here only for ``before_drop``; for ``after_drop`` they are raw until
            capacity has been applied. The losses are over real tokens, of all ranks, and 0 when there are none.
        """
        config = self.config
        gate_logits = self.logits(x, survivors, keys)
        draws = self._draws(gate_logits, keys) if self.training else None
        choice = choose_experts(
            gate_logits,
            config.top_k,
            policy=config.second_expert_policy,
            threshold=config.second_expert_threshold,
            draws=draws,
            normalize=config.normalize_weights == "before_drop",
            real=real,
            backend=self.backend,
        )
        losses = self._losses(choice, real)
        weight = self.weights(gate_logits, choice)
        decision = RoutingDecision(choice.expert_index, weight, choice.gate_probs, losses, choice.counts)
        return decision if survivors is None else _among_all(decision, survivors, config.num_experts)

    def logits(self, x: Tensor, survivors: Tensor | None = None, keys: DrawKeys | None = None) -> Tensor:
        """The gate's scores: (tokens, d_model) -> (tokens, num_experts or survivors), always in at least fp32."""
        # fp32: in bf16 two near-equal logits round to one value, and the order of the experts decides, not the gate.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training and self.config.jitter > 0:
                x = x * self._jitter(x, keys)
            weight = self.weight.to(x.dtype)
            logits = self.scores(x, weight if survivors is None else weight[survivors])
            if self.bias is not None:
                bias = self.bias.to(x.dtype)
                logits = logits + (bias if survivors is None else bias[survivors])
            return logits

    def scores(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compare tokens with rows of weights: (tokens, d_model), (experts, width) -> (tokens, experts)."""
        if by_columns(x.device, len(weight)):
            return (weight @ x.t()).t()  # 73 instead of 125 microseconds for 8 experts, 1000 tokens of 256
        return F.linear(x, weight)

    def weights(self, gate_logits: Tensor, choice: ExpertChoice) -> Tensor:
        """(tokens, top_k): how much of each chosen expert's output a token takes."""
        return choice.weight

    def _jitter(self, x: Tensor, keys: DrawKeys | None) -> Tensor:
        jitter = self.config.jitter
        if keys is None:
            return torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
        return 1 + jitter * (2 * keys.uniform("jitter", x.shape[1], x.dtype) - 1)

    def _draws(self, gate_logits: Tensor, keys: DrawKeys | None) -> Tensor | None:
        def uniform(choices: int, dtype: torch.dtype) -> Tensor:
            assert keys is not None
            return keys.uniform("choice", choices, dtype)

        config = self.config
        return draw_for_policy(
            gate_logits, config.top_k, config.second_expert_policy, None if keys is None else uniform
        )

    def _losses(self, choice: ExpertChoice, real: Tensor | None) -> dict[str, Tensor]:
        config, sums = self.config, self._sums(choice, real)
        # All sums are 0 when there is no real token, and so are the losses.
        tokens = max(sums.tokens, 1) if isinstance(sums.tokens, int) else sums.tokens.clamp(min=1)
        if sums.with_padding is not None:
            # As in NLLB's release: padding is in the mean probability, and has chosen nothing.
            balance = load_balance_of_counts(sums.first_choices, *sums.with_padding)
        else:
            balance = load_balance_of_counts(sums.first_choices, sums.probability, tokens)
        losses = {"load_balance": balance, "router_z": sums.squared_log_partition / tokens}
        if config.expert_clusters:
            losses["cluster_variance"] = cluster_variance_loss(
                sums.probability,
                tokens,
                config.expert_clusters if config.cluster_variance_type else 1,
                scale=config.cluster_variance_scale,
                gap=None if sums.gap is None else sums.gap / tokens,
            )
        return losses

    def _sums(self, choice: ExpertChoice, real: Tensor | None) -> _Sums:
        """What the losses are made of: over the tokens of this process, or of all ranks."""
        config, counts, everyone = self.config, choice.counts, len(choice.gate_probs)
        tokens: Tensor | int = everyone if real is None else real.sum()
        include_padding = config.load_balance_include_padding and (real is not None or self.parallel is not None)
        padded = choice.gate_probs.sum(dim=0) if include_padding else None
        gap = None
        if config.expert_clusters and config.cluster_variance_type == 2:
            gap = cluster_gap(choice.gate_probs, 1, config.expert_clusters, real)
        firsts, probability, squared = (
            counts.first_choice_per_expert, counts.probability_per_expert, counts.squared_log_partition
        )  # fmt: skip
        if self.parallel is None:
            with_padding = None if padded is None else (padded, max(everyone, 1))
            return _Sums(firsts, probability, squared, tokens, with_padding, gap)
        absent = probability.new_zeros(0)
        firsts, probability, squared, number, padded, all_tokens, gap = self.parallel.sum(
            firsts, probability, squared, torch.as_tensor(tokens, device=firsts.device),
            absent if padded is None else padded, torch.tensor(everyone, device=firsts.device),
            absent if gap is None else gap,
        )  # fmt: skip
        return _Sums(
            firsts, probability, squared, number,
            (padded, all_tokens.clamp(min=1)) if include_padding else None,
            gap if gap.numel() else None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sums:
    first_choices: Tensor
    """(num_experts or survivors,) int64."""
    probability: Tensor
    """(num_experts or survivors,) fp32, over real tokens."""
    squared_log_partition: Tensor
    """() fp32."""
    tokens: Tensor | int
    """Real ones."""
    with_padding: tuple[Tensor, Tensor | int] | None
    """Probability and tokens (at least 1) with padding, where the load balance loss is to include it."""
    gap: Tensor | None
    """() fp32, sum of `cluster_gap` over tokens, where the variance loss wants it."""


def _among_all(decision: RoutingDecision, survivors: Tensor, num_experts: int) -> RoutingDecision:
    """A decision among the survivors, in the numbers of all experts."""

    def spread(values: Tensor) -> Tensor:
        """(…, survivors) -> (…, num_experts), 0 for the others."""
        return values.new_zeros(*values.shape[:-1], num_experts).index_copy(-1, survivors, values)

    index, counts = decision.expert_index, decision.counts
    assert counts is not None
    return replace(
        decision,
        expert_index=torch.where(index < 0, index, survivors[index.clamp(min=0)]),
        gate_probs=spread(decision.gate_probs),
        counts=ChoiceCounts(
            spread(counts.tokens_per_expert),
            spread(counts.first_choice_per_expert),
            spread(counts.probability_per_expert),
            counts.squared_log_partition,
        ),
    )
