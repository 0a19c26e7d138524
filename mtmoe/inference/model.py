"""The encoder–decoder Transformer for inference: equal to fairseq's, laid out for decoding.

Shapes: a batch of sentences, `width` hypotheses a sentence. The decoder's cache keeps the keys of *all* hypotheses of a
sentence side by side, and a mask tells which of them lie in a hypothesis' own past. So beam search never reorders
the cache, and the hypotheses of a sentence share one copy of the source's keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.inference.positions import number_positions, sinusoidal_positions
from mtmoe.inference.vocabulary import PADDING
from mtmoe.moe import MoEConfig, MoELayer, MoEOutput

CACHE_BLOCK = 64
"""Keys by which a cache grows at least; doubling beyond that keeps copying linear."""


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu}


class Cache:
    """Keys and values of decoder self-attention for all layers, in a buffer that grows by doubling."""

    def __init__(self, layers: int, batch: int, heads: int, d_head: int, like: Tensor) -> None:
        # (layers, keys or values, batch, heads, capacity, d_head)
        self.buffer = like.new_empty(layers, 2, batch, heads, CACHE_BLOCK, d_head)
        self.length = 0

    def reserve(self, more: int) -> None:
        """Make room for `more` keys a sentence."""
        capacity = self.buffer.shape[4]
        if self.length + more > capacity:
            grown = max(2 * capacity, self.length + more)
            old = self.buffer
            self.buffer = old.new_empty(*old.shape[:4], grown, old.shape[5])
            self.buffer[:, :, :, :, : self.length] = old[:, :, :, :, : self.length]

    def keep(self, sentences: Tensor) -> None:
        """Keep only these rows of the batch.

        Args:
            sentences: (kept,) int64.
        """
        old = self.buffer
        self.buffer = old.new_empty(*old.shape[:2], len(sentences), *old.shape[3:])
        self.buffer[:, :, :, :, : self.length] = old[:, :, :, :, : self.length].index_select(2, sentences)


@dataclass(slots=True)
class DecoderState:
    """What decoding has to remember between two steps."""

    memory: list[tuple[Tensor, Tensor]]
    """For each layer keys and values of the source, (batch, heads, source, d_head)."""
    memory_mask: Tensor | None
    """(batch, 1, 1, source) bool, True at real tokens; None when nothing is padding."""
    cache: Cache
    steps: int = 0
    """Tokens that each hypothesis has so far."""

    def keep(self, sentences: Tensor) -> None:
        """Keep only these sentences of the batch.

        Args:
            sentences: (kept,) int64.
        """
        self.memory = [(keys[sentences], values[sentences]) for keys, values in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask[sentences]
        self.cache.keep(sentences)


class Transformer(nn.Module):
    """A trained model. It has no dropout and is always in evaluation mode."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.share_all_embeddings:
            self.decoder.embed.tokens.weight = self.encoder.embed.tokens.weight
        if config.share_decoder_input_output_embed:
            self.decoder.output.weight = self.decoder.embed.tokens.weight
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_tensors(
        cls, config: TransformerConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Transformer:
        """Build the model with the weights of a checkpoint or a model folder.

        Args:
            config: its shape.
            tensors: fairseq's names, as `mtmoe.checkpoint.stored.expected_shapes` lists them.
            dtype: to convert to.
        """
        with torch.device("meta"):  # no random initial weights: at a real size they take longer than the loading
            model = cls(config)
        _, unknown = model.load_state_dict(_our_names(tensors, dtype), strict=False, assign=True)
        # assign=True unties what was tied, and leaves on the meta device what it did not find.
        if config.share_all_embeddings:
            model.decoder.embed.tokens.weight = model.encoder.embed.tokens.weight
        if config.share_decoder_input_output_embed:
            model.decoder.output.weight = model.decoder.embed.tokens.weight
        unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if unset or unknown:
            raise ValueError(f"the weights do not fit the model: missing {unset}, unknown {unknown}")
        return model.requires_grad_(False).eval()

    def forward(self, source: Tensor, target_input: Tensor) -> Tensor:
        """Logits of all positions at once, for given targets.

        Args:
            source: (batch, source) int64 with tag and end symbol, padding on either side.
            target_input: (batch, target) int64, beginning with the start token, padding on the right.

        Returns:
            (batch, target, vocabulary_size).
        """
        memory, mask = self.encoder(source)
        logits: Tensor = self.decoder(target_input, memory, mask)
        return logits

    def start(self, source: Tensor) -> DecoderState:
        """Encode the source and prepare for `step`.

        Args:
            source: (batch, source) int64 with tag and end symbol, padding on either side.
        """
        memory, mask = self.encoder(source)
        return self.decoder.start(memory, mask)

    def step(self, tokens: Tensor, state: DecoderState, visible: Tensor | None) -> Tensor:
        """Logits of the next token of each hypothesis.

        Args:
            tokens: (batch, width) int64: the last token of each hypothesis.
            state: changed: it remembers the tokens.
            visible: (batch, width, keys) bool: which cached keys, these tokens' own (the last `width`) included, lie in
                the past of a hypothesis; None when all do.

        Returns:
            (batch, width, vocabulary_size).
        """
        return self.decoder.step(tokens, state, visible)


class Embedding(nn.Module):
    """Token plus position, as a layer's input."""

    def __init__(self, config: TransformerConfig, side: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary_size, config.d_model)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.learned = getattr(config, f"{side}_learned_positions")
        self.longest = getattr(config, "max_source_positions" if side == "encoder" else "max_target_positions")
        self.positions = nn.Embedding(self.longest + PADDING + 1, config.d_model) if self.learned else None
        self.norm = nn.LayerNorm(config.d_model) if config.layernorm_embedding else None
        self.sinusoids: Tensor | None = None

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed.

        Args:
            tokens: (…) int64.
            positions: (…) int64, or broadcastable to it, numbered as fairseq does.

        Returns:
            (…, d_model).
        """
        x = F.embedding(tokens, self.tokens.weight) * self.scale
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions.weight)
        else:
            x = x + F.embedding(positions, self._sinusoids(int(positions.max()) + 1, x))
        return _normed(x, self.norm)

    def _sinusoids(self, rows: int, like: Tensor) -> Tensor:
        table = self.sinusoids
        if table is None or len(table) < rows or table.dtype != like.dtype or table.device != like.device:
            table = sinusoidal_positions(max(rows, 256, 2 * rows), like.shape[-1]).to(like)
            self.sinusoids = table
        return table


class Attention(nn.Module):
    """The output projection and heads that self- and cross-attention have in common."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.out = nn.Linear(d_model, d_model)

    def split(self, x: Tensor) -> Tensor:
        """Give each head its part: (batch, length, d_model) -> (batch, heads, length, d_head)."""
        batch, length, d_model = x.shape
        return x.view(batch, length, self.heads, d_model // self.heads).transpose(1, 2)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """Mix the values: (batch, heads, length, d_head) in, (batch, length, d_model) out."""
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return output


class SelfAttention(Attention):
    """Queries, keys and values of one sequence, from one matrix product."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads)
        self.qkv = nn.Linear(d_model, 3 * d_model)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, length, d_model) -> queries, keys and values, (batch, heads, length, d_head) each."""
        queries, keys, values = self.qkv(x).chunk(3, dim=-1)
        return self.split(queries), self.split(keys), self.split(values)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """(batch, length, d_model) -> the same shape; `mask` is True where a query may look."""
        return self.attend(*self.project(x), mask, causal)


class CrossAttention(Attention):
    """Queries of the target over keys and values of the source."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads)
        self.q = nn.Linear(d_model, d_model)
        self.kv = nn.Linear(d_model, 2 * d_model)

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output; once a batch."""
        keys, values = self.kv(memory).chunk(2, dim=-1)
        return self.split(keys).contiguous(), self.split(values).contiguous()

    def forward(self, x: Tensor, remembered: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(batch, length, d_model) -> the same shape."""
        return self.attend(self.split(self.q(x)), *remembered, mask)


class DenseFeedForward(nn.Module):
    """Two matrices with an activation between them."""

    def __init__(self, d_model: int, d_ffn: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ffn)
        self.fc2 = nn.Linear(d_ffn, d_model)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """(…, d_model) -> the same shape; padding needs no care here."""
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class MoEFeedForward(nn.Module):
    """A MoE layer in the place of the dense one."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.moe = MoELayer(config)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """(…, d_model) -> the same shape; `padding` (…) bool is True at tokens that no expert shall see."""
        output: MoEOutput = self.moe(x, padding)
        return output.y


class Sublayers(nn.Module):
    """A layer's residual connections and norms, before or after each sublayer."""

    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm

    def around(self, norm: nn.LayerNorm, sublayer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One sublayer with its norm and residual connection."""
        if self.pre_norm:
            return x + sublayer(norm(x))
        return _normed(x + sublayer(x), norm)


class EncoderLayer(Sublayers):
    """Self-attention, feed-forward."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config.encoder_pre_norm)
        self.self_attention = SelfAttention(config.d_model, config.encoder_heads)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = build_feed_forward(config, "encoder", layer)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """(batch, source, d_model) -> the same shape."""
        x = self.around(self.self_attention_norm, lambda x: self.self_attention(x, mask), x)
        return self.around(self.feed_forward_norm, lambda x: self.feed_forward(x, padding), x)


class Encoder(nn.Module):
    """Source tokens to memory."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed = Embedding(config, "encoder")
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.d_model) if config.encoder_pre_norm else None

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode.

        Args:
            source: (batch, source) int64, padding on either side.

        Returns:
            (batch, source, d_model), and (batch, 1, 1, source) bool that is True at real tokens, None if all are.
        """
        real = source.ne(PADDING)
        x = self.embed(source, number_positions(real))
        mask = padding = None
        if not bool(real.all()):
            mask, padding = real[:, None, None], ~real
        for layer in self.layers:
            x = layer(x, mask, padding)
        return _normed(x, self.norm), mask


class DecoderLayer(Sublayers):
    """Self-attention over the past, cross-attention, feed-forward."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config.decoder_pre_norm)
        self.self_attention = SelfAttention(config.d_model, config.decoder_heads)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = CrossAttention(config.d_model, config.decoder_heads)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = build_feed_forward(config, "decoder", layer)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x: Tensor,
        attend_to_past: Callable[[Tensor], Tensor],
        remembered: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """(batch, length, d_model) -> the same shape; the past is all given (training's way) or cached (decoding's)."""
        x = self.around(self.self_attention_norm, attend_to_past, x)
        x = self.around(self.cross_attention_norm, lambda x: self.cross_attention(x, remembered, memory_mask), x)
        return self.around(self.feed_forward_norm, lambda x: self.feed_forward(x, padding), x)


class Decoder(nn.Module):
    """Memory and past tokens to logits."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed = Embedding(config, "decoder")
        layers = [DecoderLayer(config, layer) for layer in range(config.decoder_layers)]
        self.layers: Sequence[DecoderLayer] = cast(Sequence[DecoderLayer], nn.ModuleList(layers))
        self.norm = nn.LayerNorm(config.d_model) if config.decoder_pre_norm else None
        self.output = nn.Linear(config.d_model, config.vocabulary_size, bias=False)

    def forward(self, target_input: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """(batch, target) int64, padding on the right -> (batch, target, vocabulary_size)."""
        return self._logits(self.hidden(target_input, memory, memory_mask))

    def hidden(self, target_input: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """As `forward`, up to the last layer: (batch, target, d_model), without the logits of a large vocabulary."""
        real = target_input.ne(PADDING)
        x: Tensor = self.embed(target_input, number_positions(real))
        for layer in self.layers:

            def attend(x: Tensor, attention: SelfAttention = layer.self_attention) -> Tensor:
                return attention.forward(x, None, causal=True)

            x = layer(x, attend, layer.cross_attention.remember(memory), memory_mask, ~real)
        return x

    def start(self, memory: Tensor, memory_mask: Tensor | None) -> DecoderState:
        """Prepare for `step`: keys and values of the source are computed here, once."""
        heads = self.layers[0].self_attention.heads
        cache = Cache(len(self.layers), len(memory), heads, memory.shape[-1] // heads, memory)
        return DecoderState([layer.cross_attention.remember(memory) for layer in self.layers], memory_mask, cache)

    def step(self, tokens: Tensor, state: DecoderState, visible: Tensor | None) -> Tensor:
        """See `Transformer.step`."""
        width = tokens.shape[1]
        x = self.embed(tokens, tokens.new_tensor([[state.steps + PADDING + 1]]))
        cache = state.cache
        cache.reserve(width)
        begin, end = cache.length, cache.length + width
        mask = None if visible is None else visible[:, None]
        for index, layer in enumerate(self.layers):
            keys, values = cache.buffer[index].unbind(0)

            def attend(
                x: Tensor, attention: SelfAttention = layer.self_attention, keys: Tensor = keys, values: Tensor = values
            ) -> Tensor:
                queries, keys[:, :, begin:end], values[:, :, begin:end] = attention.project(x)
                return attention.attend(queries, keys[:, :, :end], values[:, :, :end], mask)

            x = layer(x, attend, state.memory[index], state.memory_mask, None)
        cache.length, state.steps = end, state.steps + 1
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(_normed(x, self.norm))
        return logits


def _normed(x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    if norm is None:
        return x
    y: Tensor = norm(x)
    return y


def build_feed_forward(config: TransformerConfig, side: str, layer: int) -> nn.Module:
    """The feed-forward sublayer of a layer: MoE where the configuration says so."""
    if config.is_moe(side, layer):
        return MoEFeedForward(config.moe_of(side, layer))
    return DenseFeedForward(config.d_model, getattr(config, f"{side}_d_ffn"), config.activation)


_RENAMED = {
    "self_attn.out_proj": "self_attention.out",
    "self_attn_layer_norm": "self_attention_norm",
    "encoder_attn.out_proj": "cross_attention.out",
    "encoder_attn.q_proj": "cross_attention.q",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "final_layer_norm": "feed_forward_norm",
    "fc1": "feed_forward.fc1",
    "fc2": "feed_forward.fc2",
    "layernorm_embedding": "embed.norm",
    "layer_norm": "norm",
    "embed_tokens": "embed.tokens",
    "embed_positions": "embed.positions",
    "output_projection": "output",
}
"""fairseq's name of a module -> ours."""

FUSED = {
    ("self_attn", ("q_proj", "k_proj", "v_proj")): "self_attention.qkv",
    ("encoder_attn", ("k_proj", "v_proj")): "cross_attention.kv",
}
"""fairseq's matrices that are one of ours, put one below the other."""


def _our_names(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Rename and fuse; each tensor is a copy of its own, so that the file may go."""
    ours: dict[str, Tensor] = {}
    rest = {name: tensor.detach() for name, tensor in tensors.items()}
    for (module, parts), fused in FUSED.items():
        for name in [name for name in rest if f".{module}.{parts[0]}." in name]:
            pieces = [rest.pop(name.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
            ours[name.replace(f"{module}.{parts[0]}", fused)] = torch.cat(pieces).to(dtype)
    for name, tensor in rest.items():
        ours[rename(name)] = tensor.to(dtype, copy=True).contiguous()
    return ours


def rename(name: str) -> str:
    """Our name of a weight that fairseq names so and that is not fused."""
    scope, _, tail = name.partition(".")
    if tail.startswith("layers."):
        _, number, tail = tail.split(".", 2)
        scope = f"{scope}.layers.{number}"
    if tail.startswith("moe."):
        return f"{scope}.feed_forward.{tail}"
    module, _, part = tail.rpartition(".")
    return f"{scope}.{_RENAMED[module]}.{part}"
