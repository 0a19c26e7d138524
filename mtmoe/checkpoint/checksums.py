"""The checksums of a model folder: ``checksums.json`` has the size and the SHA-256 of each file.

Sizes, and the contents of small files, are compared whenever a folder is opened. The weights are hashed too where all
of them have at most `HASHED_BYTES`: they are about to be read anyway, and a flipped bit in a weight is noticed by
nothing else. Larger ones are mapped and read in part, which hashing would undo; ask for it (``verify=True``, `mtmoe
inspect --verify`) after copying.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtmoe.checkpoint.stored import read_json
from mtmoe.errors import CheckpointError
from mtmoe.files import write_json

CHECKSUMS = "checksums.json"

HASHED_BYTES = 1_000_000_000
"""Weights of so many bytes or fewer are compared with their checksum whenever they are opened."""

MEND = "copy it again from where it is whole"


def write_checksums(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write ``checksums.json``.

    Args:
        folder: where the files are.
        hashes: file name -> its SHA-256; a name without one ("") is read and hashed.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name] or sha256(folder / name)}
        for name in sorted(hashes)
    }
    write_json(folder / CHECKSUMS, {"files": files})


def read_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its ``bytes`` and ``sha256``.

    Raises:
        CheckpointError: it is missing or not of this form.
    """
    path = folder / CHECKSUMS
    values = read_json(path)
    files = values.get("files") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} lacks files; {MEND}")
    for name, entry in files.items():
        sound = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not sound or Path(name).name != name:
            raise CheckpointError(f"{path}: files.{name} must have bytes and sha256, not {entry!r}; {MEND}")
    return files


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the size of each file with what checksums.json says.

    Raises:
        CheckpointError: a file is missing, or longer or shorter.
    """
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{folder / name} is missing, and {CHECKSUMS} lists it: {error.strerror}; {MEND}"
            ) from error
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{folder / name} is damaged: it has {size:,} bytes, {CHECKSUMS} says {entry['bytes']:,}; {MEND}"
            )


def check_hashes(folder: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    """Compare the content of some files with their checksums.

    Raises:
        CheckpointError: one differs.
    """
    for name in names:
        if sha256(folder / name) != files[name]["sha256"]:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 is not the one that {CHECKSUMS} has; {MEND}"
            )


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
