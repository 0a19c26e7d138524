"""Write what ``torch.save`` makes: whole or not at all, and with an error that a user understands."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from mtmoe.errors import CheckpointError
from mtmoe.files import replacing


class NotWritten(CheckpointError):
    """A checkpoint could not be written; what was there before is whole."""


class Sink:
    """Takes all of a file and keeps the first error: torch's writer in C++ ends the process when one gets through.

    Args:
        file: where the bytes go.
        digest: gets every byte too; the checksum is then of what was meant, not of what a bad disk made of it.
    """

    def __init__(self, file: BinaryIO, digest: Any = None) -> None:
        self.file, self.digest = file, digest
        self.error: OSError | None = None
        self.size = 0
        """Bytes taken so far."""

    def write(self, data: Any) -> int:
        """Take the next bytes."""
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        if self.digest is not None:
            self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: it is flushed, and the error raised, once all is written."""


def save(value: Any, path: Path, *, checksum: bool = True) -> tuple[int, str]:
    """Write `value` to `path` by ``torch.save``, atomically, and on the disk before it returns.

    Args:
        value: what ``torch.save`` takes.
        path: the file to write or replace.
        checksum: compute one of what is written, beside those of 32 bits that are in torch's files.

    Returns:
        Size in bytes and SHA-256 of the file, "" without `checksum`.

    Raises:
        NotWritten: the disk is full or fails. The file of that name is as it was.
    """
    digest = hashlib.sha256() if checksum else None
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            sink = Sink(file, digest)
            torch.save(value, cast("BinaryIO", sink))
            if sink.error is not None:
                raise sink.error
            file.flush()
    except OSError as error:
        raise not_written(path, error, tensor_bytes(value)) from error
    return sink.size, digest.hexdigest() if digest is not None else ""


def not_written(path: Path, error: OSError, needed: int) -> NotWritten:
    """The error of a file that needs `needed` bytes and met an error of the system."""
    free = shutil.disk_usage(_existing(path)).free / 1e6
    room = f" (it needs about {needed / 1e6:,.0f} MB, {free:,.0f} MB are free)"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return NotWritten(f"{path} could not be written: {error.strerror or error}{room if full else ''}")


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers, each storage once."""
    storages: dict[int, int] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return sum(storages.values())


def _existing(path: Path) -> Path:
    return next(each for each in path.absolute().parents if each.exists())
