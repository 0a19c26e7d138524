"""The checkpoints of a run: which are whole, of which update, and which to go back to."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtmoe.checkpoint.sharded import check_files, is_sharded, read_manifest
from mtmoe.errors import CheckpointError

NAMES = re.compile(r"checkpoint(\d+|_last|_best|_good|_\d+_\d+|\.best_.+)\.pt")
"""What fairseq and the plugins call the checkpoints of a run. What a crash leaves (``crash.pt``) is none."""

ZIP, PICKLE = b"PK\3\4", b"\x80"
"""How checkpoints begin: torch's format since 1.6, and the one before."""


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that can be read."""

    path: Path
    num_updates: int
    """Updates that it has behind it."""
    steady: bool
    """Whether its last update was an ordinary one, not skipped as non-finite or as a spike."""


def read_header(path: Path) -> SavedCheckpoint:
    """Read what a checkpoint is of, a file or a directory; its weights are not touched.

    Raises:
        CheckpointError: it is missing, cut short or damaged; the text says which.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        check_files(path, manifest, contents=False)
        return SavedCheckpoint(path, manifest.num_updates, steady=bool(manifest.about.get("steady", True)))
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if not start:
            raise CheckpointError(f"{path} is empty")
        if start != ZIP and not start.startswith(PICKLE):
            raise CheckpointError(f"{path} is damaged: it does not begin as a checkpoint does")
        if start == ZIP and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short")
        return _header(path, torch.load(path, map_location="cpu", weights_only=True, mmap=start == ZIP))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can end in nearly any error of the loader
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be loaded: {first}") from error


def _header(path: Path, state: dict[str, Any]) -> SavedCheckpoint:
    progress = state["extra_state"]["train_iterator"].get("progress", {})
    return SavedCheckpoint(
        path,
        num_updates=state["optimizer_history"][-1]["num_updates"],
        steady=progress.get("consecutive_skipped", 0) == 0,
    )


def check_whole(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare all bytes of a checkpoint with its checksums: torch loads a changed one without noticing.

    Args:
        path: a file or a directory.
        part: processes may share the files of a directory out: this one's number, from 0. A file is the first's.
        parts: how many there are.

    Raises:
        CheckpointError: it is missing or damaged; the text says which.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        check_files(path, manifest, sorted(manifest.files)[part::parts])
        return
    if part:
        return
    try:
        with path.open("rb") as file:
            if file.read(4) != ZIP:
                return  # the old format has no checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is cut short or damaged: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")


def saved_checkpoints(folder: Path, complain: Callable[[str], None]) -> list[SavedCheckpoint]:
    """The checkpoints of a run whose headers can be read, files and directories: the steady ones first, newest first.

    Args:
        folder: where they are; it may be missing.
        complain: gets a line about each that cannot be read.

    Returns:
        Of several names of one the first.
    """
    found: list[SavedCheckpoint] = []
    seen: set[tuple[int, int]] = set()
    for path in sorted(folder.glob("checkpoint*")):
        if not NAMES.fullmatch(path.name) and not is_sharded(path):
            continue
        if not path.exists():
            complain(f"{path} leads to {path.readlink()}, which does not exist")
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            found.append(read_header(path))
        except CheckpointError as error:
            complain(str(error))
    return sorted(found, key=lambda each: (each.steady, each.num_updates), reverse=True)


def whole_checkpoints(
    folder: Path, complain: Callable[[str], None], *, until: float = float("inf"), avoid: int = -1
) -> Iterator[SavedCheckpoint]:
    """The checkpoints of a run that are whole: the steady ones first, newest first.

    A file is checked byte by byte when its turn comes, so that taking the first costs one file.

    Args:
        folder: where they are; it may be missing.
        complain: gets a line about each file that is not whole.
        until: leave out those of later updates.
        avoid: those of this update come after the other steady ones.

    Yields:
        Of several names of one file the first.
    """
    found = saved_checkpoints(folder, complain)
    found.sort(key=lambda each: (each.steady, each.num_updates != avoid, each.num_updates), reverse=True)
    for checkpoint in found:
        if checkpoint.num_updates > until:
            continue
        try:
            check_whole(checkpoint.path)
        except CheckpointError as error:
            complain(str(error))
        else:
            yield checkpoint
