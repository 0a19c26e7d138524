"""How many parameters a model has, by part: exactly those of `mtmoe_transformer` and of the portable model."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mtmoe.planning.model import SIDES, ModelShape

PADDING_ROWS = 2
"""fairseq numbers learned positions from padding_idx + 1 = 2."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters by part; an expert-parallel group splits `experts` and holds the rest on each GPU."""

    embeddings: int
    """Token and learned position embeddings, and an output layer of its own."""
    attention: int
    """Self- and cross-attention."""
    dense: int
    """Dense feed-forward sublayers."""
    norms: int
    """Layer norms."""
    gates: int
    """Of MoE layers, those of CMR included."""
    shared: int
    """Shared networks of CMR."""
    experts: int
    """All experts of all MoE layers."""
    active: int
    """Of all parts, what one token in the encoder and one in the decoder pass: all but the experts not chosen."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "active")

    @property
    def replicated(self) -> int:
        """All but the experts."""
        return self.total - self.experts


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear map with bias."""
    return inputs * outputs + outputs


def feed_forward(d_model: int, d_ffn: int) -> int:
    """Parameters of two linear maps with biases: of one expert, too."""
    return linear(d_model, d_ffn) + linear(d_ffn, d_model)


def count_parameters(model: ModelShape) -> Parameters:
    """Count the parameters of a model by part; shared matrices count once."""
    d_model = model.d_model
    matrices = 1 + (not model.share_all_embeddings)
    matrices += not (model.share_all_embeddings or model.share_decoder_input_output_embed)
    embeddings = matrices * model.vocabulary_size * d_model
    for side, longest in (("encoder", model.max_source_positions), ("decoder", model.max_target_positions)):
        if getattr(model, f"{side}_learned_positions"):
            embeddings += (longest + PADDING_ROWS) * d_model
    attentions = model.encoder_layers + 2 * model.decoder_layers
    norms = attentions + sum(model.layers(side) for side in SIDES)  # one before each sublayer
    norms += model.encoder_pre_norm + model.decoder_pre_norm + 2 * model.layernorm_embedding
    dense = gates = shared = experts = active = 0
    for side in SIDES:
        moe_layers, expert = model.moe_layers(side), feed_forward(d_model, model.expert_d_ffn(side))
        dense += (model.layers(side) - moe_layers) * feed_forward(d_model, model.d_ffn(side))
        gates += moe_layers * (_gate(model) + (linear(d_model, 1) if model.cmr else 0))
        shared += moe_layers * (feed_forward(d_model, model.shared_d_ffn(side)) if model.cmr else 0)
        experts += moe_layers * model.num_experts * expert
        active += moe_layers * model.top_k * expert
    parts = (embeddings, attentions * 4 * linear(d_model, d_model), dense, norms * 2 * d_model, gates, shared)
    return Parameters(*parts, experts, active=sum(parts) + active)


def _gate(model: ModelShape) -> int:
    if model.gate == "topk":
        return model.num_experts * model.d_model
    # Directions of the experts, the projection, the temperature.
    return model.cosine_gate_dim * (model.num_experts + model.d_model) + 1
