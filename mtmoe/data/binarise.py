"""Text to ids: each segment becomes its pieces and ``</s>``, one dataset a side of a pair."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from mtmoe.data.clean import read_sides
from mtmoe.data.mmap_dataset import index_path, number_type, read_dataset, write_dataset
from mtmoe.data.recipe import SPLITS
from mtmoe.data.rows import Pair, pair_name
from mtmoe.data.vocabulary import SPECIAL_SYMBOLS, fairseq_ids

_END = SPECIAL_SYMBOLS.index("</s>")
_CHUNK = 20_000
"""Segments encoded at once: SentencePiece returns Python lists, which take 10 times the room of the ids."""


def binarise_pair(
    processor: sentencepiece.SentencePieceProcessor, text: Path, folder: Path, pair: Pair, languages: int
) -> dict[str, int]:
    """Write the datasets of a pair for all splits.

    Args:
        processor: the SentencePiece model.
        text: folder that `write_clean_text` filled.
        folder: where ``{split}.{a}-{b}.{a|b}.{bin,idx}`` belong.
        pair: the pair.
        languages: number of language tags, which count for the size of the vocabulary.

    Returns:
        Number of sentence pairs by split.
    """
    table = fairseq_ids(processor)
    dtype = number_type(1 + processor.get_piece_size() + languages)
    counts = {}
    for split in SPLITS:
        sides = read_sides(text, split, pair)
        counts[split] = len(sides[0])
        if not sides[0]:  # fairseq cannot map an empty file
            continue
        for language, lines in zip(pair, sides, strict=True):
            ids, sizes = encode(processor, table, lines)
            write_dataset(folder / f"{split}.{pair_name(pair)}.{language}", ids, sizes, dtype)
    return counts


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
        for language in pair:
            prefix = folder / f"train.{pair_name(pair)}.{language}"
            if not index_path(prefix).exists():  # a pair for evaluation only
                continue
            ids, _ = read_dataset(prefix)
            counts += np.bincount(ids, minlength=size)
    return counts
