"""Many checkpoints in one folder: the newest complete one, names for them, and removing old ones.

A checkpoint is a directory that never changes. Names that move on, such as ``checkpoint_last.pt``, are symbolic links
to it, each replaced in one step; a directory without a name may go.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mtmoe.checkpoint.sharded.manifest import Manifest, read_manifest
from mtmoe.checkpoint.sharded.reading import check_files
from mtmoe.errors import CheckpointError
from mtmoe.files import sync_folder

PATTERN = "checkpoint*"
"""Names of checkpoints."""

OF_A_RUN = re.compile(r"checkpoint_\d+_\d+(\.\d+)?")
"""Names that a run gives: epoch and update. Others belong to the user, and are never removed."""


@dataclass(frozen=True, slots=True)
class Complete:
    """A complete checkpoint."""

    directory: Path
    manifest: Manifest


def complete_checkpoints(
    folder: Path, complain: Callable[[str], None], *, contents: bool = True
) -> Iterator[Complete]:
    """The complete checkpoints of a folder, newest first: most updates, then latest.

    Manifests and sizes are compared at once, contents when the turn of a checkpoint comes, so that taking the first
    reads the bytes of one.

    Args:
        folder: where they are; it may be missing.
        complain: gets a line about each that is not complete.
        contents: compare the checksums of all files.
    """
    found = []
    for directory in sorted(folder.glob(PATTERN)):
        if directory.is_symlink() or not directory.is_dir():
            continue
        try:
            manifest = read_manifest(directory)
            check_files(directory, manifest, contents=False)
        except CheckpointError as error:
            complain(str(error))
        else:
            found.append((manifest.num_updates, directory.stat().st_mtime_ns, directory, manifest))
    for _, _, directory, manifest in sorted(found, key=lambda each: each[:3], reverse=True):
        try:
            if contents:
                check_files(directory, manifest)
        except CheckpointError as error:
            complain(str(error))
        else:
            yield Complete(directory, manifest)


def newest_complete(folder: Path, complain: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a folder; None if there is none.

    Args:
        folder: where checkpoints are.
        complain: gets a line about each that is not complete, and why.
    """
    for path in sorted(folder.glob(f".{PATTERN}.saving")):
        complain(f"{path} is not complete: saving has not ended, or was killed")
    newest = next(complete_checkpoints(folder, complain), None)
    return None if newest is None else newest.directory


def free_directory(folder: Path, name: str) -> Path:
    """A path for a new checkpoint: `name`, or with ``.2``, ``.3``, … where that is taken."""
    path, number = folder / name, 1
    while os.path.lexists(path):
        number += 1
        path = folder / f"{name}.{number}"
    return path


def give_name(directory: Path, name: Path) -> None:
    """Let `name` mean a checkpoint that lies beside it, whatever it meant before; in one step."""
    temporary = Path(tempfile.mktemp(prefix=f".{name.name}.", suffix=".tmp", dir=name.parent))
    temporary.symlink_to(directory.name, target_is_directory=True)
    try:
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(name.parent)


def remove_old(folder: Path, keep: int) -> list[Path]:
    """Remove all complete checkpoints of a run but the newest and those with a name; never the last complete one.

    Args:
        folder: where they are.
        keep: how many of the newest stay, at least 1.

    Returns:
        What was removed; directories that are not complete are left to their owner.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1: the last complete checkpoint is never removed")
    complete = [each.directory for each in complete_checkpoints(folder, lambda _: None, contents=False)]
    return _remove([each for each in complete[keep:] if each.name not in _named(folder)])


def remove_unnamed(folder: Path, *, spare_last: bool = True) -> list[Path]:
    """Remove the complete checkpoints of a run that no name leads to; if none has a name, the newest stays.

    Args:
        folder: where they are.
        spare_last: False where the caller has just written a checkpoint of another kind, which is whole.

    Returns:
        What was removed.
    """
    complete = [each.directory for each in complete_checkpoints(folder, lambda _: None, contents=False)]
    named = _named(folder)
    spared = complete[:1] if spare_last and not any(each.name in named for each in complete) else []
    return _remove([each for each in complete if each.name not in named and each not in spared])


def remove_abandoned_saves(folder: Path) -> list[Path]:
    """Remove what killed processes left half written or half removed; nobody may be saving there now.

    Returns:
        The directories removed.
    """
    found = [path for end in ("saving", "removed") for path in sorted(folder.glob(f".{PATTERN}.{end}"))]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def _named(folder: Path) -> set[str]:
    """Names of the directories that links in the folder lead to."""
    return {path.resolve().name for path in folder.iterdir() if path.is_symlink()}


def _remove(directories: list[Path]) -> list[Path]:
    removed = [each for each in directories if OF_A_RUN.fullmatch(each.name)]
    for directory in removed:
        hidden = directory.with_name(f".{directory.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        # Out of sight in one step: a checkpoint of which half is removed is never found.
        os.replace(directory, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return removed
