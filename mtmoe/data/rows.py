"""The one shape in which every reader hands over a sentence pair."""

from __future__ import annotations

from typing import NamedTuple

Pair = tuple[str, str]
"""Two language codes in alphabetical order; a pair has no direction."""


class Row(NamedTuple):
    """A sentence pair as it was read, not yet normalised."""

    split: str
    """``train``, ``valid``, ``test`` or ``auto``."""
    language_a: str
    """mtmoe's code of the language of `text_a`."""
    language_b: str
    """mtmoe's code of the language of `text_b`."""
    text_a: str
    text_b: str
    dropped: str = ""
    """Why the reader itself leaves the pair out; it is counted under this name."""


def pair_name(pair: Pair) -> str:
    """Write a pair as files and reports name it, ``de-en``."""
    return f"{pair[0]}-{pair[1]}"
