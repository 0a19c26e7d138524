"""Floating-point operations of a training step, by part: matrix products, 2 for each multiply-add."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mtmoe.planning.model import SIDES, ModelShape

BACKWARD = 2
"""Backward over forward: each product has one gradient for its input and one for its weight."""


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one pass, by part."""

    attention: float
    """Projections and scores."""
    dense: float
    """Dense feed-forward sublayers."""
    gates: float
    """Of MoE layers, those of CMR included."""
    shared: float
    """Shared networks of CMR."""
    experts: float
    """Of the experts that tokens are sent to."""
    output: float
    """The projection to the vocabulary."""

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def layers(self) -> float:
        """What activation recomputation does again: all but the output layer."""
        return self.total - self.output


def forward_flops(model: ModelShape, source: float, target: float, length: float) -> Flops:
    """FLOPs of a forward pass.

    Args:
        model: its shape.
        source: real tokens on the source side.
        target: real tokens on the target side.
        length: tokens of a sentence on either side. Causal attention computes all scores and masks some.
    """
    d_model = model.d_model
    tokens = {"encoder": source, "decoder": target}
    projections, scores = 8 * d_model**2, 4 * length * d_model
    attention = source * model.encoder_layers * (projections + scores)
    # Cross-attention: queries and output of targets, keys and values of sources.
    attention += model.decoder_layers * (
        target * (projections + scores) + target * (projections / 2 + scores) + source * projections / 2
    )
    dense = gates = shared = experts = 0.0
    for side in SIDES:
        moe_layers = model.moe_layers(side)
        dense += tokens[side] * (model.layers(side) - moe_layers) * 4 * d_model * model.d_ffn(side)
        gates += tokens[side] * moe_layers * (_gate(model) + 2 * d_model * model.cmr)
        shared += tokens[side] * moe_layers * 4 * d_model * model.shared_d_ffn(side)
        experts += tokens[side] * moe_layers * model.routed_a_token * 4 * d_model * model.expert_d_ffn(side)
    output = target * 2 * d_model * model.vocabulary_size
    return Flops(attention, dense, gates, shared, experts, output)


def _gate(model: ModelShape) -> float:
    if model.gate == "topk":
        return 2 * model.d_model * model.num_experts
    return 2 * model.cosine_gate_dim * (model.d_model + model.num_experts)
