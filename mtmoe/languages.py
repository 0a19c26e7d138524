"""Languages: one short code for each, from and to BCP-47, ISO 639-3 and FLORES-200, with names and scripts.

The code used everywhere in mtmoe is BCP-47 with ``_`` for ``-``, the two-letter language where there is one and no
script where it is the usual one: ``de``, ``zh`` (simplified) and ``zh_Hant``, ``sr`` (Cyrillic) and ``sr_Latn``.
The table is ``languages.tsv`` beside this file: all of FLORES-200, and what the recipes need besides.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtmoe.errors import UnknownLanguage


@dataclass(frozen=True, slots=True)
class Language:
    """One row of the table."""

    code: str
    """mtmoe's code, ``de`` or ``zh_Hant``."""
    flores: str
    """ISO 639-3 and script, as FLORES-200 and NLLB write it: ``deu_Latn``."""
    name: str
    """English name."""
    aliases: tuple[str, ...] = ()
    """Other codes for it: the macrolanguage (``mlg``), old and bibliographic codes (``iw``, ``ger``)."""

    @property
    def iso639_3(self) -> str:
        """Three-letter code of the individual language, ``deu``."""
        return self.flores.split("_")[0]

    @property
    def script(self) -> str:
        """ISO 15924 code of its script, ``Latn``."""
        return self.flores.split("_")[1]


def canonical(code: str) -> str:
    """Turn any known code into mtmoe's.

    Args:
        code: ``de``, ``deu``, ``deu_Latn``, ``de-Latn``, ``de-DE``; case and ``-`` against ``_`` do not matter. A
            region is left out (``pt-BR`` is ``pt``), except that Chinese of Taiwan, Hong Kong and Macao is ``zh_Hant``.

    Returns:
        The code, such as ``de``.

    Raises:
        UnknownLanguage: the table has no such language; the text names close matches.
    """
    return language(code).code


def language(code: str) -> Language:
    """Find the row of a language by any of its codes; see `canonical`."""
    index = _index()
    wanted = code.strip().replace("-", "_").lower()
    parts = wanted.split("_")
    if wanted in index:
        return index[wanted]
    if parts[0] in index:
        scripts = [part for part in parts[1:] if re.fullmatch("[a-z]{4}", part)]
        regions = [part for part in parts[1:] if re.fullmatch("[a-z]{2}|[0-9]{3}", part)]
        if len(parts) == 1 + len(scripts) + len(regions) and len(scripts) <= 1 and len(regions) <= 1:
            script = scripts[0] if scripts else _script_of_region(parts[0], regions)
            found = index.get(f"{index[parts[0]].iso639_3}_{script}") if script else index[parts[0]]
            if found is not None:
                return found
    raise UnknownLanguage(f"language {code!r} is unknown{_suggestion(wanted)}")


def flores(code: str) -> str:
    """Give the FLORES-200 code, ``deu_Latn``, of a language named by any of its codes."""
    return language(code).flores


def iso639_3(code: str) -> str:
    """Give the ISO 639-3 code, ``deu``, of a language named by any of its codes."""
    return language(code).iso639_3


def name(code: str) -> str:
    """Give the English name of a language named by any of its codes."""
    return language(code).name


def script(code: str) -> str:
    """Give the ISO 15924 script code, ``Latn``, of a language named by any of its codes."""
    return language(code).script


def tag(code: str) -> str:
    """Give the token that stands for a language in the dictionary, ``__de__``."""
    return f"__{canonical(code)}__"


def all_languages() -> tuple[Language, ...]:
    """List the whole table, sorted by code."""
    return _table()


def parse_direction(direction: str) -> tuple[str, str]:
    """Split ``en-de``, or ``eng_Latn-deu_Latn``, into the codes of its source and target.

    Raises:
        UnknownLanguage: it is no direction, its sides are one language, or a language is unknown.
    """
    # A hyphen may also stand inside a code (zh-Hant-en), so try each one.
    splits = [(direction[: hyphen.start()], direction[hyphen.end() :]) for hyphen in re.finditer("-", direction)]
    found = [(source, target) for source, target in splits if _known(source) and _known(target)]
    if len(found) > 1:
        raise UnknownLanguage(
            f"{direction!r} can be read in {len(found)} ways; write _ inside a code, as in 'pt_BR-en'"
        )
    if found:
        source, target = map(canonical, found[0])
        if source == target:
            raise UnknownLanguage(f"direction {direction!r} has the same language on both sides")
        return source, target
    unknown = next((side for side in direction.split("-", 1) if not _known(side)), direction)
    raise UnknownLanguage(f"{direction!r} is no direction such as 'en-de': language {unknown!r} is unknown")


def require(code: str, known: Iterable[str], role: str = "language") -> str:
    """Turn a code into mtmoe's and insist that it is one of `known`.

    Args:
        code: any code of the language.
        known: mtmoe's codes of the languages at hand, those of a model for instance.
        role: what to call it in the error, ``source`` or ``target``.

    Raises:
        UnknownLanguage: the table or `known` does not have it; the text lists `known` and names close matches.
    """
    allowed = sorted(known)
    try:
        found: str | None = canonical(code)
    except UnknownLanguage:
        found = None
    if found in allowed:
        assert found is not None
        return found
    close = [item for item in _close(code.lower().replace("-", "_")) if item.code in allowed]
    hint = f" Did you mean {' or '.join(repr(item.code) for item in close)}?" if close else ""
    raise UnknownLanguage(f"{role} {code!r} is not in this model; it knows {', '.join(allowed)}.{hint}")


@cache
def _table() -> tuple[Language, ...]:
    rows = []
    text = Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8")
    for line in text.splitlines()[1:]:
        code, flores_code, english, aliases = line.split("\t")
        rows.append(Language(code, flores_code, english, tuple(aliases.split())))
    return tuple(rows)


@cache
def _index() -> dict[str, Language]:
    index: dict[str, Language] = {}
    for row in _table():
        keys = [row.code, row.flores, *row.aliases]
        keys += [f"{key}_{row.script}" for key in (row.code, *row.aliases) if "_" not in key]
        if "_" not in row.code:  # the usual script of the language: it owns the bare ISO code
            keys.append(row.iso639_3)
        for key in keys:
            index.setdefault(key.lower(), row)
    return index


def _script_of_region(base: str, regions: list[str]) -> str | None:
    return "hant" if base in ("zh", "zho", "cmn") and set(regions) & {"tw", "hk", "mo"} else None


def _known(code: str) -> bool:
    try:
        language(code)
    except UnknownLanguage:
        return False
    return True


def _close(wanted: str) -> list[Language]:
    """Languages whose name or code looks like `wanted`, best first."""
    by_word = {word: row for row in _table() for word in (row.name.lower(), row.name.lower().split()[0])}
    by_word |= _index()
    found: list[Language] = []
    for word in difflib.get_close_matches(wanted, by_word, n=6, cutoff=0.6):
        if by_word[word] not in found:
            found.append(by_word[word])
    return found[:3]


def _suggestion(wanted: str) -> str:
    close = _close(wanted)
    if not close:
        return "; give a BCP-47 or FLORES-200 code such as 'de' or 'deu_Latn'"
    return "; did you mean " + " or ".join(f"{row.code!r} ({row.name}, {row.flores})" for row in close) + "?"
