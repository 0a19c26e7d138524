"""A short fine-tune of a model that has lost experts, towards the model that it comes from.

Source: Kim and Rush 2016 (word-level distillation).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtmoe.data.mmap_dataset import index_path, read_dataset
from mtmoe.data.vocabulary import SPECIAL_SYMBOLS
from mtmoe.errors import DataError

PADDING = SPECIAL_SYMBOLS.index("<pad>")

Logits = Callable[[Tensor, Tensor], Tensor]
"""logits(source, target_input): (batch, source) and (batch, target) int64 -> (batch, target, vocabulary)."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Sentence pairs as a model reads them, padded on the right."""

    source: Tensor
    """(batch, source) int64: tag, pieces, end symbol."""
    target_input: Tensor
    """(batch, target) int64: tag, pieces."""
    target: Tensor
    """(batch, target) int64: pieces, end symbol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryOptions:
    """How to fine-tune."""

    updates: int
    """Optimiser steps."""
    learning_rate: float = 2e-4
    """Of AdamW, reached after a tenth of the updates, then falling to 0 in a straight line."""
    distillation: float = 0.7
    """Weight of the parent's probabilities against that of the references, 0 to 1."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise ValueError(f"updates={self.updates} must be at least 1")
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} and clip_norm={self.clip_norm} must be above 0")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation={self.distillation} must be between 0 and 1")


def recover(
    student: nn.Module,
    parent: Logits,
    batches: Iterable[PairBatch],
    options: RecoveryOptions,
    progress: Callable[[int, float], object] | None = None,
) -> None:
    """Fine-tune a model in place, on what its parent makes of the same text.

    The student stays in evaluation mode: without dropout and masking of experts it learns from exactly what it will
    compute, and so few updates do not over-fit.

    Args:
        student: called as `Logits`; all its parameters are trained, and frozen again at the end.
        parent: gives the logits to follow.
        batches: at least as many as there are updates.
        options: how.
        progress: told the number of updates done and the last loss, nats a token.

    Raises:
        ValueError: there are fewer batches than updates.
    """
    student.requires_grad_(True)
    try:
        optimiser = torch.optim.AdamW(student.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        done = 0
        for done, batch in enumerate(islice(batches, options.updates), start=1):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(done - 1, options)
            loss = distillation_loss(student(batch.source, batch.target_input), parent, batch, options.distillation)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), options.clip_norm)
            optimiser.step()
            if progress is not None:
                progress(done, loss.item())
        if done < options.updates:
            raise ValueError(f"updates={options.updates} need as many batches, got {done}")
    finally:
        student.requires_grad_(False)
        for parameter in student.parameters():
            parameter.grad = None


def learning_rate(update: int, options: RecoveryOptions) -> float:
    """Learning rate of an update, from 0: up over the first tenth, then down to 0 after the last."""
    warmup = max(1, options.updates // 10)
    rising = (update + 1) / warmup
    falling = (options.updates - update) / max(1, options.updates - warmup + 1)
    return options.learning_rate * min(rising, falling, 1.0)


def distillation_loss(logits: Tensor, parent: Logits, batch: PairBatch, share: float) -> Tensor:
    """Cross entropy with the parent's probabilities, and with the references, a mean over real target tokens.

    Args:
        logits: (batch, target, vocabulary) of the student.
        parent: gives the logits to follow.
        batch: the text.
        share: weight of the parent, 0 to 1; the references have the rest.

    Returns:
        () fp32, nats a token.
    """
    real = batch.target.ne(PADDING)
    log_probs = F.log_softmax(logits[real].float(), dim=-1)  # (tokens, vocabulary)
    loss = log_probs.new_zeros(())
    if share < 1:
        loss = loss + (1 - share) * F.nll_loss(log_probs, batch.target[real])
    if share > 0:
        with torch.no_grad():
            wanted = F.softmax(parent(batch.source, batch.target_input)[real].float(), dim=-1)
        loss = loss - share * (wanted * log_probs).sum(dim=-1).mean()
    return loss


def training_batches(
    data: Path,
    directions: Sequence[str],
    tags: Mapping[str, int],
    *,
    encoder_langtok: str = "src",
    max_tokens: int = 2048,
    longest: int = 128,
    seed: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[PairBatch]:
    """Batches of the training text of prepared data, without end: each of a direction that is drawn evenly.

    Args:
        data: folder of prepared data, with the model's own dictionary.
        directions: as ``en-de``, to draw from.
        tags: language -> id of its tag.
        encoder_langtok: whose tag the encoder gets, "src" or "tgt".
        max_tokens: source or target tokens of a batch, padding included.
        longest: tokens on a side above which a pair is left out.
        seed: of all draws.
        device: where the batches are made.

    Raises:
        DataError: there is no training text for any of the directions.
    """
    folder = data / "bin" if (data / "bin").is_dir() else data
    texts = {one: found for one in directions if (found := _Text.read(folder, one, longest)) is not None}
    if not texts:
        raise DataError(f"{folder} has no training text for {', '.join(directions)}")
    return _draw(texts, tags, encoder_langtok, max_tokens, random.Random(seed), device)


def _draw(
    texts: Mapping[str, _Text],
    tags: Mapping[str, int],
    encoder_langtok: str,
    max_tokens: int,
    generator: random.Random,
    device: torch.device | str,
) -> Iterator[PairBatch]:
    names = sorted(texts)
    waiting: dict[str, list[np.ndarray]] = {name: [] for name in names}
    while True:
        name = generator.choice(names)
        if not waiting[name]:  # all of its text has been seen: once more, in another order
            waiting[name] = texts[name].batches(max_tokens)
            generator.shuffle(waiting[name])
        source, target = name.split("-")
        front = tags[source if encoder_langtok == "src" else target]
        pairs = [texts[name].pair(int(index)) for index in waiting[name].pop()]
        yield PairBatch(
            _padded([[front, *ids] for ids, _ in pairs], device),
            _padded([[tags[target], *ids[:-1]] for _, ids in pairs], device),
            _padded([ids for _, ids in pairs], device),
        )


@dataclass(frozen=True, slots=True)
class _Text:
    """The training pairs of one direction; both sides end in the end symbol."""

    ids: tuple[np.ndarray, np.ndarray]
    """(all ids,) of source and target."""
    ends: tuple[np.ndarray, np.ndarray]
    """(pairs + 1,) where each segment starts in `ids`, and the end of the last."""
    chosen: np.ndarray
    """(chosen,) numbers of the pairs that are not too long, from the longest to the shortest."""
    lengths: np.ndarray
    """(pairs,) tokens of the longer side, its tag included."""

    @classmethod
    def read(cls, folder: Path, direction: str, longest: int) -> _Text | None:
        pair = "-".join(sorted(direction.split("-")))
        prefixes = [folder / f"train.{pair}.{language}" for language in direction.split("-")]
        if not all(index_path(prefix).is_file() for prefix in prefixes):
            return None
        (source, source_sizes), (target, target_sizes) = (read_dataset(prefix) for prefix in prefixes)
        lengths = np.maximum(source_sizes, target_sizes).astype(np.int64) + 1
        chosen = np.argsort(-lengths, kind="stable")
        chosen = chosen[lengths[chosen] <= longest]
        ends = tuple(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]) for sizes in (source_sizes, target_sizes))
        return cls((source, target), (ends[0], ends[1]), chosen, lengths) if len(chosen) else None

    def batches(self, max_tokens: int) -> list[np.ndarray]:
        """Numbers of the pairs of each batch: neighbours in length, so that there is little padding."""
        found, start = [], 0
        while start < len(self.chosen):
            width = max(1, max_tokens // int(self.lengths[self.chosen[start]]))
            found.append(self.chosen[start : start + width])
            start += width
        return found

    def pair(self, index: int) -> tuple[list[int], list[int]]:
        """Source and target ids of one pair."""
        source, target = (
            ids[ends[index] : ends[index + 1]].tolist() for ids, ends in zip(self.ids, self.ends, strict=True)
        )
        return source, target


def _padded(sequences: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[PADDING] * (longest - len(ids))] for ids in sequences], device=device)
