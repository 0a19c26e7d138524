"""All directions of a split as one fairseq data set: flat token arrays, batches gathered without a Python loop."""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset, _code_to_dtype
from numpy.typing import NDArray

from mtmoe.errors import DataError
from mtmoe.training.batching import make_batches


@dataclass(frozen=True, slots=True)
class Side:
    """One language of one pair, as stored: the sentences behind each other, each ending in ``</s>``."""

    tokens: NDArray[np.integer]
    """(all tokens,)"""
    lengths: NDArray[np.int64]
    """(sentences,)"""


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction of translation: two sides and the tags that go before them."""

    name: str
    source: Side
    target: Side | None
    """None where there is nothing to compare with, as in interactive translation."""
    encoder_tag: int
    decoder_tag: int
    number: int = 0
    """Of the direction among all of the task, for statistics by direction."""


def read_side(prefix: Path) -> Side:
    """Read one side of a pair from fairseq's memory-mapped files ``{prefix}.bin`` and ``{prefix}.idx``.

    Raises:
        DataError: a file is missing or damaged.
    """
    for suffix in (".bin", ".idx"):
        if not prefix.with_name(prefix.name + suffix).is_file():
            raise DataError(f"{prefix}{suffix} is missing; run `mtmoe prepare` again")
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    try:
        magic, version, code, sentences = struct.unpack_from("<9sQBQ", index)
        if magic != MMapIndexedDataset.Index._HDR_MAGIC or version != 1:
            raise ValueError("it does not begin as one of fairseq's memory-mapped data sets")
        dtype = np.dtype(_code_to_dtype[code])
        lengths = np.frombuffer(index, np.int32, sentences, struct.calcsize("<9sQBQ")).astype(np.int64)
    except (struct.error, ValueError, KeyError) as error:
        raise DataError(f"{prefix}.idx is damaged ({error}); run `mtmoe prepare` again") from error
    path = prefix.with_name(prefix.name + ".bin")
    if path.stat().st_size != int(lengths.sum()) * dtype.itemsize:
        raise DataError(f"{path} has {path.stat().st_size} bytes, its index says {int(lengths.sum()) * dtype.itemsize}")
    return Side(np.fromfile(path, dtype=dtype), lengths)


class ParallelDataset(FairseqDataset):
    """Sentence pairs of several directions, addressed by one number; direction by direction, in the order of the files.

    A side that several directions use (en-de and de-en, say) is held once.

    Args:
        directions: at least one.
        limit: keep that many pairs of each direction, spread evenly over it; 0 = all. Both directions of a pair keep
            the same sentences.
        pad: token id of padding.
        training: whether epochs are drawn from this set (else it is read once through, in a fixed order).
    """

    def __init__(self, directions: Sequence[Direction], *, pad: int, limit: int = 0, training: bool = False) -> None:
        super().__init__()
        self.names = [direction.name for direction in directions]
        self.pad, self.training = pad, training
        self.constraints: torch.Tensor | None = None
        self.numbers = np.array([direction.number for direction in directions], dtype=np.int64)
        self.encoder_tag = np.array([direction.encoder_tag for direction in directions], dtype=np.int64)
        self.decoder_tag = np.array([direction.decoder_tag for direction in directions], dtype=np.int64)
        sides: dict[int, tuple[Side, int]] = {}
        offset = 0
        for direction in directions:
            for side in (direction.source, direction.target):
                if side is not None and id(side) not in sides:
                    sides[id(side)] = side, offset
                    offset += len(side.tokens)
        self.tokens = np.concatenate([side.tokens for side, _ in sides.values()])
        columns: list[list[NDArray]] = [[], [], [], [], []]
        for number, direction in enumerate(directions):
            source, target = direction.source, direction.target
            kept = _spread(len(source.lengths), limit)
            starts = {
                key: at + np.cumsum(side.lengths) - side.lengths
                for key, (side, at) in sides.items()
                if side is source or side is target
            }
            if target is not None and len(target.lengths) != len(source.lengths):
                raise DataError(
                    f"{direction.name}: {len(source.lengths)} source but {len(target.lengths)} target sentences"
                )
            columns[0].append(np.full(len(kept), number, dtype=np.int64))
            columns[1].append(starts[id(source)][kept])
            columns[2].append(source.lengths[kept])
            columns[3].append(starts[id(target)][kept] if target is not None else np.zeros(len(kept), dtype=np.int64))
            columns[4].append(target.lengths[kept] if target is not None else np.zeros(len(kept), dtype=np.int64))
        self.direction, self.source_start, self.source_length, self.target_start, self.target_length = (
            np.concatenate(column) for column in columns
        )
        self.has_target = all(direction.target is not None for direction in directions)
        self.first = np.concatenate([[0], np.cumsum(np.bincount(self.direction, minlength=len(self.names)))])
        # What fairseq filters and batches by: the encoder also reads the tag.
        self.sizes = np.stack([self.source_length + 1, self.target_length], axis=1)

    def __len__(self) -> int:
        return len(self.direction)

    def __getitem__(self, index: int) -> int:
        """The number itself: sentences are only ever gathered by the batch."""
        return index

    def num_tokens(self, index: int) -> int:
        """Tokens of the longer side, with the tag."""
        return int(self.sizes[index].max())

    def num_tokens_vec(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the longer side of several pairs, with the tag."""
        return self.sizes[indices].max(axis=1)

    def size(self, index: int) -> tuple[int, int]:
        """Tokens of encoder and decoder input."""
        return int(self.sizes[index, 0]), int(self.sizes[index, 1])

    def sample(self, limit: int) -> ParallelDataset:
        """That many pairs of each direction, spread evenly over it, as a set of its own to be read once through.

        The tokens are shared, so that it takes no memory, and the numbers of its pairs are its own.
        """
        part = copy.copy(self)
        sizes = np.diff(self.first)
        kept = np.concatenate([first + _spread(size, limit) for first, size in zip(self.first, sizes, strict=False)])
        for name in ("direction", "source_start", "source_length", "target_start", "target_length", "sizes"):
            setattr(part, name, getattr(self, name)[kept])
        part.first = np.concatenate([[0], np.cumsum(np.bincount(part.direction, minlength=len(self.names)))])
        part.training = False
        return part

    def sizes_by_direction(self) -> dict[str, int]:
        """Direction -> number of its pairs."""
        return {name: int(self.first[i + 1] - self.first[i]) for i, name in enumerate(self.names)}

    def too_long(self, max_positions: Any) -> NDArray[np.bool_]:
        """Which pairs are longer than the model can take.

        Args:
            max_positions: (source, target) or one number for both; None = no limit.

        Returns:
            (pairs,) bool.
        """
        if max_positions is None:
            return np.zeros(len(self), dtype=bool)
        source, target = (max_positions, max_positions) if np.isscalar(max_positions) else tuple(max_positions)[:2]
        return (self.sizes[:, 0] > (source or np.inf)) | (self.sizes[:, 1] > (target or np.inf))

    def batches(
        self, indices: NDArray[np.int64], max_tokens: int | None, max_sentences: int | None, multiple: int = 1
    ) -> list[NDArray[np.int64]]:
        """Cut `indices` into batches of like length; see `mtmoe.training.batching.make_batches`."""
        lengths = self.sizes[indices]
        cut = make_batches(
            lengths[:, 0], lengths[:, 1], max_tokens=max_tokens, max_sentences=max_sentences, multiple=multiple
        )
        return [indices[batch] for batch in cut]

    def collater(self, samples: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
        """Make a batch: ``[tag] source </s>`` for the encoder, ``[tag] target`` for the decoder, padded on the right.

        Args:
            samples: numbers of pairs; none gives an empty batch, which fairseq replaces by a dummy.

        Returns:
            fairseq's sample, and ``direction``: (batch,) int64, the numbers of the directions.
        """
        index = np.asarray(samples, dtype=np.int64)
        if len(index) == 0:
            return {}
        direction = self.direction[index]
        source_length = self.source_length[index] + 1
        # One column earlier than the sentence, so that the tag goes where the token before it would be.
        source = self._gather(self.source_start[index] - 1, source_length)
        source[:, 0] = self.encoder_tag[direction]
        sample: dict[str, Any] = {
            "id": torch.from_numpy(index),
            "nsentences": len(index),
            "ntokens": int(source_length.sum()),
            "net_input": {
                "src_tokens": torch.from_numpy(source),
                "src_lengths": torch.from_numpy(source_length),
            },
            "target": None,
            "direction": torch.from_numpy(self.numbers[direction]),
        }
        if self.has_target:
            target_length = self.target_length[index]
            target = self._gather(self.target_start[index], target_length)
            previous = np.empty_like(target)
            previous[:, 0] = self.decoder_tag[direction]
            previous[:, 1:] = target[:, :-1]
            # The shorter targets have had their </s> shifted in; the decoder never reads it.
            previous[np.arange(previous.shape[1]) >= target_length[:, None]] = self.pad
            sample["target"] = torch.from_numpy(target)
            sample["net_input"]["prev_output_tokens"] = torch.from_numpy(previous)
            sample["ntokens"] = int(target_length.sum())
        if self.constraints is not None:
            sample["constraints"] = self.constraints[index]
        return sample

    def _gather(self, start: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of tokens: row i holds ``tokens[start[i] : start[i] + length[i]]``, then padding."""
        column = np.arange(int(length.max()))
        rows = self.tokens.take(start[:, None] + column, mode="clip").astype(np.int64)
        rows[column >= length[:, None]] = self.pad
        return rows


def _spread(total: int, limit: int) -> NDArray[np.int64]:
    """`limit` numbers below `total`, evenly apart; all of them where the limit is 0 or not reached."""
    if not limit or total <= limit:
        return np.arange(total)
    return np.arange(limit) * total // limit
