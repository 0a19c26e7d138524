"""Translating test sets so that an interrupted evaluation goes on where it stopped.

A direction's outputs are ``hypotheses/en-de.txt``; ``hypotheses/en-de.json``, written after it, says from which model,
sources and decoding settings they come, and the sha256 of the text. Only when all of that still holds are they used
again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe.errors import DataError
from mtmoe.evaluation.test_sets import TestSet, digest, read_json, read_lines, write_lines
from mtmoe.files import write_json

logger = logging.getLogger(__name__)

Advance = Callable[[int], object]
"""Told how many more segments are done."""

Translate = Callable[[Sequence[str], str, str, Advance], Sequence[str]]
"""translate(texts, source, target, advance): the translations, in the order of the texts.

It batches and sorts by length on its own, and may call `advance` with how many more texts are done."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """The outputs of one direction."""

    outputs: list[str]
    """One for each source, in order."""
    seconds: float
    """Time that translating took, when it was done."""
    reused: bool
    """Whether they stood there from an earlier run."""


class HypothesisStore:
    """The ``hypotheses`` folder of one evaluation."""

    def __init__(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        """Open the folder.

        Args:
            folder: where the outputs lie; made when first written to.
            made_by: what identifies the model and how it decodes; outputs made by anything else are not reused.
        """
        self.folder = folder
        self._made_by = dict(made_by)

    def _paths(self, direction: str) -> tuple[Path, Path]:
        return self.folder / f"{direction}.txt", self.folder / f"{direction}.json"

    def _stamp(self, test_set: TestSet) -> dict[str, Any]:
        return {"made_by": self._made_by, "sources": digest(test_set.sources), "sentences": len(test_set.sources)}

    def load(self, test_set: TestSet) -> Decoded | None:
        """Give the outputs of an earlier run, or None if there are none, they are damaged or made otherwise."""
        text, note = self._paths(test_set.direction)
        if not (text.is_file() and note.is_file()):
            return None
        try:
            record = read_json(note, "a note beside hypotheses")
            outputs = read_lines(text)
        except DataError as error:
            logger.warning("%s; decoding %s again", error, test_set.direction)
            return None
        same = all(record.get(key) == value for key, value in self._stamp(test_set).items())
        if not same or record.get("outputs") != digest(outputs) or len(outputs) != len(test_set.sources):
            logger.info("the outputs in %s were made otherwise; decoding %s again", text, test_set.direction)
            return None
        return Decoded(outputs, float(record.get("seconds", 0.0)), reused=True)

    def save(self, test_set: TestSet, outputs: Sequence[str], seconds: float) -> Decoded:
        """Write one direction's outputs and then the note that makes them valid."""
        text, note = self._paths(test_set.direction)
        note.unlink(missing_ok=True)  # else a stop between the two writes would leave a note on other outputs
        write_lines(text, outputs)
        written = read_lines(text) if outputs else []
        write_json(note, {**self._stamp(test_set), "outputs": digest(written), "seconds": round(seconds, 3)})
        return Decoded(written, seconds, reused=False)


def decode(test_set: TestSet, translate: Translate, store: HypothesisStore, advance: Advance) -> Decoded:
    """Translate one direction, or take its outputs from an earlier run.

    Args:
        test_set: what to translate.
        translate: the model.
        store: where outputs are kept.
        advance: told of every segment, also of those that needed no work.

    Raises:
        DataError: the model gave another number of outputs than it got sources.
    """
    earlier = store.load(test_set)
    if earlier is not None:
        advance(len(earlier.outputs))
        return earlier
    told = 0

    def count(segments: int) -> None:
        nonlocal told
        told += segments
        advance(segments)

    start = time.perf_counter()
    outputs = list(translate(test_set.sources, test_set.source, test_set.target, count))
    seconds = time.perf_counter() - start
    if len(outputs) != len(test_set.sources):
        raise DataError(
            f"the model gave {len(outputs)} translations for {len(test_set.sources)} segments of {test_set.direction}"
        )
    advance(len(outputs) - told)
    return store.save(test_set, outputs, seconds)
