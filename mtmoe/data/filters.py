"""Filters: the reasons for which a sentence pair is dropped, one by one and in order."""

from __future__ import annotations

from mtmoe.data.recipe import Cleaning
from mtmoe.data.scripts import script_share
from mtmoe.languages import script

REASONS = {
    "empty": "a side is empty",
    "unresolved_reference": "a message refers to another one",
    "plural_rule": "a message has a rule for plurals",
    "placeholders_differ": "the sides hold different {placeholders}",
    "untranslated": "the message equals the English one",
    "no_letters": "nothing but placeholders, digits and signs",
    "too_long": "a side has more characters than max_characters",
    "ratio": "one side is more than max_ratio times as long",
    "identical": "the sides are the same but for case, spaces and punctuation",
    "wrong_script": "a side is mostly in another script than its language's",
    "duplicate": "the pair came before",
    "in_test": "a side is in the test set of its language",
    "in_valid": "a side is in the valid set of its language",
    "second_reference": "a rarer translation of a test sentence",
    "over_limit": "beyond the recipe's limit for this split",
}
"""Every reason that the summary can give -> what it means."""


def fault_of(cleaning: Cleaning, texts: tuple[str, str], keys: tuple[str, str], languages: tuple[str, str]) -> str:
    """Name the first filter that a pair fails; empty if it passes.

    Args:
        cleaning: the recipe's rules.
        texts: both sides, normalised.
        keys: `mtmoe.normalise.match_key` of both.
        languages: their languages, mtmoe's codes.

    Returns:
        A key of `REASONS`, or an empty text.
    """
    length_a, length_b = map(len, texts)
    if not length_a or not length_b:
        return "empty"
    if cleaning.max_characters and max(length_a, length_b) > cleaning.max_characters:
        return "too_long"
    if cleaning.max_ratio and max(length_a, length_b) > cleaning.max_ratio * min(length_a, length_b):
        return "ratio"
    if cleaning.identical and keys[0] == keys[1]:
        return "identical"
    if cleaning.min_script_share:
        for text, language in zip(texts, languages, strict=True):
            if script_share(text, script(language)) < cleaning.min_script_share:
                return "wrong_script"
    return ""
