"""Interface messages of a Python package as parallel text: Home Assistant's translations, straight from the wheel.

Each ``homeassistant/components/<component>/translations/<language>.json`` is a tree of messages; the same component
and path of keys is the same message in every language. The messages of two languages are paired by it, each is held
against the English one, and the split is that of the English message, so that every pair has the same English in the
same split.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mtmoe.data.recipe import Input
from mtmoe.data.rows import Pair, Row
from mtmoe.errors import DataError
from mtmoe.languages import script
from mtmoe.normalise import match_key, normalise

Messages = dict[tuple[str, str], str]
"""(component, path of keys) -> normalised message."""

_MESSAGE_FILE = re.compile(r"homeassistant/components/([^/]+)/translations/([^/]+)\.json")
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_PLURAL = re.compile(r"\{[^{}]*,\s*(plural|select)")
_SALT = "ha-quickstart|"
_VALID, _TEST = 20, 50
"""Of 1000 English messages the first 20 are valid, those up to 50 test."""


def read_wheel(source: Input, path: Path, pairs: Collection[Pair]) -> Iterator[Row]:
    """Pair the messages of the wheel for each wanted pair, sorted by English and translation.

    Yields:
        Rows with the split of their English message; those that the rules leave out say why in `dropped`.

    Raises:
        DataError: the file is no wheel with such messages, or is damaged.
    """
    wanted = {code for pair in pairs for code in pair} | {"en"}
    messages = read_messages(path, wanted)
    english = messages["en"]
    kept = {text: _split_of(text) for text in set(english.values())}
    faults: dict[str, dict[tuple[str, str], str]] = {}
    for code in wanted - {"en"}:
        faults[code] = {key: fault_of(english[key], text) for key, text in messages[code].items() if key in english}
    for a, b in sorted(pairs):
        others = [code for code in (a, b) if code != "en"]
        shared = [key for key in faults[others[0]] if all(key in faults[code] for code in others)]
        shared.sort(key=lambda key, others=others: (english[key], *(messages[code][key] for code in others)))  # type: ignore[misc]
        for key in shared:
            fault = next((faults[code][key] for code in others if faults[code][key]), "")
            yield Row(kept[english[key]], a, b, messages[a][key], messages[b][key], fault)


def read_messages(path: Path, codes: Collection[str]) -> dict[str, Messages]:
    """Read the messages of some languages, normalised.

    Args:
        path: the wheel.
        codes: mtmoe's codes; each is looked for under its BCP-47 code, with and without its script.

    Raises:
        DataError: a language has no messages, or the wheel is damaged.
    """
    file_names = {name: code for code in codes for name in _file_names(code)}
    messages: dict[str, Messages] = {code: {} for code in codes}
    place = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for place in archive.namelist():
                found = _MESSAGE_FILE.fullmatch(place)
                if found is None or found[2] not in file_names:
                    continue
                of_language = messages[file_names[found[2]]]
                for keys, text in _flatten(json.loads(archive.read(place)), ()):
                    of_language[found[1], keys] = normalise(text)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        where = f", {place}" if place else ""
        raise DataError(f"{path}{where}: the wheel is damaged or cut short ({error}); fetch it again") from None
    empty = sorted(code for code in codes if not messages[code])
    if empty:
        raise DataError(f"{path}: the wheel has no messages in {', '.join(empty)}")
    return messages


def fault_of(english: str, translation: str) -> str:
    """Name the rule under which a translation of an English message is left out; empty if it is good.

    Both must be normalised. The limits of length and ratio are the recipe's, see `mtmoe.data.filters`.
    """
    if not english or not translation:
        return "empty"
    if "[%key:" in english or "[%key:" in translation:
        return "unresolved_reference"
    if _PLURAL.search(f"{english} {translation}"):
        return "plural_rule"
    if sorted(_PLACEHOLDER.findall(english)) != sorted(_PLACEHOLDER.findall(translation)):
        return "placeholders_differ"
    if match_key(english) == match_key(translation):
        return "untranslated"
    if not (_has_letter(english) and _has_letter(translation)):
        return "no_letters"
    return ""


def _has_letter(text: str) -> bool:
    return any(map(str.isalpha, _PLACEHOLDER.sub("", text)))


def _split_of(english: str) -> str:
    number = int(hashlib.sha256((_SALT + match_key(english)).encode()).hexdigest()[:8], 16) % 1000
    return "valid" if number < _VALID else "test" if number < _TEST else "train"


def _flatten(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Give each message of a tree with its keys, joined by dots."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from _flatten(branch, (*path, key))
    elif isinstance(tree, str):
        yield ".".join(path), tree


def _file_names(code: str) -> list[str]:
    """Names under which a wheel may hold a language: ``zh-Hans`` and ``zh`` for zh, ``sr-Latn`` for sr_Latn."""
    return [code.replace("_", "-"), f"{code.split('_')[0]}-{script(code)}"]
