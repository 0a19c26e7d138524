"""The cosine gate of MoEC: a token goes to the expert whose direction is nearest to its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtmoe.kernels.gating import ExpertChoice
from mtmoe.moe.config import MoEConfig
from mtmoe.moe.gates.topk import TopKGate
from mtmoe.parallel import ExpertParallel

TEMPERATURE = 0.07
"""Of the probabilities, fixed, and where the learnt one of the weights starts (Xie et al. 2022)."""

SMALLEST_NORM = 1e-6
"""A shorter vector has no direction; dividing by less would only blow its gradient up."""


class CosineGate(TopKGate):
    """Send each token to the expert with the greatest cosine ``s_e = cos(projection x, weight_e)``.

    The weight of its output is ``alpha = sigmoid(s_e / t)`` with a learnt temperature ``t``. The paper writes the
    layer, its residual connection included, as ``y = alpha FFN_e(x) + (1 - alpha) x``; with ``FFN_e(x) = x + f_e(norm
    x)``, as in its release, that is ``x + alpha f_e(norm x)``: the experts' output times alpha, before the residual
    connection that the caller adds. A token without a slot passes unchanged. The probabilities of the losses are
    ``softmax(s / 0.07)``; the constant that the release adds to an expert's share has no gradient and is left out.

    Source: Xie et al. 2022 (MoEC), after Chi et al. 2022 (X-MoE).
    """

    def __init__(self, config: MoEConfig, backend: str | None = None, parallel: ExpertParallel | None = None) -> None:
        super().__init__(config, backend, parallel, width=config.cosine_gate_dim)
        nn.init.orthogonal_(self.weight, gain=0.1)
        bound = 1 / math.sqrt(config.d_model)
        self.projection = nn.Parameter(torch.empty(config.cosine_gate_dim, config.d_model).uniform_(-bound, bound))
        # The logarithm: a step of AdamW is as long as 0.07 after some dozens of updates, and must not change the sign.
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(TEMPERATURE)))

    def scores(self, x: Tensor, weight: Tensor) -> Tensor:
        """Cosines over the fixed temperature: (tokens, d_model), (experts, width) -> (tokens, experts)."""
        direction = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1, eps=SMALLEST_NORM)
        return F.linear(direction, F.normalize(weight, dim=-1, eps=SMALLEST_NORM)) / TEMPERATURE

    def weights(self, gate_logits: Tensor, choice: ExpertChoice) -> Tensor:
        """(tokens, 1): alpha of the chosen expert, 0 for padding."""
        cosine = gate_logits.gather(1, choice.expert_index.clamp(min=0)) * TEMPERATURE
        alpha = torch.sigmoid(cosine / self.log_temperature.to(cosine.dtype).exp())
        return alpha.masked_fill(choice.expert_index < 0, 0)
