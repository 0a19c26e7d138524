"""Results as JSON lines, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Store:
    """A file with one record a line; each record has a ``key``, and the latest with a key counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a run that was killed
                    continue
                self.records[name_of(record["key"])] = record

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return name_of(key) in self.records

    def __getitem__(self, key: Mapping[str, Any]) -> dict[str, Any]:
        return self.records[name_of(key)]

    def add(self, key: Mapping[str, Any], **values: Any) -> None:
        """Append a record and remember it."""
        record = {"key": dict(key), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
        self.records[name_of(key)] = record

    def select(self, keys: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The records of those keys that there are, in that order."""
        return [self[key] for key in keys if key in self]


def name_of(key: Mapping[str, Any]) -> str:
    """A key as text, whatever the order of its entries."""
    return json.dumps(dict(key), sort_keys=True)
