"""Lines of a text file, plain or compressed, with an error that names the file and the line."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from mtmoe.errors import DataError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Give the lines of a UTF-8 file one by one.

    Only ``\n`` ends a line (a ``\r`` before it is taken off), so that the separators that Unicode knows besides, U+2028
    or U+0085, stay inside their sentence. ``.gz``, ``.bz2`` and ``.xz`` are unpacked on the way.

    Yields:
        The number of the line, from 1, and its text without the line end.

    Raises:
        DataError: the file is missing, no UTF-8, or cut short; the text names file and line.
    """
    number = 0
    try:
        with open_binary(path) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8").rstrip("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at place "
                        f"{error.start + 1}); convert the file, for instance with iconv"
                    ) from None
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise DataError(
            f"{path}, after line {number}: cannot read on, the file is damaged or cut short ({error})"
        ) from None


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, unpacked as its name says."""
    match path.suffix:
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".bz2":
            return cast(IO[bytes], bz2.open(path, "rb"))
        case ".xz":
            return cast(IO[bytes], lzma.open(path, "rb"))
        case ".zst" | ".zip" | ".7z" | ".Z" | ".lz4":
            raise DataError(
                f"{path}: {path.suffix} files are not read; unpack it first, or pack it as .gz, .bz2 or .xz"
            )
        case _:
            return path.open("rb")


def sha256_of(path: Path) -> str:
    """Give the SHA-256 sum of a file in hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
