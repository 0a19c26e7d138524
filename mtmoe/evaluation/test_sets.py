"""Reading the test or validation text of prepared data, one direction at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe.errors import DataError
from mtmoe.evaluation.buckets import pair_of, split_direction
from mtmoe.files import write_text

SPLITS = ("test", "valid")
"""The splits that can be evaluated; training text is not kept as text."""


@dataclass(frozen=True, slots=True)
class TestSet:
    """The segments of one direction."""

    __test__ = False  # the name looks like a test class to pytest

    direction: str
    """Such as ``en-de``."""
    sources: list[str]
    """Segments to translate."""
    references: list[str]
    """Their right translations, in the same order."""

    @property
    def source(self) -> str:
        """Language of the sources."""
        return split_direction(self.direction)[0]

    @property
    def target(self) -> str:
        """Language of the references."""
        return split_direction(self.direction)[1]

    @property
    def fingerprint(self) -> str:
        """Sha256 over direction, sources and references: equal exactly when two evaluations can be compared."""
        return digest([self.direction, *self.sources, "", *self.references])


def digest(lines: Sequence[str]) -> str:
    """Sha256 of a list of texts, which differs also when only the border between two of them moves."""
    return hashlib.sha256(json.dumps(list(lines), ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def read_lines(path: Path) -> list[str]:
    """Read UTF-8 text, one segment a line; only a newline ends a line, so U+2028 and a form feed stay inside.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})") from error
    return text.removesuffix("\n").split("\n") if text else []


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write one segment a line, atomically; a line break inside a segment becomes a space."""
    write_text(path, "".join(line.replace("\r", " ").replace("\n", " ") + "\n" for line in lines))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing or holds no JSON object; the text names `what` the file is.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; it is {what}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} ({what}) is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} ({what}) is not a JSON object")
    return value


class PreparedData:
    """A folder that ``mtmoe prepare`` wrote, as far as evaluation reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "languages.json", "part of the folder that `mtmoe prepare` writes")
        self.description = read_json(self.folder / "data.json", "part of the folder that `mtmoe prepare` writes")
        try:
            self.languages: list[str] = list(index["languages"])
            self.directions: list[str] = list(index["directions"])
        except KeyError as error:
            raise DataError(f"{self.folder / 'languages.json'} lacks {error}; prepare the data again") from error

    def _files(self, direction: str, split: str) -> tuple[Path, Path]:
        pair = pair_of(direction)
        source, target = split_direction(direction)
        text = self.folder / "text"
        return text / f"{split}.{pair}.{source}", text / f"{split}.{pair}.{target}"

    def has_text(self, direction: str, split: str) -> bool:
        """Whether there is any `split` text for this direction."""
        return all(path.is_file() and path.stat().st_size > 0 for path in self._files(direction, split))

    def choose_directions(self, wanted: Sequence[str] | None, split: str) -> list[str]:
        """Decide which directions to evaluate.

        Args:
            wanted: directions, in the order of the report; None takes every direction of languages.json that has text.
            split: "test" or "valid".

        Raises:
            DataError: a wanted direction is unknown or has no text, or no direction has any.
        """
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown; choose one of: {', '.join(SPLITS)}")
        available = [direction for direction in self.directions if self.has_text(direction, split)]
        if wanted is None:
            if not available:
                raise DataError(f"{self.folder / 'text'} has no {split} text for any direction of languages.json")
            return available
        if not wanted:
            raise DataError(f"no direction was named; {self.folder} has {split} text for {', '.join(available)}")
        missing = [direction for direction in wanted if not self.has_text(direction, split)]
        if missing:
            raise DataError(
                f"{self.folder} has no {split} text for {', '.join(missing)}; it has: {', '.join(available) or 'none'}"
            )
        return list(dict.fromkeys(wanted))

    def read(self, direction: str, split: str, limit: int = 0) -> TestSet:
        """Read one direction's segments.

        Args:
            direction: such as ``en-de``.
            split: "test" or "valid".
            limit: take the first so many segments; 0 takes all.

        Raises:
            DataError: a file is missing or not UTF-8, or the two sides differ in length.
        """
        source_file, target_file = self._files(direction, split)
        sources, references = read_lines(source_file), read_lines(target_file)
        if len(sources) != len(references):
            raise DataError(
                f"{source_file} has {len(sources)} lines and {target_file} has {len(references)}; "
                "the two sides of a test set must have the same"
            )
        end = limit or None
        return TestSet(direction, sources[:end], references[:end])
