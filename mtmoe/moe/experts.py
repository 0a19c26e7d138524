"""Banks of feed-forward networks."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    """`num_experts` networks ``w_out · activation(w_in · x + b_in) + b_out``, their weights stacked."""

    def __init__(self, config: MoEConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        activation_of(config.activation)  # an unknown name is refused here, not in the middle of training
        experts, d_model, d_ffn = config.num_experts, config.d_model, config.d_ffn
        self.w_in = nn.Parameter(torch.empty(experts, d_ffn, d_model))
        self.b_in = nn.Parameter(torch.empty(experts, d_ffn))
        self.w_out = nn.Parameter(torch.empty(experts, d_model, d_ffn))
        self.b_out = nn.Parameter(torch.empty(experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert as torch's Linear is drawn, with the standard deviation times sqrt(init_scale)."""
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            bound = 1 / math.sqrt(weight.shape[2])
            scaled = bound * math.sqrt(self.config.init_scale)
            nn.init.uniform_(weight, -scaled, scaled)
            nn.init.uniform_(bias, -bound, bound)

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
