"""Readers of parallel text: tab-separated pairs, verse tables, Moses' two files, and JSON lines.

A reader yields `Row` after `Row` and stops with a `DataError` that names file, line and reason where the text is not
what the recipe says. Blank lines are an error in tables, and in Moses' files an empty side, which cleaning drops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from mtmoe.data.recipe import Input
from mtmoe.data.rows import Pair, Row
from mtmoe.data.textfile import read_lines
from mtmoe.errors import DataError, UnknownLanguage
from mtmoe.languages import canonical


def read_tsv(source: Input, paths: Sequence[Path], pairs: Collection[Pair]) -> Iterator[Row]:
    """Read a sentence pair a line, in the columns that the recipe names; pairs that are not wanted are passed over."""
    (path,) = paths
    columns = {name: number for number, name in enumerate(source.columns)}
    text_a, text_b = columns["text_a"], columns["text_b"]
    fixed = tuple(canonical(code) for code in source.languages)
    code_of = _Codes(path)
    for number, line in read_lines(path):
        cells = _cells(path, number, line, source.columns)
        if fixed:
            a, b = fixed
        else:
            a = code_of(number, cells[columns["language_a"]])
            b = code_of(number, cells[columns["language_b"]])
        if (a, b) in pairs or (b, a) in pairs:
            yield Row(source.split, a, b, cells[text_a], cells[text_b])


def read_verses(source: Input, paths: Sequence[Path], pairs: Collection[Pair]) -> Iterator[Row]:
    """Read a sentence a line, and pair the sentences of two languages that have the same key.

    Raises:
        DataError: a language has a key twice.
    """
    (path,) = paths
    columns = [source.columns.index(name) for name in ("language", "key", "text")]
    code_of = _Codes(path)
    texts: dict[str, dict[str, str]] = {}
    for number, line in read_lines(path):
        cells = _cells(path, number, line, source.columns)
        code, key, text = (cells[column] for column in columns)
        of_language = texts.setdefault(code_of(number, code), {})
        if key in of_language:
            raise DataError(f"{path}, line {number}: language {code!r} has the key {key!r} twice")
        of_language[key] = text
    for a, b in sorted(pairs):
        other = texts.get(b, {})
        for key, text in texts.get(a, {}).items():
            if key in other:
                yield Row(source.split, a, b, text, other[key])


def read_moses(source: Input, paths: Sequence[Path], pairs: Collection[Pair]) -> Iterator[Row]:
    """Read two files whose lines with the same number translate each other.

    Raises:
        DataError: one file has more lines than the other.
    """
    a, b = (canonical(code) for code in source.languages)
    wanted = (a, b) in pairs or (b, a) in pairs
    last = 0
    for line_a, line_b in zip_longest(read_lines(paths[0]), read_lines(paths[1])):
        if line_a is None or line_b is None:
            longer, shorter = (paths[1], paths[0]) if line_a is None else paths
            raise DataError(
                f"{longer}, line {last + 1}: {shorter} ends after line {last}; "
                "the two files must have equally many lines"
            )
        last = line_a[0]
        if wanted:
            yield Row(source.split, a, b, line_a[1], line_b[1])


def read_jsonl(source: Input, paths: Sequence[Path], pairs: Collection[Pair]) -> Iterator[Row]:
    """Read a JSON object a line; the recipe names the fields, with dots for objects in objects (``translation.de``)."""
    (path,) = paths
    fields = {name: place.split(".") for name, place in source.fields.items()}
    fixed = tuple(canonical(code) for code in source.languages)
    code_of = _Codes(path)
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
        cells = {name: _field(path, number, value, place) for name, place in fields.items()}
        if fixed:
            a, b = fixed
        else:
            a, b = code_of(number, cells["language_a"]), code_of(number, cells["language_b"])
        if (a, b) in pairs or (b, a) in pairs:
            yield Row(source.split, a, b, cells["text_a"], cells["text_b"])


Reader = Callable[[Input, Sequence[Path], Collection[Pair]], Iterator[Row]]

READERS: dict[str, Reader] = {"tsv": read_tsv, "verses": read_verses, "moses": read_moses, "jsonl": read_jsonl}
"""Type of an input -> its reader. The wheel, which is fetched first, has a file of its own."""


class _Codes:
    """Turns the codes of a column into mtmoe's, each looked up once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, str] = {}

    def __call__(self, number: int, code: str) -> str:
        found = self.known.get(code)
        if found is None:
            try:
                found = self.known[code] = canonical(code)
            except UnknownLanguage as error:
                raise DataError(f"{self.path}, line {number}: {error}") from None
        return found


def _cells(path: Path, number: int, line: str, columns: Sequence[str]) -> list[str]:
    cells = line.split("\t")
    if len(cells) != len(columns):
        raise DataError(
            f"{path}, line {number}: {len(cells)} columns, the recipe says {len(columns)} ({', '.join(columns)}), "
            "separated by single tabs"
        )
    return cells


def _field(path: Path, number: int, value: object, place: Sequence[str]) -> str:
    for name in place:
        if not isinstance(value, dict) or name not in value:
            raise DataError(f"{path}, line {number}: there is no field {'.'.join(place)!r}")
        value = value[name]
    if not isinstance(value, str):
        raise DataError(f"{path}, line {number}: the field {'.'.join(place)!r} is no text")
    return value
