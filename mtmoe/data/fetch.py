"""Fetch a wheel with pip, check its sum, and keep it in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mtmoe.data.recipe import Input
from mtmoe.data.textfile import sha256_of
from mtmoe.errors import DataError
from mtmoe.files import replacing


def default_cache() -> Path:
    """Give the folder for fetched files: ``$XDG_CACHE_HOME/mtmoe``, or ``~/.cache/mtmoe``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtmoe"


def fetch_wheel(source: Input, cache: Path, given: Path | None = None) -> Path:
    """Make sure that the wheel of an input is here, whole and the right one.

    Args:
        source: an input of type ``wheel``.
        cache: folder in which a fetched wheel is kept; made if it is missing.
        given: a wheel that the user has already; nothing is fetched then.

    Returns:
        The path of the wheel.

    Raises:
        DataError: it cannot be fetched, or is not the file that the recipe means; the text says what to do.
    """
    assert source.file is not None  # checked when the recipe was read
    if given is not None:
        check_sum(given, source.sha256)
        return given
    cached = cache / source.file
    if not cached.exists():
        _download(source, cached)
    check_sum(cached, source.sha256, hint="; delete the file and run again to fetch it anew")
    return cached


def check_sum(path: Path, expected: str | None, hint: str = "") -> str:
    """Give the SHA-256 sum of a file, and insist on `expected` if it is given.

    Raises:
        DataError: the file is missing or has another sum.
    """
    actual = sha256_of(path)
    if expected is not None and actual != expected.lower():
        raise DataError(f"{path}: sha256 is {actual}, the recipe says {expected}: a damaged or a different file{hint}")
    return actual


def pip_command(source: Input, folder: Path) -> list[str]:
    """Give the command that downloads the wheel of an input into `folder` and installs nothing."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if source.python is not None:
        command += ["--python-version", source.python]
    return [*command, f"{source.package}=={source.version}"]


def _download(source: Input, cached: Path) -> None:
    assert source.file is not None
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cached.parent) as folder:
        command = pip_command(source, Path(folder))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder) / source.file
        if done.returncode != 0 or not fetched.exists():
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
            raise DataError(
                f"pip could not fetch {source.file}: {reason.strip()}\n"
                "If this machine is offline, fetch it on another one with\n"
                f"  {' '.join(['python', *command[1:6], *command[8:]])}\n"
                f"and give it with --wheel {source.file}, or put it into {cached.parent}"
            )
        with replacing(cached) as temporary:
            shutil.move(fetched, temporary)
