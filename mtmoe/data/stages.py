"""Stages of a long job: each leaves a stamp when it is done, and a later run takes up where the last one stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtmoe.errors import DataError
from mtmoe.files import write_json


def fingerprint(values: Any) -> str:
    """Give the SHA-256 sum of plain values, the same in every run and on every machine."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Stages:
    """Runs stages inside a folder, and remembers in ``.stages`` which are done."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is made with the first stage."""
        self.folder = folder
        self.stamps = folder / ".stages"

    def result(self, name: str, mark: str) -> Mapping[str, Any] | None:
        """Give what a finished stage returned, or None if it must run: not finished, or from other settings."""
        try:
            stamp = json.loads((self.stamps / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return stamp["result"] if stamp["fingerprint"] == mark else None

    def run(
        self, name: str, mark: str, outputs: list[Path], work: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """Run a stage unless it is done.

        Args:
            name: of the stage, a file name.
            mark: `fingerprint` of all that decides its result.
            outputs: files and folders that are the stage's own; what an interrupted run left there is removed.
            work: does it, and returns plain values that are kept with the stamp.

        Returns:
            What `work` returned, now or then.
        """
        done = self.result(name, mark)
        if done is not None:
            return done
        (self.stamps / f"{name}.json").unlink(missing_ok=True)
        for output in outputs:
            if output.is_dir():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)
        result = work()
        write_json(self.stamps / f"{name}.json", {"fingerprint": mark, "result": result})
        return result

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of the folder; the system lifts the lock when the process ends, however it ends.

        Raises:
            DataError: another process is at work there.
        """
        self.stamps.mkdir(parents=True, exist_ok=True)
        with (self.stamps / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{self.folder}: another process is preparing this data; wait for it") from None
            yield

    def forget(self) -> None:
        """Remove the stamps, once the whole job is done."""
        shutil.rmtree(self.stamps, ignore_errors=True)
