"""Banks of feed-forward networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtmoe import kernels
from mtmoe.moe.config import MoEConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}
"""Name of an activation -> function; ``relu`` is the field's default for translation."""


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """Find an activation by name.

    Raises:
        ValueError: the name is unknown; the text lists the known ones.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is unknown; choose one of: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class ExpertBank(nn.Module):
    """Networks ``w_out · activation(w_in · x + b_in) + b_out``, their weights stacked.

    Args:
        config: of the layer.
        backend: forces an implementation, as in `MoELayer`.
        local: numbers of the experts that this process holds; None for all `num_experts`. Otherwise the parameters
            have the attributes ``expert = True``, by which a trainer tells them from replicated ones, and
            ``local_experts``, these numbers.
    """

    def __init__(self, config: MoEConfig, backend: str | None = None, local: range | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.local = range(config.num_experts) if local is None else local
        activation_of(config.activation)  # an unknown name is refused here, not in the middle of training
        experts, d_model, d_ffn = len(self.local), config.d_model, config.d_ffn
        self.w_in = nn.Parameter(torch.empty(experts, d_ffn, d_model))
        self.b_in = nn.Parameter(torch.empty(experts, d_ffn))
        self.w_out = nn.Parameter(torch.empty(experts, d_model, d_ffn))
        self.b_out = nn.Parameter(torch.empty(experts, d_model))
        self.reset_parameters()
        if len(self.local) < config.num_experts:
            for parameter in self.parameters():
                parameter.expert, parameter.local_experts = True, self.local  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Draw each expert as torch's Linear is drawn, with the standard deviation times sqrt(init_scale).

        An expert gets the same weights whatever process holds it, and what is drawn afterwards stays the same too.
        """
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            bound = 1 / math.sqrt(weight.shape[2])
            scaled = bound * math.sqrt(self.config.init_scale)
            self._draw(weight, scaled)
            self._draw(bias, bound)

    @torch.no_grad()
    def _draw(self, stacked: Tensor, bound: float) -> None:
        if len(self.local) == self.config.num_experts:
            stacked.uniform_(-bound, bound)
            return
        other = torch.empty_like(stacked[0])
        for expert in range(self.config.num_experts):
            mine = expert in self.local
            (stacked[expert - self.local.start] if mine else other).uniform_(-bound, bound)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # What is saved holds all experts; a process takes its own.
        state_dict.update(self.take_local(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def take_local(self, values: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Those of the stacked weights in `values` that hold all experts, cut to the experts of this process."""
        names = [prefix + name for name, _ in self.named_parameters()]
        whole = {name: values[name] for name in names if name in values}
        return {
            name: value[self.local.start : self.local.stop]
            for name, value in whole.items()
            if len(value) == self.config.num_experts > len(self.local)
        }

    def forward(self, x: Tensor, plan: kernels.DispatchPlan) -> Tensor:
        """Run each group of rows through its expert.

        Args:
            x: (routed, d_model), grouped by expert.
            plan: tells whose rows are whose.

        Returns:
            (routed, d_model), dropout included in training.
        """
        # (routed, d_ffn)
        hidden = kernels.grouped_linear(x, plan, self.w_in, self.b_in, self.config.activation, backend=self.backend)
        hidden = kernels.dropout(hidden, self.config.activation_dropout, self.training)
        y = kernels.grouped_linear(hidden, plan, self.w_out, self.b_out, backend=self.backend)
        return kernels.dropout(y, self.config.dropout, self.training)
