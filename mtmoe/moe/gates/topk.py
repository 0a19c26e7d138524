"""The top-k gate of Switch (k = 1), GShard and NLLB (k = 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtmoe.moe.config import MoEConfig
from mtmoe.moe.losses import load_balance_loss, router_z_loss
from mtmoe.moe.routing import RoutingDecision


class TopKGate(nn.Module):
    """Send each token to the `top_k` experts with the highest logits of one linear map without bias.

    Sources: Lepikhin et al. 2020 (GShard), Fedus et al. 2021 (Switch), NLLB Team 2022.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        nn.init.uniform_(self.weight, -1 / math.sqrt(config.d_model), 1 / math.sqrt(config.d_model))

    def forward(self, x: Tensor, real: Tensor | None = None) -> RoutingDecision:
        """Choose experts, before any capacity.

        Args:
            x: (tokens, d_model), any float type.
            real: (tokens,) bool, False for padding; None when every token is real.

        Returns:
            The decision. Weights are normalised here only for ``before_drop``; for ``after_drop`` they are raw until
            capacity has been applied. The losses are over real tokens, and 0 when there are none.
        """
        gate_logits = self.logits(x)
        gate_probs = gate_logits.softmax(dim=-1)  # (tokens, num_experts)
        expert_index = self._choose(gate_logits)  # (tokens, top_k)
        weight = gate_probs.gather(1, expert_index)
        losses = self._losses(gate_logits, gate_probs, expert_index, real)

        share = weight / weight.sum(dim=-1, keepdim=True)
        if self.config.normalize_weights == "before_drop":
            weight = share
        unrouted = self._unrouted(share.detach(), real)
        if unrouted is not None:
            expert_index = expert_index.masked_fill(unrouted, -1)
            weight = weight.masked_fill(unrouted, 0)
        return RoutingDecision(expert_index, weight, gate_probs, losses)

    def logits(self, x: Tensor) -> Tensor:
        """The gate's scores: (tokens, d_model) -> (tokens, num_experts), always in at least fp32."""
        # fp32: in bf16 two near-equal logits round to one value, and the order of the experts decides, not the gate.
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training and self.config.jitter > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
            return F.linear(x, self.weight.to(x.dtype))

    def _choose(self, gate_logits: Tensor) -> Tensor:
        config = self.config
        gate_logits = gate_logits.detach()
        if config.top_k == 1 or config.second_expert_policy != "sampling" or not self.training:
            return gate_logits.topk(config.top_k, dim=-1).indices
        # Adding Gumbel noise and taking the best draws in proportion to the probabilities without the first expert's.
        first = gate_logits.argmax(dim=-1, keepdim=True)
        noise = -torch.empty_like(gate_logits).exponential_().log()
        noisy = (gate_logits + noise).scatter(1, first, -math.inf)
        return torch.cat([first, noisy.topk(config.top_k - 1, dim=-1).indices], dim=1)

    def _unrouted(self, share: Tensor, real: Tensor | None) -> Tensor | None:
        """(tokens, top_k) bool of the choices that the policy or padding takes away; None when there are none."""
        config = self.config
        unrouted = None
        if config.top_k > 1:
            if config.second_expert_policy == "random" and self.training:
                unrouted = 2 * share <= torch.rand_like(share)
            elif config.second_expert_policy == "threshold":
                unrouted = share <= config.second_expert_threshold
            if unrouted is not None:
                unrouted[:, 0] = False
        if real is not None:
            padding = ~real[:, None]
            unrouted = padding.expand_as(share) if unrouted is None else unrouted | padding
        return unrouted

    def _losses(
        self, gate_logits: Tensor, gate_probs: Tensor, expert_index: Tensor, real: Tensor | None
    ) -> dict[str, Tensor]:
        real_logits = gate_logits if real is None else gate_logits[real]
        if len(real_logits) == 0:
            zero = gate_logits.sum() * 0  # 0 with a gradient path, so that callers need no special case
            return {"load_balance": zero, "router_z": zero}
        if real is not None and self.config.load_balance_include_padding:
            # As in NLLB's release: padding is in the mean probability, and has chosen nothing.
            expert_index = expert_index.masked_fill(~real[:, None], -1)
        elif real is not None:
            gate_probs, expert_index = gate_probs[real], expert_index[real]
        return {
            "load_balance": load_balance_loss(gate_probs, expert_index),
            "router_z": router_z_loss(real_logits),
        }
