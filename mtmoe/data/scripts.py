"""Which script a letter belongs to, and how much of a text is in the script of its language."""

from __future__ import annotations

import unicodedata
from functools import cache

_NAMES: dict[str, tuple[str, ...]] = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cher": ("CHEROKEE",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hang": ("HANGUL", "CJK"),
    "Hans": ("CJK",),
    "Hant": ("CJK", "BOPOMOFO"),
    "Hebr": ("HEBREW",),
    "Jpan": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK", "HALFWIDTH"),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Laoo": ("LAO",),
    "Latn": ("LATIN",),
    "Mlym": ("MALAYALAM",),
    "Mymr": ("MYANMAR",),
    "Olck": ("OL",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Tfng": ("TIFINAGH",),
    "Thai": ("THAI",),
    "Tibt": ("TIBETAN",),
}
"""ISO 15924 code -> first words of the Unicode names of its letters."""

_COMMON = ("MODIFIER", "FEMININE", "MASCULINE", "MATHEMATICAL", "FULLWIDTH", "DOUBLE-STRUCK", "SCRIPT", "MICRO", "OHM")
"""First words of the names of letters that every script uses."""


def script_share(text: str, script: str) -> float:
    """Give the share of the letters of `text` that are in `script`; 1.0 when there are no letters.

    Args:
        text: any text.
        script: ISO 15924 code, ``Cyrl``; ``Jpan`` is kana and Han, ``Hang`` also takes Han.
    """
    if script == "Latn" and text.isascii():
        return 1.0
    theirs, others = _tables(script)
    inside, outside = len(text.translate(theirs)), len(text.translate(others))
    return inside / (inside + outside) if inside + outside else 1.0


class _Letters(dict[int, int | None]):
    """A table for str.translate that keeps the letters inside, or outside, of one script."""

    def __init__(self, names: tuple[str, ...], inside: bool) -> None:
        self.names = names
        self.inside = inside

    def __missing__(self, character: int) -> int | None:
        letter = chr(character)
        kept = None
        if unicodedata.category(letter)[0] == "L":
            first = unicodedata.name(letter, "").split(" ")[0]
            if first not in _COMMON and (first in self.names) == self.inside:
                kept = character
        self[character] = kept
        return kept


@cache
def _tables(script: str) -> tuple[_Letters, _Letters]:
    return _Letters(_NAMES[script], True), _Letters(_NAMES[script], False)
