"""The shape of a model as far as its size and cost depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from mtmoe.errors import ConfigError

SIDES = ("encoder", "decoder")

WIDEST = 1 << 20
"""Largest width, number of experts or layers that is taken for meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """An encoder–decoder Transformer with MoE layers; both sides share width, experts and top_k."""

    name: str = "model"
    """How tables call it."""
    vocabulary_size: int
    """Rows of the embedding."""
    d_model: int = 512
    """Width of a token."""
    encoder_layers: int = 6
    """Layers of the encoder."""
    decoder_layers: int = 6
    """Layers of the decoder."""
    encoder_heads: int = 8
    """Attention heads of an encoder layer."""
    decoder_heads: int = 8
    """Attention heads of a decoder layer."""
    encoder_d_ffn: int = 2048
    """Width inside a dense feed-forward sublayer of the encoder."""
    decoder_d_ffn: int = 2048
    """As encoder_d_ffn, for the decoder."""
    encoder_expert_d_ffn: int = 2048
    """Width inside an expert of the encoder."""
    decoder_expert_d_ffn: int = 2048
    """As encoder_expert_d_ffn, for the decoder."""
    encoder_moe_freq: int = 2
    """Encoder layer i (from 0) is MoE iff (i + 1) % encoder_moe_freq == 0; 0 makes all dense."""
    decoder_moe_freq: int = 2
    """As encoder_moe_freq, for the decoder."""
    num_experts: int = 8
    """Experts in each MoE layer, over all GPUs."""
    top_k: int = 2
    """Experts that each token uses."""
    gate: str = "topk"
    """topk: one linear map; moec: cosine similarity in cosine_gate_dim."""
    cosine_gate_dim: int = 32
    """Width in which the moec gate compares."""
    cmr: bool = False
    """A shared feed-forward network beside the experts of each MoE layer (Conditional MoE Routing)."""
    cmr_d_ffn: int = 0
    """Width inside it; 0 takes the expert's."""
    capacity_factor: float = 0.0
    """Above 0, at most this x an even share of the choices is routed; 0 drops no token."""
    eom: float = 0.0
    """Share of (token, expert) pairs that Expert Output Masking leaves out of dispatch in training."""
    share_all_embeddings: bool = True
    """Encoder, decoder and output use one matrix."""
    share_decoder_input_output_embed: bool = True
    """Decoder input and output use one matrix."""
    encoder_learned_positions: bool = False
    """Positions of the encoder are weights."""
    decoder_learned_positions: bool = False
    """As encoder_learned_positions, for the decoder."""
    max_source_positions: int = 1024
    """Longest source; counts only with learned positions."""
    max_target_positions: int = 1024
    """As max_source_positions, for targets."""
    encoder_pre_norm: bool = True
    """A layer norm after the last layer of the encoder, since norms stand before sublayers."""
    decoder_pre_norm: bool = True
    """As encoder_pre_norm, for the decoder."""
    layernorm_embedding: bool = False
    """A layer norm on embedding plus position."""

    def __post_init__(self) -> None:
        for name in (
            "vocabulary_size", "d_model", "encoder_layers", "decoder_layers", "encoder_heads", "decoder_heads",
            "encoder_d_ffn", "decoder_d_ffn", "encoder_expert_d_ffn", "decoder_expert_d_ffn", "num_experts", "top_k",
            "cosine_gate_dim", "max_source_positions", "max_target_positions",
        ):  # fmt: skip
            most = 1 << 24 if name == "vocabulary_size" else WIDEST
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 1 and {most:,}")
        for name in ("encoder_moe_freq", "decoder_moe_freq", "cmr_d_ffn", "capacity_factor"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")
        if self.gate not in ("topk", "moec"):
            raise ConfigError(f"gate={self.gate!r} is unknown; choose one of: topk, moec")
        if not 0 <= self.eom < 1:
            raise ConfigError(f"eom={self.eom} must be at least 0 and below 1")
        for side in SIDES:
            heads = getattr(self, f"{side}_heads")
            if self.d_model % heads:
                raise ConfigError(f"{side}_heads={heads} must divide d_model={self.d_model}")

    def layers(self, side: str) -> int:
        """Layers of a side, ``encoder`` or ``decoder``."""
        return int(getattr(self, f"{side}_layers"))

    def moe_layers(self, side: str) -> int:
        """MoE layers of a side."""
        frequency = int(getattr(self, f"{side}_moe_freq"))
        return self.layers(side) // frequency if frequency else 0

    def d_ffn(self, side: str) -> int:
        """Width inside a dense feed-forward sublayer of a side."""
        return int(getattr(self, f"{side}_d_ffn"))

    def expert_d_ffn(self, side: str) -> int:
        """Width inside an expert of a side."""
        return int(getattr(self, f"{side}_expert_d_ffn"))

    def shared_d_ffn(self, side: str) -> int:
        """Width inside the shared network of CMR; 0 without CMR."""
        return (self.cmr_d_ffn or self.expert_d_ffn(side)) if self.cmr else 0

    @property
    def routed_a_token(self) -> float:
        """Choices of a token that reach an expert in training: top_k, less what capacity and EOM leave out.

        Tokens are taken to spread evenly, so that capacity drops nothing unless its factor is below 1.
        """
        return self.top_k * (1 - self.eom) * (min(1.0, self.capacity_factor) if self.capacity_factor else 1.0)
