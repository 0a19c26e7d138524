"""Atomic file writing: a reader sees the old file or the whole new one, never half of it; and reading of YAML."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtmoe.errors import ConfigError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move it there once the block has ended well.

    The file is synced before the rename and its folder after it, so that a power cut leaves the old or the new file.
    If the block raises, `path` stays as it was and the temporary file is removed.

    Args:
        path: where the finished file belongs; its folder is made if it is missing.

    Yields:
        The temporary path to write to.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; give it the mode that an ordinary open() would have given.
        os.chmod(temporary, 0o666 & ~_umask())
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_yaml(path: str | os.PathLike[str], what: str = "") -> Any:
    """Read a YAML file that a user wrote.

    Args:
        path: the file.
        what: it is, for the text of an error.

    Raises:
        ConfigError: it cannot be read, or is no YAML.
    """
    name = f"{what} {path}".lstrip()
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path`, atomically; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def duplicate(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give the content of `source` to `target` too, atomically.

    A second name for the same bytes where the file system has links, which takes no time and no space: right for
    files that are only ever replaced, never changed.
    """
    with replacing(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)


def remove_abandoned(folder: str | os.PathLike[str], pattern: str) -> list[Path]:
    """Remove what a process that was killed in `replacing` left behind; nobody may be writing there now.

    Args:
        folder: where the finished files would be; it may be missing.
        pattern: glob pattern of their names.

    Returns:
        The files removed.
    """
    found = sorted(Path(folder).glob(f".{pattern}.????????.tmp"))
    for path in found:
        with contextlib.suppress(OSError):
            path.unlink()
    return found


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Let the names in a folder survive a power cut."""
    _sync(Path(path), os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
