"""Conditional MoE Routing (CMR): each token weighs a shared feed-forward network against the experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtmoe import kernels
from mtmoe.moe.config import MoEConfig
from mtmoe.moe.experts import activation_of
from mtmoe.moe.keyed import DrawKeys
from mtmoe.parallel import ExpertParallel


class SharedFeedForward(nn.Module):
    """The dense network that every token passes under CMR; names as in fairseq's Transformer layer."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.activation = activation_of(config.activation)
        d_ffn = config.cmr_d_ffn or config.d_ffn
        self.fc1 = nn.Linear(config.d_model, d_ffn)
        self.fc2 = nn.Linear(d_ffn, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d_model) -> (tokens, d_model), dropout included in training."""
        if self.config.activation == "relu" and not (self.config.activation_dropout and self.training):
            y = kernels.feed_forward(x, self.fc1, self.fc2)
        else:
            hidden = kernels.dropout(self.activation(self.fc1(x)), self.config.activation_dropout, self.training)
            y = self.fc2(hidden)
        return kernels.dropout(y, self.config.dropout, self.training)

    def in_two_steps(self, x: Tensor) -> Iterator[Tensor]:
        """`forward` in two halves of about the same work; the second gives the result. Draws in the same order."""
        hidden = self.activation(kernels.linear(x, self.fc1))
        hidden = kernels.dropout(hidden, self.config.activation_dropout, self.training)
        yield hidden
        yield kernels.dropout(kernels.linear(hidden, self.fc2), self.config.dropout, self.training)


class SharedOutput:
    """The shared network's output, of which a half is computed at each `step`, while experts' rows travel."""

    def __init__(self, network: SharedFeedForward, x: Tensor) -> None:
        self._steps = network.in_two_steps(x)
        self._last = x

    def step(self) -> None:
        """Compute the next half, if one is left."""
        self._last = next(self._steps, self._last)

    def value(self) -> Tensor:
        """(tokens, d_model), after what steps have left undone."""
        self.step()
        self.step()
        return self._last


@dataclass(frozen=True, slots=True)
class ConditionalGates:
    """The CMR gates of one forward pass."""

    value: Tensor
    """(tokens, 1) fp32: share of the experts in each token's output; after gate dropout."""
    total: Tensor
    """() fp32: sum over real tokens, of all ranks, with a gradient, for the budget loss."""
    count: Tensor
    """() int64: real tokens, of all ranks."""


class ConditionalRouting(nn.Module):
    """``(1 - G) * shared(x) + G * experts(x)`` with a gate ``G = sigmoid(w · x + b)`` for each token.

    Sources: NLLB Team 2022; Elbayad et al. 2022; after Zhang et al. 2021 (CLSR).
    """

    def __init__(self, config: MoEConfig, parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        self.gate = nn.Linear(config.d_model, 1)
        self.shared = SharedFeedForward(config)

    def gates(self, x: Tensor, real: Tensor | None, keys: DrawKeys | None = None) -> ConditionalGates:
        """Compute the gates, with gate dropout in training.

        Args:
            x: (tokens, d_model).
            real: (tokens,) bool, False for padding, which does not count in the sum; None when all are real.
            keys: what gate dropout's draws depend on; None draws from torch's generator.
        """
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            value = torch.sigmoid(F.linear(x.to(dtype), self.gate.weight.to(dtype), self.gate.bias.to(dtype)))
        rate = self.config.cmr_gate_drop
        if self.training and rate > 0:
            draws = torch.rand_like(value) if keys is None else keys.uniform("cmr", 1, value.dtype)
            value = value.masked_fill(draws < rate, 0)
            if self.config.cmr_gate_drop_mode == "inverted":
                value = value / (1 - rate)
        if real is None:
            total, count = value.sum(), torch.tensor(len(value), device=x.device)
        else:
            total, count = value[real].sum(), real.sum()
        if self.parallel is not None:
            total, count = self.parallel.sum(total, count)
        return ConditionalGates(value, total, count)

    def forward(self, x: Tensor, experts_output: Tensor, gates: ConditionalGates) -> Tensor:
        """Mix the shared network's output with the experts': (tokens, d_model), the type of `experts_output`."""
        return self.mix(self.shared(x), experts_output, gates)

    def mix(self, shared: Tensor, experts_output: Tensor, gates: ConditionalGates) -> Tensor:
        """`forward` with the shared network's output at hand."""
        return (shared + gates.value * (experts_output - shared)).to(experts_output.dtype)
