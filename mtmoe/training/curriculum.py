"""Curriculum over directions: which of them train at which update, read from a file or derived from a finished run.

A direction that over-fits after some updates should train for about that many. It joins late, at
``max_update - k``, and then stays to the end, so the active sets are nested.

Source: NLLB Team 2022, section 6.4; Elbayad et al. 2022.
"""

from __future__ import annotations

import bisect
import difflib
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mtmoe.errors import ConfigError
from mtmoe.evaluation.buckets import BUCKETS
from mtmoe.files import read_yaml
from mtmoe.training.curves import Verdict

DEFAULT_SHARES = (1.0, 0.6, 0.4, 0.2)
"""Shares of all updates for which the buckets of `derive` train; the shape of the released NLLB ablations."""

COUNT_SHARES = (1.0, 0.6, 0.4)
"""Shares of all updates for which the buckets high, low and very low of `derive_by_count` train; ours."""

FITS = ("share", "median")
"""How `derive` chooses the length of a bucket."""

AUTO = "auto"
"""What stands for a file's name where training itself decides; see `mtmoe.training.auto_curriculum`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Directions that join training together, and stay."""

    start: float
    """First update: a whole number of updates, or a share of max_update below 1."""
    directions: tuple[str, ...] = ()
    """Single directions, as ``en-mk``."""
    pairs: tuple[str, ...] = ()
    """Both directions of a pair, in either order, as ``en-mk``."""
    languages: tuple[str, ...] = ()
    """Every direction from or into a language, as ``mk``."""

    def __post_init__(self) -> None:
        if not self.start >= 0 or (self.start >= 1 and self.start != int(self.start)):
            raise ValueError(f"start={self.start} must be a share in [0, 1) or a whole number of updates")
        if not (self.directions or self.pairs or self.languages):
            raise ValueError(f"the phase at {self.start:g} adds nothing; name directions, pairs or languages")


@dataclass(frozen=True, slots=True)
class Schedule:
    """When each direction starts: the curriculum with its shares turned into updates."""

    starts: Mapping[str, int]
    """Direction -> first update at which it trains."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Updates at which a phase starts, rising; the first is that of the first phase."""
        return tuple(sorted(set(self.starts.values())))

    def active(self, update: int) -> tuple[str, ...]:
        """Directions that train at `update`, in the order of the schedule."""
        return tuple(name for name, start in self.starts.items() if start <= update)

    def next_boundary(self, update: int) -> int | None:
        """First update after `update` at which a direction joins; None when all have."""
        later = bisect.bisect_right(self.boundaries, update)
        return self.boundaries[later] if later < len(self.boundaries) else None


def load(path: str | os.PathLike[str]) -> list[Phase]:
    """Read phases from a YAML file: a list of ``{start, directions | pairs | languages}``.

    Raises:
        ConfigError: the file is missing, is no YAML, or a phase is wrong; the text names file and phase.
    """
    document = read_yaml(path, "curriculum")
    if isinstance(document, dict) and set(document) == {"phases"}:
        document = document["phases"]
    if not isinstance(document, list) or not document:
        raise ConfigError(f"curriculum {path} must be a list of phases, such as: [{{start: 0.5, languages: [mk]}}]")
    return [_phase(entry, f"curriculum {path}, phase {number}") for number, entry in enumerate(document, start=1)]


def dump(schedule: Schedule, total: int = 0) -> str:
    """The schedule as a curriculum file: a phase for each boundary.

    Args:
        schedule: of a run or planned for one.
        total: updates of that run, to write starts as shares of it, for runs of any length; 0 = as updates.
    """
    phases = [
        {
            "start": round(boundary / total, 4) if total and boundary else boundary,
            "directions": [name for name, start in schedule.starts.items() if start == boundary],
        }
        for boundary in schedule.boundaries
    ]
    return yaml.safe_dump(phases, sort_keys=False, default_flow_style=None, width=120)


def resolve(phases: Iterable[Phase], directions: Sequence[str], max_update: int = 0) -> Schedule:
    """Turn phases into the first update of each direction.

    A direction that several phases name starts with the first of them. One that no phase names starts at update 0,
    unless a phase at 0 says what starts there: then leaving it out is taken for an oversight.

    Args:
        phases: in any order.
        directions: all directions of the run.
        max_update: total updates of the run; needed where a start is a share.

    Raises:
        ConfigError: a phase names what is not in the run, a share has no max_update to refer to, a phase starts after
            the end, or nothing would train at update 0.
    """
    starts: dict[str, int] = {}
    explicit_first = False
    for phase in phases:
        start = _first_update(phase.start, max_update)
        explicit_first |= start == 0
        for name in _named(phase, directions):
            starts[name] = min(start, starts.get(name, start))
    unnamed = [name for name in directions if name not in starts]
    if unnamed and explicit_first:
        raise ConfigError(
            f"the curriculum has a phase at 0, but no phase names {', '.join(unnamed)}; "
            "add them to a phase, or leave out the phase at 0 so that the rest starts there"
        )
    starts |= dict.fromkeys(unnamed, 0)
    if directions and min(starts.values()) > 0:
        raise ConfigError(f"nothing would train before update {min(starts.values())}; let a phase start at 0")
    return Schedule({name: starts[name] for name in directions})


def derive(
    verdicts: Mapping[str, Verdict],
    max_update: int,
    *,
    shares: Sequence[float] = DEFAULT_SHARES,
    fit: str = "share",
    trained_from: Mapping[str, int] | None = None,
) -> Schedule:
    """Derive a curriculum from a run without one, with the same regularisation.

    A direction falls into the shortest bucket that still trains it for as many updates as took it to its best, and
    bucket i is introduced at ``max_update - k_i``. A direction that does not over-fit trains from the start.

    Args:
        verdicts: direction -> where its validation curve is best; see `mtmoe.training.curves.judge_all`.
        max_update: total updates of the run to plan.
        shares: lengths of the buckets as shares of `max_update`; the longest must be 1.
        fit: "share": ``k_i = share_i * max_update``; "median": the median best step of the bucket's directions.
        trained_from: direction -> update at which the first run began to train it, where that is not 0.

    Raises:
        ConfigError: shares and fit make no sense.
    """
    if fit not in FITS:
        raise ConfigError(f"fit={fit!r} is unknown; choose one of: {', '.join(FITS)}")
    _check_shares(shares)
    begun = trained_from or {}
    length = {
        name: verdict.best_update - begun.get(name, 0) if verdict.overfits else max_update
        for name, verdict in verdicts.items()
    }
    share_of = {name: min((s for s in shares if s * max_update >= k), default=1.0) for name, k in length.items()}
    starts = {}
    for name, share in share_of.items():
        updates = share * max_update
        if fit == "median" and share < 1.0:
            updates = statistics.median(length[other] for other, its in share_of.items() if its == share)
        starts[name] = max_update - round(updates)
    return _begin_somewhere(starts)


def derive_by_count(
    buckets: Mapping[str, str], max_update: int, *, shares: Sequence[float] = COUNT_SHARES
) -> Schedule:
    """Make a curriculum without a first run: the fewer training pairs a direction has, the later it joins.

    Args:
        buckets: direction -> its resource bucket; a direction that is missing trains from the start.
        max_update: total updates of the run to plan.
        shares: of `max_update`, for which the buckets high, low and very low train; the first must be 1.

    Raises:
        ConfigError: there are not as many shares as buckets, or they make no sense.
    """
    _check_shares(shares)
    if len(shares) != len(BUCKETS) or list(shares) != sorted(shares, reverse=True):
        raise ConfigError(f"shares {tuple(shares)} must be {len(BUCKETS)} falling numbers, for {', '.join(BUCKETS)}")
    share = dict(zip(BUCKETS, shares, strict=True))
    return _begin_somewhere({name: max_update - round(share[bucket] * max_update) for name, bucket in buckets.items()})


def _check_shares(shares: Sequence[float]) -> None:
    if not shares or max(shares) != 1.0 or min(shares) <= 0.0:
        raise ConfigError(f"shares {tuple(shares)} must lie in (0, 1] and hold 1.0, for what trains from the start")


def _begin_somewhere(starts: dict[str, int]) -> Schedule:
    """Where every direction joins late, those of the first phase start at once: something has to."""
    first = min(starts.values())
    return Schedule({name: 0 if start == first else start for name, start in starts.items()})


def _phase(entry: Any, where: str) -> Phase:
    known = ("start", "directions", "pairs", "languages")
    if not isinstance(entry, dict) or "start" not in entry:
        raise ConfigError(f"{where}: {entry!r} must be a mapping with start, and directions, pairs or languages")
    unknown = sorted(str(key) for key in set(entry) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; choose from: {', '.join(known)}")
    start = entry["start"]
    if isinstance(start, bool) or not isinstance(start, int | float):
        raise ConfigError(f"{where}: start={start!r} must be a number of updates, or a share below 1")
    names: dict[str, tuple[str, ...]] = {}
    for key in known[1:]:
        value = entry.get(key) or []
        # `no` is Norwegian to us and false to YAML 1.1; it has to be quoted, and we have to say so.
        wrong = [item for item in value if not isinstance(item, str)] if isinstance(value, list) else [value]
        if wrong:
            raise ConfigError(
                f"{where}: {key} must be a list of text, not {wrong[0]!r} (put codes such as 'no' in quotes)"
            )
        names[key] = tuple(value)
    try:
        return Phase(start=start, **names)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _first_update(start: float, max_update: int) -> int:
    if 0 < start < 1:
        if max_update <= 0:
            raise ConfigError(
                f"start={start} is a share of max_update, which is not set; give --max-update or an update number"
            )
        return round(start * max_update)
    if max_update > 0 and start >= max_update:
        raise ConfigError(f"a phase starts at update {start:g}, but the run ends at {max_update}")
    return int(start)


def _named(phase: Phase, directions: Sequence[str]) -> list[str]:
    """The directions that a phase adds; a name that matches none is an error with the closest matches."""
    found: list[str] = []
    for name in phase.directions:
        found += _matching(name, [d for d in directions if d == name], directions)
    for pair in phase.pairs:
        both = {pair, "-".join(reversed(pair.split("-")))}
        found += _matching(pair, [d for d in directions if d in both], directions)
    for language in phase.languages:
        matches = [d for d in directions if language in d.split("-")]
        found += _matching(language, matches, sorted({code for d in directions for code in d.split("-")}))
    return list(dict.fromkeys(found))


def _matching(name: str, matches: list[str], known: Sequence[str]) -> list[str]:
    if not matches:
        close = difflib.get_close_matches(name, known, n=3) or sorted(known)[:10]
        raise ConfigError(f"the curriculum names {name!r}, which is not in this run; did you mean: {', '.join(close)}?")
    return matches
