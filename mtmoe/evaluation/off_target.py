"""How much of the output is in another language than was asked for.

A segment is *judged* only when that can be done with confidence; the others are counted apart, never guessed:

1. Placeholders, mark-up, addresses and figures are removed, since they belong to no language. Fewer than
   `MIN_LETTERS` letters left: not judged.
2. Most letters are of another script than the target's: off target. This needs no identifier, so it also covers the
   languages that no identifier knows.
3. Otherwise py3langid, restricted to the model's own languages, must put `MIN_CONFIDENCE` on its first choice. If that
   choice is the target the segment is on target, else off target. A target that py3langid does not know is on target
   when no other language of the model has its script, and not judged otherwise.
4. If the reference itself does not pass as the target language (a product name, a path, a loan word), the segment says
   nothing about the model: not judged.

What it cannot see: a language outside the model that is written in the target's script.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import regex  # type: ignore[import-untyped]

from mtmoe import languages
from mtmoe.evaluation.metrics import base_language

logger = logging.getLogger(__name__)

MIN_LETTERS = 4
"""Fewer letters than this are not judged: "OK" is a word of every language."""

MIN_CONFIDENCE = 0.8
"""Probability that py3langid must give its first choice.

Measured with people's own text in the right language: of 20 languages' everyday sentences (tatoeba20, 5,419 segments)
90 % are judged and 0.06 % of those are called off target; at 0.5 it is 98 % and 0.8 %, at 0.9 86 % and 0.02 %.
On 2,230 interface messages in 6 languages it is 71 % and 0.25 %, and of untranslated ones 99.9 % are found."""

Verdict = Literal["on", "off", "unsure"]

SCRIPT_PARTS: dict[str, tuple[str, ...]] = {
    "Hans": ("Hani",),
    "Hant": ("Hani",),
    "Jpan": ("Hani", "Hira", "Kana"),
    "Kore": ("Hang", "Hani"),
}
"""A script in ISO 15924 that is made of several in Unicode, or shared; every other one stands for itself."""

IDENTIFIER_LABELS = {
    "nb": "no",
    "fil": "tl",
    "cmn": "zh",
    "arb": "ar",
    "kmr": "ku",
    "uzn": "uz",
    "gn": "gug",
    "ki": "kik",
}
"""Where py3langid names a language otherwise than `mtmoe.languages`."""

_NO_LANGUAGE = regex.compile(
    r"https?://\S+|\S+@\S+\.\w+|<[^<>]*>|&\w+;|%\(\w+\)[#\-+ 0-9.]*\w|%[#\-+0-9.]*[a-zA-Z]\b|\{[^{}]*\}|\$\w+|[\d_]+"
)


@dataclass(frozen=True, slots=True)
class OffTarget:
    """Counts of one direction's segments."""

    off: int
    """Judged to be in another language than the target."""
    judged: int
    """Judged at all, on target or off."""
    unsure: int
    """Not judged: too short, undecided, or a reference that is not recognised either."""

    @property
    def share(self) -> float | None:
        """Off-target segments over judged ones, 0 to 1; None if none could be judged."""
        return self.off / self.judged if self.judged else None


class LanguageChecker:
    """Judges whether text is in the language that was asked for, among the languages of one model."""

    def __init__(self, codes: Iterable[str]) -> None:
        self.languages = sorted(set(codes))
        self._label = {code: IDENTIFIER_LABELS.get(base_language(code), base_language(code)) for code in self.languages}
        self._script = {code: languages.script(code) for code in self.languages}
        self._identifier = _load_identifier(frozenset(self._label.values()))
        self._known = set(self._identifier.nb_classes) if self._identifier else set()

    @property
    def method(self) -> str:
        """One line for a report: how the languages were told apart."""
        if self._identifier is None:
            return "script only (py3langid is not installed or knows fewer than two of the languages)"
        unknown = [code for code in self.languages if self._label[code] not in self._known]
        by_script = f"; by script only: {', '.join(unknown)}" if unknown else ""
        known = [code for code in self.languages if self._label[code] in self._known]
        return f"script, then py3langid among {', '.join(known)}{by_script}"

    def count(self, outputs: Sequence[str], target: str, references: Sequence[str] | None = None) -> OffTarget:
        """Count the segments of `outputs` that are not in `target`.

        Args:
            outputs: translations.
            target: the language asked for; one of the checker's.
            references: right translations in the same order. Where the reference is not recognised as `target`, the
                segment is counted as unsure. By default every segment is taken at its word.
        """
        verdicts: Counter[Verdict] = Counter()
        for position, output in enumerate(outputs):
            verdict = self.judge(output, target)
            if verdict != "unsure" and references is not None and self.judge(references[position], target) != "on":
                verdict = "unsure"
            verdicts[verdict] += 1
        return OffTarget(off=verdicts["off"], judged=verdicts["on"] + verdicts["off"], unsure=verdicts["unsure"])

    def judge(self, text: str, target: str) -> Verdict:
        """Say whether `text` is in `target` ("on"), in another language ("off"), or cannot be told ("unsure")."""
        if target not in self._script:
            raise ValueError(
                f"target={target!r} is not a language of this checker; it has: {', '.join(self.languages)}"
            )
        words = _NO_LANGUAGE.sub(" ", text)
        letters = _count_letters(words)
        if letters < MIN_LETTERS:
            return "unsure"
        script = self._script[target]
        in_script = _count_letters(words, script)
        if 2 * in_script < letters:
            return "off"
        if self._label[target] not in self._known:
            return "unsure" if self._has_neighbours(target) else "on"
        return self._identify(words, target)

    def _identify(self, words: str, target: str) -> Verdict:
        assert self._identifier is not None  # a known label comes from it
        label, confidence = self._identifier.classify(words)
        if confidence < MIN_CONFIDENCE:
            return "unsure"
        if label == self._label[target]:
            return "on"
        # A language that the identifier does not know may look like any that it does.
        return "off" if label in self._known else "unsure"

    def _has_neighbours(self, target: str) -> bool:
        parts = set(_script_parts(self._script[target]))
        return any(parts & set(_script_parts(self._script[code])) for code in self.languages if code != target)


@cache  # reading its model takes half a second
def _load_identifier(labels: frozenset[str]) -> Any:
    """py3langid restricted to `labels`, or None where it cannot help."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        logger.warning("py3langid is not installed, so off-target output is found by its script only")
        return None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = labels & set(identifier.nb_classes)
    if len(known) < 2:  # with one class every text gets probability 1
        return None
    identifier.set_languages(known)
    return identifier


def _script_parts(script: str) -> tuple[str, ...]:
    return SCRIPT_PARTS.get(script, (script,))


@cache
def _letters(script: str | None) -> regex.Pattern[str]:
    # \p{L} alone loses the vowel signs of Indic scripts, which are most of some words.
    if script is None:
        return regex.compile(r"[\p{L}\p{M}]")
    return regex.compile("[" + "".join(rf"\p{{Script={part}}}" for part in _script_parts(script)) + "]")


def _count_letters(text: str, script: str | None = None) -> int:
    return len(_letters(script).findall(text))
