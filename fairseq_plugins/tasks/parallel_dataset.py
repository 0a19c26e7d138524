"""All directions of a split as one fairseq data set, whose sentences and their lengths stay on the disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset
from numpy.typing import NDArray

from mtmoe.data.shards import map_side
from mtmoe.errors import DataError
from mtmoe.training.batching import Batches, make_batches
from mtmoe.training.sampling import Pool

_BLOCK = 1 << 20
"""Sentences whose lengths are looked at together."""

_MANY = 16
"""From so many sentences of a shard on, one look-up of a block takes less time than a slice for each."""


@dataclass(frozen=True, slots=True)
class Side:
    """One language of one pair, or a shard of it: the sentences behind each other, each ending in ``</s>``."""

    tokens: NDArray[np.integer]
    """(all tokens,)"""
    lengths: NDArray[np.integer]
    """(sentences,)"""
    places: NDArray[np.int64] | None = None
    """(sentences,) of the first token of each, in bytes, as fairseq stores them; None = one behind the other."""

    def __post_init__(self) -> None:
        if self.places is None:
            ends = np.cumsum(self.lengths, dtype=np.int64)
            object.__setattr__(self, "places", (ends - self.lengths) * self.tokens.itemsize)

    def part(self, sentences: NDArray[np.int64]) -> Side:
        """Some of the sentences, of the same tokens."""
        assert self.places is not None
        return Side(self.tokens, self.lengths[sentences], self.places[sentences])

    def starts(self, sentences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where some of the sentences begin in `tokens`."""
        assert self.places is not None
        return self.places[sentences] // self.tokens.itemsize


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction of translation: two sides and the tags that go before them."""

    name: str
    source: Side | Sequence[Side]
    """One side, or its shards."""
    target: Side | Sequence[Side] | None
    """None where there is nothing to compare with, as in interactive translation."""
    encoder_tag: int
    decoder_tag: int
    number: int = 0
    """Of the direction among all of the task, for statistics by direction."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one shard adds to a direction."""

    source: Side
    target: Side | None


def read_sides(prefix: Path, language: str) -> tuple[Side, ...]:
    """Map one side of a pair into memory, shard by shard.

    Args:
        prefix: ``bin/{split}.{a}-{b}``.
        language: the side.

    Raises:
        DataError: a file is missing or damaged.
    """
    return tuple(Side(part.ids, part.sizes, part.places) for part in map_side(prefix, language))


class ParallelDataset(FairseqDataset):
    """Sentence pairs of several directions, addressed by one number; direction by direction, in the order of the files.

    Nothing here grows with the number of sentences: tokens, lengths and places are looked up in the sides, which are
    memory maps, and a side that several directions use (en-de and de-en, say) is mapped once.

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
        self.directions = list(directions)
        self.has_target = all(direction.target is not None for direction in directions)
        pieces = [_pieces(direction, limit) for direction in directions]
        self._pieces = [piece for of_direction in pieces for piece in of_direction]
        self._piece_first = _offsets([len(piece.source.lengths) for piece in self._pieces])
        self.first = _offsets([sum(len(piece.source.lengths) for piece in of_direction) for of_direction in pieces])
        """(directions + 1,) int64 number of the first sentence of each, and at last of all sentences."""
        self._usable: tuple[tuple[Any, int | None], tuple[Mapping[str, Pool], int]] | None = None

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> int:
        """The number itself: sentences are only ever gathered by the batch."""
        return index

    def num_tokens(self, index: int) -> int:
        """Tokens of the longer side, with the tag."""
        return max(self.size(index))

    def num_tokens_vec(self, indices: NDArray[np.int64]) -> NDArray[np.int32]:
        """Tokens of the longer side of several pairs, with the tag."""
        return self.sizes_of(indices).max(axis=1)

    def size(self, index: int) -> tuple[int, int]:
        """Tokens of encoder and decoder input."""
        source, target = self.sizes_of(np.array([index]))[0].tolist()
        return source, target

    def sizes_of(self, indices: NDArray[np.int64]) -> NDArray[np.int32]:
        """What fairseq filters and batches by: (pairs, 2) tokens of encoder input, with its tag, and target."""
        sizes = np.zeros((len(indices), 2), dtype=np.int32)
        for piece, rows, local in self._by_piece(indices):
            sizes[rows, 0] = piece.source.lengths[local] + 1
            if piece.target is not None:
                sizes[rows, 1] = piece.target.lengths[local]
        return sizes

    def directions_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(pairs,) which of `names` each pair belongs to."""
        return np.searchsorted(self.first[1:], indices, side="right")

    def sample(self, limit: int) -> ParallelDataset:
        """That many pairs of each direction, spread evenly over it, as a set of its own to be read once through.

        The tokens are shared, so that it takes no memory, and the numbers of its pairs are its own.
        """
        return ParallelDataset(self.directions, pad=self.pad, limit=limit)

    def sizes_by_direction(self) -> dict[str, int]:
        """Direction -> number of its pairs."""
        return {name: int(self.first[i + 1] - self.first[i]) for i, name in enumerate(self.names)}

    def usable(self, max_positions: Any, max_tokens: int | None) -> tuple[Mapping[str, Pool], int]:
        """Which pairs the model can take; it reads all lengths once, and remembers the answer to the last question.

        Args:
            max_positions: (source, target) or one number for both; None = no limit.
            max_tokens: limit on the longer side; None = no limit.

        Returns:
            Direction -> its usable pairs, and the number of the longest pair of all, usable or not.
        """
        same = max_positions is None or np.isscalar(max_positions)
        source, target = (max_positions, max_positions) if same else tuple(max_positions)[:2]
        limits = (source or np.inf, target or np.inf), max_tokens
        if self._usable is None or self._usable[0] != limits:
            refused: list[list[NDArray[np.int64]]] = [[] for _ in self.names]
            most, longest = -1, 0
            for first, sizes in self._all_sizes():
                cost = sizes.max(axis=1)
                too_long = (sizes[:, 0] > limits[0][0]) | (sizes[:, 1] > limits[0][1])
                if max_tokens is not None:
                    too_long |= cost > max_tokens
                refused[int(self.directions_of(np.array([first]))[0])].append(first + np.flatnonzero(too_long))
                if int(cost.max()) > most:
                    most, longest = int(cost.max()), first + int(cost.argmax())
            pools = {
                name: Pool.without(int(self.first[i]), int(self.first[i + 1]), refused[i])
                for i, name in enumerate(self.names)
            }
            self._usable = limits, (pools, longest)
        return self._usable[1]

    def batches(
        self, indices: NDArray[np.int64], max_tokens: int | None, max_sentences: int | None, multiple: int = 1
    ) -> Batches:
        """Cut `indices` into batches of like length; see `mtmoe.training.batching.make_batches`."""
        sizes = self.sizes_of(indices)
        cut = make_batches(
            sizes[:, 0], sizes[:, 1], max_tokens=max_tokens, max_sentences=max_sentences, multiple=multiple
        )
        return Batches(indices[cut.sentences], cut.first)

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
        direction = self.directions_of(index)
        pieces = list(self._by_piece(index))
        source, source_length = self._gather([(piece.source, rows, local) for piece, rows, local in pieces], room=1)
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
            parts = [(piece.target, rows, local) for piece, rows, local in pieces if piece.target is not None]
            target, target_length = self._gather(parts)
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

    def _gather(
        self, parts: Sequence[tuple[Side, NDArray[np.int64], NDArray[np.int64]]], room: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sentences as rows of tokens, then padding.

        Args:
            parts: a side, the rows that are its sentences, and their numbers in it; together they fill all rows.
            room: columns to leave free before the sentences.

        Returns:
            (sentences, room + longest), and (sentences,) lengths with the room.
        """
        lengths = np.empty(sum(len(rows) for _, rows, _ in parts), dtype=np.int64)
        for side, rows, local in parts:
            lengths[rows] = side.lengths[local]
        column = np.arange(int(lengths.max()))
        gathered = np.empty((len(lengths), room + len(column)), dtype=np.int64)
        for side, rows, local in parts:
            starts = side.starts(local)
            if len(rows) >= _MANY:
                gathered[rows, room:] = side.tokens.take(starts[:, None] + column, mode="clip")
                continue
            for row, start, length in zip(rows.tolist(), starts.tolist(), lengths[rows].tolist(), strict=True):
                gathered[row, room : room + length] = side.tokens[start : start + length]
        gathered[:, room:][column >= lengths[:, None]] = self.pad
        return gathered, lengths + room

    def _by_piece(self, indices: NDArray[np.int64]) -> Iterator[tuple[_Piece, NDArray[np.int64], NDArray[np.int64]]]:
        """For each piece that has some of the pairs: where they stand in `indices`, and their numbers in it, rising.

        Rising, so that files are read from their beginning to their end.
        """
        if len(indices) == 0:
            return
        rows = np.argsort(indices, kind="stable")
        ordered = np.asarray(indices)[rows]
        number = np.searchsorted(self._piece_first, ordered, side="right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(ordered)]
        for start, stop in itertools.pairwise(cuts):
            piece = int(number[start])
            yield self._pieces[piece], rows[start:stop], ordered[start:stop] - self._piece_first[piece]

    def _all_sizes(self) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """All pairs in blocks: the number of the first pair of a block, and its sizes; a block is of one direction."""
        for piece, first in zip(self._pieces, self._piece_first.tolist(), strict=False):
            for start in range(0, len(piece.source.lengths), _BLOCK):
                block = slice(start, start + _BLOCK)
                source = piece.source.lengths[block] + 1
                target = piece.target.lengths[block] if piece.target is not None else np.zeros_like(source)
                yield first + start, np.stack([source, target], axis=1)


def _pieces(direction: Direction, limit: int) -> list[_Piece]:
    """The shards of a direction, side by side, reduced to `limit` pairs spread evenly over all of them; 0 = all."""
    sources = _shards(direction.source)
    targets = _shards(direction.target) if direction.target is not None else [None] * len(sources)
    counts = [len(side.lengths) for side in sources]
    if direction.target is not None and counts != [len(side.lengths) for side in targets if side is not None]:
        found = [sum(len(side.lengths) for side in sides if side is not None) for sides in (sources, targets)]
        shards = "" if len(sources) == len(targets) == 1 else f", in {len(sources)} and {len(targets)} shards"
        raise DataError(f"{direction.name}: {found[0]} source but {found[1]} target sentences{shards}")
    pairs = list(zip(sources, targets, strict=True))
    total = sum(counts)
    if not limit or total <= limit:
        return [_Piece(source, target) for source, target in pairs]
    kept = np.arange(limit) * total // limit
    bounds = np.searchsorted(kept, _offsets(counts))
    pieces = []
    for number, first in enumerate(_offsets(counts)[:-1]):
        local = kept[bounds[number] : bounds[number + 1]] - first
        source, target = (side.part(local) if side is not None else None for side in pairs[number])
        assert source is not None
        pieces.append(_Piece(source, target))
    return pieces


def _shards(side: Side | Sequence[Side]) -> Sequence[Side]:
    return [side] if isinstance(side, Side) else list(side)


def _offsets(counts: Sequence[int]) -> NDArray[np.int64]:
    """(counts + 1,) where each of some runs begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
