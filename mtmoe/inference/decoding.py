"""Greedy and beam search with fairseq's semantics, a batch of sentences at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mtmoe.inference.vocabulary import EOS, PADDING, UNKNOWN


class Decodable(Protocol):
    """What `search` asks of a model; `mtmoe.inference.Transformer` is one."""

    def start(self, source: Tensor) -> Any:
        """Encode (batch, source) and return a state with ``keep(sentences)``."""

    def step(self, tokens: Tensor, state: Any, visible: Tensor | None) -> Tensor:
        """Logits (batch, width, vocabulary) after the last token (batch, width) of each hypothesis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search; the defaults are those of fairseq-generate, but for `beam`."""

    beam: int = 4
    """Hypotheses kept for a sentence; 1 is greedy."""
    length_penalty: float = 1.0
    """A finished hypothesis scores log-probability / length ** length_penalty, its end symbol counted."""
    max_length_a: float = 0.0
    """At most max_length_a x source tokens + max_length_b tokens, the end symbol not counted."""
    max_length_b: int = 200
    """See max_length_a."""
    min_length: int = 1
    """At least so many tokens, the end symbol not counted."""
    unknown_penalty: float = 0.0
    """Taken from the log-probability of the unknown piece; infinity forbids it."""

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ValueError(f"beam={self.beam} must be at least 1")
        if self.min_length < 0:
            raise ValueError(f"min_length={self.min_length} must not be negative")
        if self.max_length_a < 0 or self.max_length_b < 0 or not math.isfinite(self.max_length_a):
            raise ValueError(
                f"max_length_a={self.max_length_a} and max_length_b={self.max_length_b} must not be negative"
            )
        if not math.isfinite(self.length_penalty) or math.isnan(self.unknown_penalty):
            raise ValueError(
                f"length_penalty={self.length_penalty}, unknown_penalty={self.unknown_penalty} must be numbers"
            )


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One finished translation."""

    tokens: tuple[int, ...]
    """Ids without start and end symbol."""
    score: float
    """Log-probability with the end symbol's, divided by length ** length_penalty."""


@torch.inference_mode()
def search(
    model: Decodable,
    source: Tensor,
    start: Tensor,
    options: SearchOptions,
    *,
    max_positions: int,
    forbidden: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Find the best translations of a batch.

    As in fairseq, a sentence is done once `beam` hypotheses have ended among the best `beam` candidates of their step,
    or at its greatest length. Unlike there, that length follows from the sentence alone and not from the longest of
    its batch, so neighbours never change a translation. Sentences that are done leave the batch.

    Args:
        model: a Transformer.
        source: (batch, source) int64 with tag and end symbol, padded.
        start: (batch,) int64: what the decoder begins with, as a language tag; or (batch, prefix), several tokens.
        options: how to search.
        max_positions: the decoder's; no hypothesis has more tokens, end symbol included.
        forbidden: (n,) int64: ids that are never chosen, as tags. Padding never is.

    Returns:
        For each sentence its finished hypotheses, best first; `beam` of them unless its greatest length came earlier.

    Raises:
        ValueError: min_length is above a sentence's greatest length.
    """
    lengths = source.ne(PADDING).sum(dim=1)
    prefix = start if start.dim() == 2 else start[:, None]
    most = max_positions - prefix.shape[1]
    limits = (options.max_length_a * lengths.double() + options.max_length_b).long().clamp(max=most)
    if len(limits) and int(limits.min()) < options.min_length:
        raise ValueError(
            f"min_length={options.min_length} is above the greatest length {int(limits.min())} of a sentence; "
            "raise max_length_a or max_length_b"
        )
    beams = _Beams(prefix, limits, options)
    if not len(source):
        return []
    state = model.start(source)
    for position in range(prefix.shape[1] - 1):
        visible = None if beams.visible is None else beams.visible[:, :, : position + 1]
        model.step(prefix[:, position : position + 1], state, visible)
    while beams.sentences.numel():
        logits = model.step(beams.last, state, beams.visible)
        scores = torch.log_softmax(logits.float(), dim=-1)
        beams.constrain(scores, forbidden)
        keep = beams.advance(scores)
        if keep is not None and keep.numel():
            state.keep(keep)
    return beams.finished()


class _Beams:
    """The live hypotheses of a batch, and those that have ended.

    Every tensor has a row for each live sentence. The number of hypotheses, `width`, is 1 before the first step.
    """

    def __init__(self, start: Tensor, limits: Tensor, options: SearchOptions) -> None:
        self.options = options
        batch, device = len(start), start.device
        self.sentences = torch.arange(batch, device=device)  # number in the batch as it was given
        self.limits = limits
        self.ended = torch.zeros(batch, dtype=torch.long, device=device)
        self.last = start[:, -1:]  # (batch, width)
        self.tokens = start.new_empty(batch, 1, 0)  # (batch, width, steps), without the start
        self.scores = torch.zeros(batch, 1, device=device)  # (batch, width) log-probabilities
        # Which cached keys lie in a hypothesis' own past; greedy search has no others.
        shape = (batch, 1, start.shape[1])
        self.visible = torch.ones(shape, dtype=torch.bool, device=device) if options.beam > 1 else None
        self.batch = batch
        self._ended: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def steps(self) -> int:
        """Tokens that each live hypothesis has."""
        return self.tokens.shape[2]

    def constrain(self, scores: Tensor, forbidden: Tensor | None) -> None:
        """Rule out, in place, what must not come next; probabilities of the rest stay as they are.

        Args:
            scores: (batch, width, vocabulary) log-probabilities.
            forbidden: (n,) int64.
        """
        scores.nan_to_num_(nan=-math.inf, neginf=-math.inf)
        scores[..., PADDING] = -math.inf
        if self.options.unknown_penalty:
            scores[..., UNKNOWN] -= self.options.unknown_penalty
        if forbidden is not None:
            scores.index_fill_(2, forbidden, -math.inf)
        if self.steps < self.options.min_length:
            scores[..., EOS] = -math.inf
        full = self.limits <= self.steps
        if bool(full.any()):
            end = scores[full, :, EOS]
            scores[full] = -math.inf
            scores[full, :, EOS] = end

    def advance(self, scores: Tensor) -> Tensor | None:
        """Take the best continuations; store hypotheses that end, drop sentences that are done.

        Args:
            scores: (batch, width, vocabulary) log-probabilities of the next token.

        Returns:
            (kept,) int64 rows of the sentences that go on, or None if all do.
        """
        beam, vocabulary = self.options.beam, scores.shape[-1]
        total = (scores + self.scores[..., None]).flatten(1)
        # Twice the beam: each hypothesis has one end symbol, so at least `beam` candidates go on.
        best, index = total.topk(min(2 * beam, total.shape[1]))
        parent, token = index // vocabulary, index % vocabulary

        ends = token.eq(EOS)
        self._store(ends[:, :beam] & best[:, :beam].isfinite(), best[:, :beam], parent[:, :beam])
        done = (self.ended >= beam) | (self.limits <= self.steps)

        # A stable sort brings the first `beam` that go on to the front, best first.
        chosen = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, :beam]
        parent, self.last, self.scores = parent.gather(1, chosen), token.gather(1, chosen), best.gather(1, chosen)
        self.tokens = torch.cat([_of_parents(self.tokens, parent), self.last[..., None]], dim=2)
        if self.visible is not None:
            own = torch.eye(parent.shape[1], dtype=torch.bool, device=parent.device).expand(len(parent), -1, -1)
            self.visible = torch.cat([_of_parents(self.visible, parent), own], dim=2)
        return self._drop(done) if bool(done.any()) else None

    def finished(self) -> list[list[Hypothesis]]:
        """All that has ended, by sentence, best first."""
        found: list[list[Hypothesis]] = [[] for _ in range(self.batch)]
        for sentences, scores, tokens in self._ended:
            for sentence, score, ids in zip(sentences.tolist(), scores.tolist(), tokens.tolist(), strict=True):
                found[sentence].append(Hypothesis(tuple(ids), score))
        return [sorted(hypotheses, key=lambda hypothesis: -hypothesis.score) for hypotheses in found]

    def _store(self, ends: Tensor, scores: Tensor, parent: Tensor) -> None:
        if not bool(ends.any()):
            return
        ends = ends & (self.ended[:, None] + ends.cumsum(1) <= self.options.beam)
        row, rank = ends.nonzero(as_tuple=True)
        score = scores[row, rank] / (self.steps + 1) ** self.options.length_penalty
        self._ended.append((self.sentences[row], score, self.tokens[row, parent[row, rank]]))
        self.ended = self.ended + ends.sum(1)

    def _drop(self, done: Tensor) -> Tensor:
        keep = done.logical_not().nonzero().flatten()
        for name in ("sentences", "limits", "ended", "last", "tokens", "scores"):
            setattr(self, name, getattr(self, name)[keep])
        if self.visible is not None:
            self.visible = self.visible[keep]
        return keep


def _of_parents(x: Tensor, parent: Tensor) -> Tensor:
    """Rows of the parents: x (batch, width, n), parent (batch, beam) -> (batch, beam, n)."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))
