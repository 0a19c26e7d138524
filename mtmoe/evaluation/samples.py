"""A few translations to read, chosen by place and never by quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtmoe.evaluation.test_sets import TestSet

GOLDEN = 0.618034
"""Multiples of the golden ratio, modulo 1, stay apart from each other however many there are."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One translated segment."""

    direction: str
    """Such as ``en-de``."""
    source: str
    """What was translated."""
    reference: str
    """What a person made of it."""
    output: str
    """What the model made of it."""


def choose_samples(test_sets: Sequence[TestSet], outputs: Mapping[str, Sequence[str]], count: int = 12) -> list[Sample]:
    """Choose `count` segments, spread evenly over directions and, in each, over the test set.

    The choice depends on the sizes only: the same test sets give the same samples for every model.
    """
    total = sum(len(test_set.sources) for test_set in test_sets)
    count = min(count, total)
    if not count:
        return []
    # The quota of a direction is the step that an even line of `count` over all directions takes at it.
    filled = [len(test_sets) and (number * count) // len(test_sets) for number in range(len(test_sets) + 1)]
    samples = []
    for number, test_set in enumerate(test_sets):
        quota = min(filled[number + 1] - filled[number], len(test_set.sources))
        for position in range(quota):
            # The shift keeps en-de and de-en, which hold the same segments, from showing the same one.
            place = ((position + 0.5) / quota + number * GOLDEN) % 1
            index = int(place * len(test_set.sources))
            sentence = (test_set.sources[index], test_set.references[index], outputs[test_set.direction][index])
            samples.append(Sample(test_set.direction, *sentence))
    return samples
