"""Watch a model's gates while it reads text with its translations given, and sum up what they choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mtmoe.inference.model import MoEFeedForward, Transformer
from mtmoe.inference.translator import Translator, batches_by_tokens, pad
from mtmoe.inference.vocabulary import PADDING
from mtmoe.moe.conditional import ConditionalGates
from mtmoe.moe.routing import RoutingDecision
from mtmoe.routing_table import ANY, SIDES, LayerRouting, RoutingTable

CHUNK = 10_000
"""Segments that are held as ids at once, to be sorted by length; the text may be longer than memory."""

ParallelText = tuple[str, Sequence[str], Sequence[str]]
"""A direction as ``en-de``, its sources, and their translations in the same order."""


def collect_routing(
    translator: Translator,
    texts: Iterable[ParallelText],
    directions: Sequence[str],
    *,
    by_language: bool = False,
    model: str | None = None,
    max_tokens: int = 4096,
    progress: Callable[[int], object] | None = None,
) -> RoutingTable:
    """Count which experts the tokens of a text choose, translations given (teacher forcing).

    Segments of all directions share batches, so that many small directions cost no more than a large one. Segments
    that are too long for the model are cut; empty ones are left out.

    Args:
        translator: the model.
        texts: read once, one direction at a time.
        directions: all that `texts` may name; the rows of the table, unless `by_language`.
        by_language: count by source language in the encoder and by target language in the decoder, in rows ``de-*`` and
            ``*-de``. The table grows with the languages then and not with their square: 40,602 directions among 202
            languages over 12 layers of 128 experts take 25 MB instead of 2.5 GB.
        model: what identifies the model in the table.
        max_tokens: source or target tokens of a batch, padding included.
        progress: told of how many more segments are done.

    Raises:
        UnknownLanguage: a direction's language is not the model's.
        ValueError: a direction of `texts` is not in `directions`, or the model has no MoE layer.
    """
    rows, labels = _rows(directions, by_language)
    collector = RoutingCollector(translator.model, len(labels))
    device = next(translator.model.parameters()).device
    sentences = [0] * len(labels)
    encoded = _encode(translator, texts, rows)
    while chunk := list(islice(encoded, CHUNK)):
        lengths = [max(len(one.source), len(one.target)) for one in chunk]
        for batch in batches_by_tokens(lengths, range(len(chunk)), max_tokens):
            segments = [chunk[index] for index in batch]
            collector.read(
                pad([one.source for one in segments], device),
                pad([one.target for one in segments], device),
                torch.tensor([one.rows for one in segments], device=device),
            )
            for one in segments:
                for row in set(one.rows):
                    sentences[row] += 1
            if progress:
                progress(len(batch))
    return RoutingTable(labels, tuple(sentences), collector.layers(), model)


def _rows(directions: Sequence[str], by_language: bool) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Direction -> its rows for encoder and decoder layers; and the names of the rows."""
    if not by_language:
        return {direction: (row, row) for row, direction in enumerate(directions)}, tuple(directions)
    names = {}
    for direction in directions:
        source, _, target = direction.partition("-")
        names[direction] = (f"{source}-{ANY}", f"{ANY}-{target}")
    labels = tuple(dict.fromkeys(name for place in (0, 1) for name in sorted(pair[place] for pair in names.values())))
    number = {label: row for row, label in enumerate(labels)}
    return {direction: (number[source], number[target]) for direction, (source, target) in names.items()}, labels


@dataclass(frozen=True, slots=True)
class _Segment:
    """One segment as the model reads it."""

    rows: tuple[int, int]
    """Of its direction, for encoder and decoder layers."""
    source: list[int]
    """With tag and end symbol."""
    target: list[int]
    """The decoder's input: the tag, then the pieces."""


def _encode(
    translator: Translator, texts: Iterable[ParallelText], rows: dict[str, tuple[int, int]]
) -> Iterator[_Segment]:
    vocabulary, config = translator.vocabulary, translator.model.config
    for direction, sources, targets in texts:
        if direction not in rows:
            raise ValueError(f"direction {direction} is not one of those to count: {', '.join(rows)}")
        source, target = (translator.resolve(language) for language in direction.split("-"))
        tagged = source if translator.language_set.encoder_langtok == "src" else target
        prefix = translator.decoder_prefix(target)
        for source_text, target_text in zip(sources, targets, strict=True):
            source_ids = vocabulary.encode(source_text)[: config.max_source_positions - 2]
            target_ids = vocabulary.encode(target_text)[: config.max_target_positions - len(prefix)]
            if source_ids and target_ids:
                framed = vocabulary.frame(source_ids, tagged)
                yield _Segment(rows[direction], framed, [*prefix, *target_ids])


class RoutingCollector:
    """Sums over all that a model has read.

    Args:
        model: with at least one MoE layer; it is not changed.
        rows: of the table.

    Raises:
        ValueError: no layer of the model is MoE.
    """

    def __init__(self, model: Transformer, rows: int) -> None:
        self.model = model
        self._sums = [
            _LayerSums(side, number, layer.feed_forward, rows)
            for side in SIDES
            for number, layer in enumerate(getattr(model, side).layers)
            if isinstance(layer.feed_forward, MoEFeedForward)
        ]
        if not self._sums:
            raise ValueError("the model is dense: there is no routing to count")

    def read(self, source: Tensor, target_input: Tensor, rows: Tensor) -> None:
        """Run the model over one batch and add up its gates.

        Args:
            source: (batch, source) int64 with tag and end symbol, padding on the right.
            target_input: (batch, target) int64, beginning with the start token, padding on the right.
            rows: (batch, 2) int64, the rows that each segment belongs to in encoder and decoder layers.
        """
        both = zip(SIDES, (source, target_input), rows.unbind(1), strict=True)
        tokens = {side: _Tokens.of(ids, row) for side, ids, row in both}
        with torch.inference_mode(), self._watching(tokens):
            memory, mask = self.model.encoder(source)
            self.model.decoder.hidden(target_input, memory, mask)

    @contextmanager
    def _watching(self, tokens: dict[str, _Tokens]) -> Iterator[None]:
        handles = [handle for sums in self._sums for handle in sums.watch(tokens[sums.side])]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def layers(self) -> tuple[LayerRouting, ...]:
        """What was summed up so far."""
        return tuple(sums.result() for sums in self._sums)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of one side of a batch, flattened as a MoE layer sees them."""

    real: Tensor
    """(tokens,) bool, False for padding."""
    row: Tensor
    """(real tokens,) int64: the row of each."""

    @classmethod
    def of(cls, ids: Tensor, rows: Tensor) -> _Tokens:
        real = ids.ne(PADDING)
        return cls(real.flatten(), rows[:, None].expand_as(ids)[real])


class _LayerSums:
    """Running sums of one layer. Everything is an index_add over tokens: nothing grows with the text."""

    def __init__(self, side: str, number: int, feed_forward: MoEFeedForward, rows: int) -> None:
        self.side, self.number, self.moe = side, number, feed_forward.moe
        experts, device = self.moe.config.num_experts, next(feed_forward.parameters()).device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        # (first or second choice, rows, experts)
        self.chosen = torch.zeros(2, rows, experts, dtype=torch.int64, device=device)
        # fp64: a sum of a million probabilities in fp32 loses all but three digits of a small one.
        self.confidence = torch.zeros(2, rows, experts, dtype=torch.float64, device=device)
        self.probability = torch.zeros(rows, experts, dtype=torch.float64, device=device)
        conditional = self.moe.conditional is not None
        self.cmr_gate = torch.zeros(rows, dtype=torch.float64, device=device) if conditional else None

    def watch(self, tokens: _Tokens) -> list[Any]:
        """Hook into the layer for one batch; returns the handles of the hooks."""
        handles = [self.moe.gate.register_forward_hook(lambda _, inputs, decision: self._add(decision, tokens))]
        if self.moe.conditional is not None:
            # ConditionalRouting.forward(x, experts_output, gates)
            handles.append(
                self.moe.conditional.register_forward_hook(lambda _, inputs, y: self._add_gates(inputs[2], tokens))
            )
        return handles

    def _add(self, decision: RoutingDecision, tokens: _Tokens) -> None:
        row, experts = tokens.row, self.probability.shape[1]
        index, probs = decision.expert_index[tokens.real], decision.gate_probs[tokens.real].double()
        self.tokens.index_add_(0, row, torch.ones_like(row))
        self.probability.index_add_(0, row, probs)
        for place in range(min(2, index.shape[1])):
            kept = index[:, place] >= 0  # a policy may do without the second choice
            expert = index[kept, place]
            cell = row[kept] * experts + expert
            self.chosen[place].view(-1).index_add_(0, cell, torch.ones_like(cell))
            self.confidence[place].view(-1).index_add_(0, cell, probs[kept].gather(1, expert[:, None]).flatten())

    def _add_gates(self, gates: ConditionalGates, tokens: _Tokens) -> None:
        assert self.cmr_gate is not None
        self.cmr_gate.index_add_(0, tokens.row, gates.value.flatten()[tokens.real].double())

    def result(self) -> LayerRouting:
        """The sums as the table holds them."""
        return LayerRouting(
            self.side,
            self.number,
            tokens=self.tokens.cpu().numpy(),
            first=self.chosen[0].cpu().numpy(),
            second=self.chosen[1].cpu().numpy(),
            first_probability=self.confidence[0].cpu().numpy(),
            second_probability=self.confidence[1].cpu().numpy(),
            probability=self.probability.cpu().numpy(),
            cmr_gate=None if self.cmr_gate is None else self.cmr_gate.cpu().numpy(),
        )
