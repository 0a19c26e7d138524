"""Text to ids: each segment becomes its pieces and ``</s>``, one dataset or some shards a side of a pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import sentencepiece

from mtmoe.data.clean import count_pairs, read_chunks
from mtmoe.data.mmap_dataset import DatasetWriter, number_type
from mtmoe.data.recipe import SPLITS
from mtmoe.data.rows import Pair, pair_name
from mtmoe.data.shards import Shard, has_side, map_side, remove_set, shard_prefix, write_list
from mtmoe.data.vocabulary import SPECIAL_SYMBOLS, fairseq_ids

_END = SPECIAL_SYMBOLS.index("</s>")
_CHUNK = 20_000
"""Segments encoded at once: SentencePiece returns Python lists, which take 10 times the room of the ids."""

_BLOCK = 1 << 22
"""Ids counted at once."""


def binarise_pair(
    processor: sentencepiece.SentencePieceProcessor,
    text: Path,
    folder: Path,
    pair: Pair,
    languages: int,
    shard_size: int = 0,
) -> dict[str, int]:
    """Write the datasets of a pair for all splits.

    The text streams through: memory does not grow with it, but for 4 bytes a sentence of a shard.

    Args:
        processor: the SentencePiece model.
        text: folder that `write_clean_text` filled.
        folder: where ``{split}.{a}-{b}.{a|b}.{bin,idx}`` belong, or the shards of train; see `mtmoe.data.shards`.
        pair: the pair.
        languages: number of language tags, which count for the size of the vocabulary.
        shard_size: most sentence pairs of a shard of train; 0 = one file, and where train is no larger too.

    Returns:
        Number of sentence pairs by split.
    """
    table = fairseq_ids(processor)
    dtype = number_type(1 + processor.get_piece_size() + languages)
    counts = {}
    for split in SPLITS:
        prefix = folder / f"{split}.{pair_name(pair)}"
        remove_set(prefix)
        counts[split] = count_pairs(text, split, pair)
        if not counts[split]:  # fairseq cannot map an empty file
            continue
        encoded = _encoded(processor, table, text, split, pair)
        if split == "train" and 0 < shard_size < counts[split]:
            _write_shards(prefix, pair, encoded, dtype, shard_size)
        else:
            _write_pair([Path(f"{prefix}.{language}") for language in pair], encoded, dtype, counts[split])
    return counts


Encoded = tuple[np.ndarray, np.ndarray]
"""Ids of some segments, one behind the other, and their sizes."""


def _encoded(
    processor: sentencepiece.SentencePieceProcessor, table: np.ndarray, text: Path, split: str, pair: Pair
) -> Iterator[tuple[Encoded, Encoded]]:
    """Both sides of a pair, chunk by chunk."""
    for lines in read_chunks(text, split, pair, _CHUNK):
        yield encode(processor, table, lines[0]), encode(processor, table, lines[1])


def _write_shards(
    prefix: Path, pair: Pair, encoded: Iterator[tuple[Encoded, Encoded]], dtype: np.dtype, shard_size: int
) -> None:
    """Write shards one after the other, and at last the list of them."""
    shards: list[Shard] = []
    rest = _cut(encoded, shard_size)
    while (first := next(rest, None)) is not None:
        prefixes = [shard_prefix(prefix, len(shards), language) for language in pair]
        sentences, ids = _write_pair(prefixes, itertools.chain([first], rest), dtype, shard_size)
        shards.append(Shard(sentences, dict(zip(pair, ids, strict=True))))
    write_list(prefix, shards)


def _cut(encoded: Iterator[tuple[Encoded, Encoded]], shard_size: int) -> Iterator[tuple[Encoded, Encoded]]:
    """The same chunks, cut in two where a shard ends inside of one."""
    room = shard_size
    for chunk in encoded:
        while len(chunk[0][1]) > room:
            left, chunk = _split(chunk, room)
            yield left
            room = shard_size
        yield chunk
        room = (room - len(chunk[0][1])) or shard_size


def _split(chunk: tuple[Encoded, Encoded], count: int) -> tuple[tuple[Encoded, Encoded], tuple[Encoded, Encoded]]:
    ends = [int(sizes[:count].sum()) for _, sizes in chunk]
    (a, b), (end_a, end_b) = chunk, ends
    left = ((a[0][:end_a], a[1][:count]), (b[0][:end_b], b[1][:count]))
    return left, ((a[0][end_a:], a[1][count:]), (b[0][end_b:], b[1][count:]))


def _write_pair(
    prefixes: Sequence[Path], encoded: Iterator[tuple[Encoded, Encoded]], dtype: np.dtype, sentences: int
) -> tuple[int, list[int]]:
    """Write both sides until they have so many sentences, or there are no more.

    Returns:
        Sentences, and ids of each side.
    """
    with ExitStack() as stack:
        writers = [stack.enter_context(DatasetWriter(prefix, dtype)) for prefix in prefixes]
        for chunk in encoded:
            for writer, (ids, sizes) in zip(writers, chunk, strict=True):
                writer.add(ids, sizes)
            if writers[0].items >= sentences:
                break
    return writers[0].items, [writer.ids for writer in writers]


def encode(
    processor: sentencepiece.SentencePieceProcessor, table: np.ndarray, lines: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Encode segments.

    Returns:
        (all ids,) int64 in fairseq's numbering, each segment closed by ``</s>``, and (segments,) int32 sizes.
    """
    ids: list[np.ndarray] = []
    sizes: list[int] = []
    for start in range(0, len(lines), _CHUNK):
        pieces = processor.encode(lines[start : start + _CHUNK], out_type=int, num_threads=1, add_eos=True)
        sizes += map(len, pieces)
        ids += [np.fromiter((number for segment in pieces for number in segment), dtype=np.int64)]
    encoded = table[np.concatenate(ids)] if ids else np.zeros(0, dtype=np.int64)
    assert not lines or encoded[-1] == _END
    return encoded, np.asarray(sizes, dtype=np.int32)


def count_ids(folder: Path, pairs: Iterable[Pair], size: int) -> np.ndarray:
    """Count how often each id stands in the train datasets.

    Returns:
        (size,) int64.
    """
    counts = np.zeros(size, dtype=np.int64)
    for pair in pairs:
        prefix = folder / f"train.{pair_name(pair)}"
        for language in pair:
            if not has_side(prefix, language):  # a pair for evaluation only
                continue
            for shard in map_side(prefix, language):
                for start in range(0, len(shard.ids), _BLOCK):
                    counts += np.bincount(shard.ids[start : start + _BLOCK], minlength=size)
    return counts
