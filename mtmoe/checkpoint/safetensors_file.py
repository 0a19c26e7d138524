"""Write safetensors files piece by piece: memory holds a chunk, not the model, and hashing needs no second reading.

The format (https://github.com/huggingface/safetensors): 8 bytes, the length of a JSON header; the header, name ->
dtype, shape and place; the numbers. safetensors' own writer wants all weights of a file in memory, twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mtmoe.checkpoint.tensors import STORED_DTYPES, count_of, dtype_of, rows_of, shape_of

CHUNK_BYTES = 64_000_000
"""Rows that are read or computed at once; one expert of NLLB-200 in fp32 has 67 MB a matrix."""


def bytes_of(tensors: Mapping[str, Tensor], name: str) -> int:
    """What a weight takes in a file."""
    return count_of(tensors, name) * dtype_of(tensors, name).itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """Write some weights.

    Args:
        path: the file; what is there is overwritten.
        tensors: the weights.
        names: those to write.

    Returns:
        The SHA-256 of the file, in hexadecimal digits.
    """
    short = {dtype: name for name, dtype in STORED_DTYPES.items()}
    # Readers map the file and need each weight at a multiple of its item size.
    ordered = sorted(names, key=lambda name: -dtype_of(tensors, name).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        begin, end = end, end + bytes_of(tensors, name)
        shape = list(shape_of(tensors, name))
        header[name] = {"dtype": short[dtype_of(tensors, name)], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(piece: bytes | memoryview) -> None:
            file.write(piece)
            digest.update(piece)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name in ordered:
            _write_weight(write, tensors, name)
    return digest.hexdigest()


def _write_weight(write: Callable[[memoryview], None], tensors: Mapping[str, Tensor], name: str) -> None:
    for begin, end in _chunks(shape_of(tensors, name), bytes_of(tensors, name)):
        piece = rows_of(tensors, name, begin, end) if end else tensors[name]
        write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _chunks(shape: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about CHUNK_BYTES; (0, 0) is the whole of a weight without dimensions."""
    if not shape:
        yield 0, 0
        return
    if size == 0:
        return
    rows = max(1, CHUNK_BYTES * shape[0] // size)
    for begin in range(0, shape[0], rows):
        yield begin, min(begin + rows, shape[0])
