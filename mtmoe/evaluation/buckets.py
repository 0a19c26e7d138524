"""Resource buckets of directions, and means over groups of directions.

The published buckets count the sentence pairs that a direction was trained on: high from 1,000,000, low below, very low
below 100,000. As in the papers' tables, *low includes very low*. A small corpus has nothing but very low directions by
that rule, so other rules exist, and a report always says which one it used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtmoe.errors import DataError
from mtmoe.evaluation.metrics import base_language

BUCKETS = ("high", "low", "very_low")
"""From the most training pairs to the fewest."""

FAMILIES = ("all", "into_english", "out_of_english", "non_english")
"""The groups of directions that are reported apart; "all" holds every direction."""

AVERAGED = ("chrf++", "bleu", "length_ratio", "copy_chrf++", "untranslated", "off_target")
"""The figures of a direction whose mean says something; counts and seconds are no such figures."""

RULES = ("auto", "absolute", "data", "relative")
"""How buckets are chosen; see `assign_buckets`."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Training pairs at which a bucket begins."""

    low: int = 100_000
    """Below this a direction is very low."""
    high: int = 1_000_000
    """From this on a direction is high."""

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"thresholds low={self.low} and high={self.high} must satisfy 0 < low <= high")

    def bucket(self, pairs: int) -> str:
        """Name the bucket of a direction with `pairs` training pairs."""
        if pairs >= self.high:
            return "high"
        return "low" if pairs >= self.low else "very_low"


@dataclass(frozen=True, slots=True)
class Buckets:
    """The bucket of each direction and the sentence that says how it was found."""

    rule: str
    """The rule that was used, never "auto"."""
    description: str
    """The rule in words, for a report."""
    of: dict[str, str]
    """Direction -> bucket; directions of unknown size are absent."""


def split_direction(direction: str) -> tuple[str, str]:
    """Split ``en-de`` into ``("en", "de")``.

    Raises:
        DataError: it is not two codes joined by one hyphen.
    """
    source, hyphen, target = direction.partition("-")
    if not (source and hyphen and target) or "-" in target:
        raise DataError(f"direction {direction!r} is not of the form SOURCE-TARGET, as in en-de")
    return source, target


def pair_of(direction: str) -> str:
    """Name the pair that a direction belongs to, its languages in alphabetical order: ``en-de`` is ``de-en``."""
    return "-".join(sorted(split_direction(direction)))


def training_pairs(directions: Iterable[str], data: Mapping[str, Any]) -> dict[str, int]:
    """Training pairs of each direction, from the ``pairs`` of data.json; directions that it lacks are left out."""
    pairs = data.get("pairs", {})
    return {
        direction: int(pairs[pair_of(direction)]["train"])
        for direction in directions
        if "train" in pairs.get(pair_of(direction), {})
    }


def assign_buckets(
    directions: Sequence[str], data: Mapping[str, Any], *, rule: str = "auto", thresholds: Thresholds | None = None
) -> Buckets:
    """Put each direction into a resource bucket.

    Args:
        directions: such as ``en-de``.
        data: data.json of the prepared data: ``pairs`` and, where its recipe says so, ``resource``.
        rule: "absolute" compares a direction's training pairs with `thresholds`; "data" takes the lower of its two
            languages' levels in ``resource``; "relative" sets the thresholds at a half and a twentieth of the largest
            pair (the published factor of ten between them); "auto" is the first that tells directions apart here:
            absolute if `thresholds` are given or some pair reaches the published high, else data, else relative.
        thresholds: for "absolute" and "auto"; by default the published ones.

    Raises:
        ValueError: the rule is not one of `RULES`.
        DataError: rule "data" without ``resource`` in data.json.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of: {', '.join(RULES)}")
    sizes = training_pairs(directions, data)
    largest = max((int(pair.get("train", 0)) for pair in data.get("pairs", {}).values()), default=0)
    resource = data.get("resource") or {}
    if rule == "auto":
        if thresholds or largest >= Thresholds().high:
            rule = "absolute"
        else:
            rule = "data" if resource else "relative"
    if rule == "data":
        if not resource:
            raise DataError("bucket rule 'data' needs 'resource' in data.json; use the rule relative or absolute")
        return _by_resource(directions, resource)
    if rule == "relative":
        thresholds = Thresholds(low=max(1, -(-largest // 20)), high=max(1, -(-largest // 2)))
        description = f"relative to the largest pair ({largest:,} training pairs)"
    else:
        thresholds = thresholds or Thresholds()
        description = "by training pairs of the direction"
    description += (
        f": high from {thresholds.high:,}, low below, very low below {thresholds.low:,}; low includes very low"
    )
    return Buckets(rule, description, {direction: thresholds.bucket(pairs) for direction, pairs in sizes.items()})


def _by_resource(directions: Sequence[str], resource: Mapping[str, str]) -> Buckets:
    unknown = sorted(set(resource.values()) - set(BUCKETS))
    if unknown:
        raise DataError(f"data.json has resource levels {', '.join(unknown)}; known are: {', '.join(BUCKETS)}")
    of = {}
    for direction in directions:
        # English, or whatever the recipe leaves out, does not hold a direction back.
        levels = [resource[language] for language in split_direction(direction) if language in resource]
        if levels:
            of[direction] = max(levels, key=BUCKETS.index)
    described = "as the data recipe says, the lower of a direction's two languages; low includes very low"
    return Buckets("data", described, of)


def families_of(direction: str) -> list[str]:
    """Name the families of a direction: always "all", and one of into, out of or without English."""
    source, target = (base_language(language) for language in split_direction(direction))
    if target == "en":
        return ["all", "into_english"]
    return ["all", "out_of_english" if source == "en" else "non_english"]


def group_directions(directions: Iterable[str], buckets: Mapping[str, str]) -> dict[str, dict[str, list[str]]]:
    """Sort directions into families and, in each, into "all" and the buckets; empty groups are left out.

    Returns:
        family -> bucket -> directions, for instance ``groups["into_english"]["low"]``.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    directions = list(directions)
    for family in FAMILIES:
        for bucket in ("all", *BUCKETS):
            wanted = BUCKETS if bucket == "all" else BUCKETS[1:] if bucket == "low" else (bucket,)
            members = [
                direction
                for direction in directions
                if family in families_of(direction) and (bucket == "all" or buckets.get(direction) in wanted)
            ]
            if members:
                groups.setdefault(family, {})[bucket] = members
    return groups


def aggregate(
    scores: Mapping[str, Mapping[str, Any]], buckets: Mapping[str, str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Average the `AVERAGED` figures over the directions of each group, each direction counting once.

    Args:
        scores: direction -> figures; None is left out of the mean.
        buckets: direction -> bucket.

    Returns:
        family -> bucket -> {"directions": how many, figure: mean, …}.
    """
    means: dict[str, dict[str, dict[str, Any]]] = {}
    for family, by_bucket in group_directions(scores, buckets).items():
        for bucket, members in by_bucket.items():
            group: dict[str, Any] = {"directions": len(members)}
            for name in AVERAGED:
                values = [value for member in members if (value := scores[member].get(name)) is not None]
                if values:
                    group[name] = sum(values) / len(values)
            means.setdefault(family, {})[bucket] = group
    return means
