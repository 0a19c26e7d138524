"""Text as every part of mtmoe wants it, and the key under which two sentences count as the same."""

from __future__ import annotations

import re
import unicodedata

_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff]")
"""Control characters that are not white space, byte order marks, and surrogates, which no UTF-8 file can hold."""


def normalise(text: str) -> str:
    """Clean one segment: no control characters, Unicode NFC, each run of white space one space, none at the ends.

    Joiners and direction marks (category Cf) stay, since Persian, Malayalam or Sinhala are misspelt without them.
    """
    if _CONTROL.search(text):
        text = _CONTROL.sub("", text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def match_key(text: str) -> str:
    """Reduce a segment to what decides whether it is the same sentence: letters, digits and marks, without case.

    NFKC, case-folded, and everything but the Unicode categories L, N and M taken out. A text that has none of them is
    its own key, so that "!" and "?" stay apart.
    """
    return unicodedata.normalize("NFKC", text).casefold().translate(_KEPT) or text


class _KeptCharacters(dict[int, int | None]):
    """A table for str.translate that learns each character once: 5 times faster than asking for its category."""

    def __missing__(self, character: int) -> int | None:
        kept = character if unicodedata.category(chr(character))[0] in "LNM" else None
        self[character] = kept
        return kept


_KEPT = _KeptCharacters()
