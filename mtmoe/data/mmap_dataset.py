"""fairseq's memory-mapped dataset, without fairseq: ``.bin`` holds the ids, ``.idx`` says where each item is.

Layout of ``.idx``, little endian: magic (9 bytes), version 1 (8), code of the number type (1), number of items (8),
their sizes in ids (4 each), their places in ``.bin`` in bytes (8 each).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from mtmoe.errors import DataError
from mtmoe.files import replacing

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODES: dict[np.dtype, int] = {np.dtype(np.int32): 4, np.dtype(np.int64): 5, np.dtype(np.uint16): 8}
"""Number types and fairseq's codes for them, as far as we write them."""

_SMALL_VOCABULARY = 65_500
"""Below this many ids fairseq uses two bytes for each."""


def number_type(vocabulary_size: int) -> np.dtype:
    """Choose the type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary_size < _SMALL_VOCABULARY else np.int32)


def write_dataset(prefix: Path, ids: np.ndarray, sizes: np.ndarray, dtype: np.dtype) -> None:
    """Write ``prefix.bin`` and then ``prefix.idx``, each atomically: where there is an index, the data is whole.

    Args:
        prefix: path without suffix, as fairseq takes it.
        ids: (all ids,) the items, one after the other.
        sizes: (items,) how many ids each has.
        dtype: int32, int64 or uint16.
    """
    if int(sizes.sum()) != len(ids):
        raise ValueError(f"the sizes add up to {int(sizes.sum())}, but there are {len(ids)} ids")
    places = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1], dtype=np.int64, out=places[1:])
    with replacing(data_path(prefix)) as temporary:
        temporary.write_bytes(ids.astype(dtype).tobytes())
    with replacing(index_path(prefix)) as temporary:
        header = _MAGIC + struct.pack("<QBQ", _VERSION, _CODES[np.dtype(dtype)], len(sizes))
        temporary.write_bytes(header + sizes.astype("<i4").tobytes() + (places * np.dtype(dtype).itemsize).tobytes())


def read_dataset(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a dataset back whole.

    Returns:
        (all ids,) in the stored type, and (items,) int32 sizes.

    Raises:
        DataError: a file is missing, or is not what `write_dataset` writes.
    """
    try:
        index = index_path(prefix).read_bytes()
        data = data_path(prefix).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: there is no such file") from None
    start = len(_MAGIC) + struct.calcsize("<QBQ")
    if not index.startswith(_MAGIC) or len(index) < start:
        raise DataError(f"{index_path(prefix)}: not an index of a memory-mapped dataset")
    version, code, items = struct.unpack("<QBQ", index[len(_MAGIC) : start])
    dtype = next((dtype for dtype, known in _CODES.items() if known == code), None)
    if version != _VERSION or dtype is None or len(index) != start + 12 * items:
        raise DataError(f"{index_path(prefix)}: damaged, or of a version or number type that is not read here")
    sizes = np.frombuffer(index, dtype="<i4", count=items, offset=start)
    if len(data) != int(sizes.sum()) * dtype.itemsize:
        raise DataError(f"{data_path(prefix)}: {len(data)} bytes, the index says {int(sizes.sum()) * dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype), sizes


def data_path(prefix: Path) -> Path:
    """Give the path of the ids; the prefix may have dots."""
    return Path(os.fspath(prefix) + ".bin")


def index_path(prefix: Path) -> Path:
    """Give the path of the index; the prefix may have dots."""
    return Path(os.fspath(prefix) + ".idx")
