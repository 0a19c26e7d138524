"""The choice ``--attention-init aligned``: attention starts where a drawn one only gets after thousands of updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mtmoe.errors import ConfigError
from mtmoe.training.initialisation import copying_projections, position_columns, positional_projections

ATTENTION_INITS = ("drawn", "aligned")

# The source has its tag in front: what the decoder writes next to position i stands at i + 1 in a copy.
CROSS_OFFSETS = (1, 1, 0, 2)

CROSS_GAIN = 2.0
"""Half of the attention is then within one position of its offset; it is weak enough to be unlearned."""


def align_attention(model: nn.Module, cfg: Any) -> None:
    """Let the decoder's attention over the encoder's output look at, and pass on, the words in their order.

    The columns of the embeddings that positions are read from start at zero, so that words do not disturb it. All of it
    is only where training starts: no parameter is added or frozen.

    Args:
        model: with ``encoder`` and ``decoder``, as fairseq's constructor has drawn it.
        cfg: a MtmoeTransformerConfig.

    Raises:
        ConfigError: the option is unknown, or the model has no attention over the source, or its positions are not
            fairseq's sinusoids.
    """
    if cfg.attention_init not in ATTENTION_INITS:
        raise ConfigError(f"attention_init={cfg.attention_init!r} must be one of: {', '.join(ATTENTION_INITS)}")
    if cfg.attention_init == "drawn":
        return
    if cfg.no_token_positional_embeddings or cfg.encoder.learned_pos or cfg.decoder.learned_pos:
        raise ConfigError("attention_init=aligned needs sinusoidal positions on both sides; use attention_init=drawn")
    if cfg.no_cross_attention:
        raise ConfigError("attention_init=aligned needs attention over the source; unset no_cross_attention")
    with torch.no_grad():
        for layer in model.decoder.layers:
            attention = layer.encoder_attn
            query, key = positional_projections(attention.embed_dim, attention.num_heads, CROSS_OFFSETS, CROSS_GAIN)
            attention.q_proj.weight.add_(query)
            attention.k_proj.weight.add_(key)
            value, output = copying_projections(attention.embed_dim, 1.0)
            attention.v_proj.weight.copy_(value)
            attention.out_proj.weight.copy_(output)
        columns = torch.cat(position_columns(attention.embed_dim, attention.num_heads))
        for embedding in {model.encoder.embed_tokens, model.decoder.embed_tokens}:
            embedding.weight[:, columns] = 0
