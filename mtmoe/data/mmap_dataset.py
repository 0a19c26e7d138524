"""fairseq's memory-mapped dataset, without fairseq: ``.bin`` holds the ids, ``.idx`` says where each item is.

Layout of ``.idx``, little endian: magic (9 bytes), version 1 (8), code of the number type (1), number of items (8),
their sizes in ids (4 each), their places in ``.bin`` in bytes (8 each).
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtmoe.errors import DataError
from mtmoe.files import replacing

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = "<QBQ"
"""Version, code of the number type, number of items."""
_CODES: dict[np.dtype, int] = {
    np.dtype(np.uint8): 1, np.dtype(np.int8): 2, np.dtype(np.int16): 3, np.dtype(np.int32): 4, np.dtype(np.int64): 5,
    np.dtype(np.uint16): 8,
}  # fmt: skip
"""Number types of ids and fairseq's codes for them."""

_SMALL_VOCABULARY = 65_500
"""Below this many ids fairseq uses two bytes for each."""


def number_type(vocabulary_size: int) -> np.dtype:
    """Choose the type that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary_size < _SMALL_VOCABULARY else np.int32)


class DatasetWriter:
    """Writes a dataset piece by piece, so that the ids are never in memory together; the sizes are, 4 bytes an item.

    Both files get their names when the block ends well, ``prefix.bin`` and then ``prefix.idx``, each atomically: where
    there is an index, the data is whole.

    Args:
        prefix: path without suffix, as fairseq takes it.
        dtype: int32, int64 or uint16.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.items = self.ids = 0
        """Written so far."""
        self._sizes: list[np.ndarray] = []

    def __enter__(self) -> DatasetWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(data_path(self.prefix)))
            self._data = stack.enter_context(temporary.open("wb"))
            self._open = stack.pop_all()
        return self

    def add(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Append items.

        Args:
            ids: (all ids,) of these items, one after the other.
            sizes: (items,) how many ids each has.
        """
        if int(sizes.sum()) != len(ids):
            raise ValueError(f"the sizes add up to {int(sizes.sum())}, but there are {len(ids)} ids")
        self._data.write(ids.astype(self.dtype).tobytes())
        self._sizes.append(sizes.astype("<i4"))
        self.items, self.ids = self.items + len(sizes), self.ids + len(ids)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._open.__exit__(kind, error, trace) or error is not None:
            return
        with replacing(index_path(self.prefix)) as temporary, temporary.open("wb") as index:
            index.write(_MAGIC + struct.pack(_HEADER, _VERSION, _CODES[self.dtype], self.items))
            for sizes in self._sizes:
                index.write(sizes.tobytes())
            place = 0
            for sizes in self._sizes:
                ends = place + np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
                index.write(np.concatenate([[place], ends[:-1]]).astype("<i8")[: len(sizes)].tobytes())
                place = int(ends[-1]) if len(ends) else place


def write_dataset(prefix: Path, ids: np.ndarray, sizes: np.ndarray, dtype: np.dtype) -> None:
    """Write a dataset that is in memory; see `DatasetWriter`."""
    with DatasetWriter(prefix, dtype) as writer:
        writer.add(ids, sizes)


@dataclass(frozen=True, slots=True)
class MappedDataset:
    """A dataset on the disk whose pages come into memory as they are read, once for all processes of a machine."""

    prefix: Path
    ids: np.ndarray
    """(all ids,) in the stored type"""
    sizes: np.ndarray
    """(items,) int32"""
    places: np.ndarray
    """(items,) int64, of the first id of each in bytes"""
    bytes_of_data: int
    """Length of the file of the ids."""

    def check_sizes(self) -> None:
        """Read all sizes once, and make sure that they add up to the ids.

        Raises:
            DataError: they do not.
        """
        self._check(int(self.sizes.sum(dtype=np.int64)))

    def check_end(self) -> None:
        """Make sure that the ids end where the last item does, without reading the other sizes.

        Raises:
            DataError: they do not.
        """
        last = int(self.places[-1]) // self.ids.itemsize + int(self.sizes[-1]) if len(self.sizes) else 0
        self._check(last)

    def _check(self, ids: int) -> None:
        if ids * self.ids.itemsize != self.bytes_of_data:
            raise DataError(
                f"{data_path(self.prefix)} has {self.bytes_of_data} bytes, its index says {ids * self.ids.itemsize}: "
                "it is not whole, or not of this index; copy both again, or run `mtmoe prepare` again"
            )


def map_dataset(prefix: Path) -> MappedDataset:
    """Map a dataset into memory; only the head of its index is read, and the length of the data is not checked.

    Raises:
        DataError: a file is missing, or the index is not what fairseq or `write_dataset` writes.
    """
    index, length = _map(index_path(prefix))
    data, bytes_of_data = _map(data_path(prefix))
    start = len(_MAGIC) + struct.calcsize(_HEADER)
    head = bytes(index[:start])
    if not head.startswith(_MAGIC) or length < start:
        raise DataError(f"{index_path(prefix)} is damaged: not an index of a memory-mapped dataset")
    version, code, items = struct.unpack(_HEADER, head[len(_MAGIC) :])
    dtype = next((dtype for dtype, known in _CODES.items() if known == code), None)
    if version != _VERSION or dtype is None or length != start + 12 * items:
        raise DataError(
            f"{index_path(prefix)} is damaged, or of a version or number type that is not read here: {length} bytes, "
            f"version {version}, type {code}, {items} items; copy it again, or run `mtmoe prepare` again"
        )
    sizes = np.frombuffer(index, dtype="<i4", count=items, offset=start)
    places = np.frombuffer(index, dtype="<i8", count=items, offset=start + 4 * items)
    ids = np.frombuffer(data, dtype=dtype, count=bytes_of_data // dtype.itemsize)
    return MappedDataset(prefix, ids, sizes, places, bytes_of_data)


def read_dataset(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Map a dataset and check it.

    Returns:
        (all ids,) in the stored type, and (items,) int32 sizes; both stay on the disk until they are read.

    Raises:
        DataError: a file is missing, or is not what `write_dataset` writes.
    """
    dataset = map_dataset(prefix)
    dataset.check_sizes()
    return dataset.ids, dataset.sizes


def _map(path: Path) -> tuple[mmap.mmap | bytes, int]:
    """Map a file for reading: its pages, and its length in bytes."""
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            return (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if length else b""), length
    except FileNotFoundError:
        raise DataError(f"{path} is missing; copy it again, or run `mtmoe prepare` again") from None


def data_path(prefix: Path) -> Path:
    """Give the path of the ids; the prefix may have dots."""
    return Path(os.fspath(prefix) + ".bin")


def index_path(prefix: Path) -> Path:
    """Give the path of the index; the prefix may have dots."""
    return Path(os.fspath(prefix) + ".idx")
