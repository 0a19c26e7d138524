"""Clean all pairs: normalise, filter, take out duplicates, and keep the splits apart in every language.

The evaluation sets are read first and kept in memory; they are small. Then the train pairs stream through to their
files. A train pair goes if either side is, in its language, in valid or test of any pair; a valid pair if either side
is in test.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from mtmoe.data import filters
from mtmoe.data.recipe import AUTO_SPLIT, Part, Recipe
from mtmoe.data.rows import Pair, Row, pair_name
from mtmoe.errors import DataError
from mtmoe.languages import canonical
from mtmoe.normalise import match_key, normalise

Counts = dict[str, dict[str, Counter[str]]]
"""Pair name -> split -> "read", "kept" or a reason -> number of pairs."""

_FLUSH = 5_000
"""Sentence pairs that a train file's buffer may hold; some hundred files can be written at once."""


@dataclass(slots=True)
class Candidate:
    """A cleaned sentence pair of an evaluation set, its sides in the order of the pair."""

    texts: tuple[str, str]
    keys: tuple[str, str]
    occurrences: int = 1
    """How often the very same pair was read."""


@dataclass(slots=True)
class Evaluation:
    """The valid and test sets, and what of them must not be trained on."""

    sets: dict[str, dict[Pair, list[Candidate]]]
    """``valid`` or ``test`` -> pair -> its sentence pairs, after every rule."""
    held_out: dict[str, dict[str, set[str]]]
    """``valid`` or ``test`` -> language -> keys of all its sentences, from before the limits."""


@dataclass(slots=True)
class Cleaner:
    """Applies a recipe's rules to rows and counts what happens to them."""

    recipe: Recipe
    counts: Counts = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))

    def evaluation(self, rows: Iterable[Row]) -> Evaluation:
        """Read all rows, so that a fault in any input shows before anything is written, and keep valid and test."""
        found: dict[str, dict[Pair, list[Candidate]]] = {"valid": defaultdict(list), "test": defaultdict(list)}
        seen: dict[tuple[str, Pair, tuple[str, str]], Candidate] = {}
        for row in rows:
            if row.split == "train":
                continue
            split, pair, candidate, fault = self._examine(row)
            if split == "train":
                continue
            counter = self.counts[pair_name(pair)][split]
            counter["read"] += 1
            duplicate = None if fault else self._duplicate_of(seen, split, pair, candidate)
            if duplicate is not None:
                duplicate.occurrences += duplicate.texts == candidate.texts
                fault = "duplicate"
            if fault:
                counter[fault] += 1
            else:
                found[split][pair].append(candidate)
        held_out = {split: _keys_by_language(pairs) for split, pairs in found.items()}
        for pair, candidates in found["valid"].items():
            apart = [one for one in candidates if not _holds(held_out["test"], pair, one.keys)]
            self.counts[pair_name(pair)]["valid"]["in_test"] += len(candidates) - len(apart)
            found["valid"][pair] = apart
        held_out["valid"] = _keys_by_language(found["valid"])
        for split, part in (("valid", self.recipe.valid), ("test", self.recipe.test)):
            for pair, candidates in found[split].items():
                counter = self.counts[pair_name(pair)][split]
                found[split][pair] = _reduce(candidates, part, pair, counter)
                counter["kept"] += len(found[split][pair])
        return Evaluation({split: dict(pairs) for split, pairs in found.items()}, held_out)

    def train(self, rows: Iterable[Row], evaluation: Evaluation) -> Iterator[tuple[Pair, tuple[str, str]]]:
        """Give the train pairs that are kept, as they come."""
        seen: dict[Pair, set[bytes]] = defaultdict(set)
        duplicates = self.recipe.cleaning.duplicates
        for row in rows:
            if row.split not in ("train", AUTO_SPLIT):
                continue
            split, pair, candidate, fault = self._examine(row)
            if split != "train":
                continue
            counter = self.counts[pair_name(pair)]["train"]
            counter["read"] += 1
            if not fault and duplicates != "keep":
                mark = _digest(candidate.keys if duplicates == "normalised" else candidate.texts)
                if mark in seen[pair]:
                    fault = "duplicate"
                seen[pair].add(mark)
            if not fault:
                for other in ("test", "valid"):
                    if _holds(evaluation.held_out[other], pair, candidate.keys):
                        fault = f"in_{other}"
                        break
            if fault:
                counter[fault] += 1
            else:
                counter["kept"] += 1
                yield pair, candidate.texts

    def _examine(self, row: Row) -> tuple[str, Pair, Candidate, str]:
        """Normalise a row, put its sides in order, settle its split and name the first filter it fails."""
        text_a, text_b = normalise(row.text_a), normalise(row.text_b)
        if row.language_a <= row.language_b:
            pair, texts = (row.language_a, row.language_b), (text_a, text_b)
        else:
            pair, texts = (row.language_b, row.language_a), (text_b, text_a)
        keys = match_key(texts[0]), match_key(texts[1])
        split = self._auto_split(pair, keys) if row.split == AUTO_SPLIT else row.split
        fault = row.dropped or filters.fault_of(self.recipe.cleaning, texts, keys, pair)
        return split, pair, Candidate(texts, keys), fault

    def _auto_split(self, pair: Pair, keys: tuple[str, str]) -> str:
        settings = self.recipe.auto_split
        key = keys[pair.index("en")] if "en" in pair else keys[0]
        number = int.from_bytes(hashlib.sha256(f"{settings.salt}|{key}".encode()).digest()[:8], "big") % 1000
        if number < settings.valid_per_mille:
            return "valid"
        return "test" if number < settings.valid_per_mille + settings.test_per_mille else "train"

    def _duplicate_of(
        self, seen: dict[tuple[str, Pair, tuple[str, str]], Candidate], split: str, pair: Pair, candidate: Candidate
    ) -> Candidate | None:
        """Find the earlier pair that this one repeats, or remember this one."""
        duplicates = self.recipe.cleaning.duplicates
        if duplicates == "keep":
            return None
        first = seen.setdefault(
            (split, pair, candidate.keys if duplicates == "normalised" else candidate.texts), candidate
        )
        return None if first is candidate else first


def write_clean_text(
    recipe: Recipe,
    rows: Callable[[], Iterable[Row]],
    evaluation: Evaluation,
    cleaner: Cleaner,
    folder: Path,
) -> None:
    """Write ``{split}.{a}-{b}.{a|b}`` for every pair into `folder`, one segment a line, synced to the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in evaluation.sets.items():
        for pair, candidates in pairs.items():
            _write_sides(folder, split, pair, (candidate.texts for candidate in candidates))
    buffers: dict[Pair, list[tuple[str, str]]] = defaultdict(list)
    for pair, texts in cleaner.train(rows(), evaluation):
        buffers[pair].append(texts)
        if len(buffers[pair]) >= _FLUSH:
            _write_sides(folder, "train", pair, buffers[pair])
            buffers[pair] = []
    for pair, kept in buffers.items():
        _write_sides(folder, "train", pair, kept)
    for pair in buffers:
        limit = recipe.train.limit_of(pair)
        if limit is not None:
            _limit_train(folder, pair, limit, cleaner.counts[pair_name(pair)]["train"])


def read_sides(folder: Path, split: str, pair: Pair) -> tuple[list[str], list[str]]:
    """Read back the two sides of a pair that `write_clean_text` wrote; empty lists if it wrote none."""
    sides = []
    for language in pair:
        path = folder / f"{split}.{pair_name(pair)}.{language}"
        sides.append(path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else [])
    return sides[0], sides[1]


def read_chunks(folder: Path, split: str, pair: Pair, size: int) -> Iterator[tuple[list[str], list[str]]]:
    """Read the two sides of a pair side by side, so many segments at a time; nothing if there is no text.

    Raises:
        DataError: one side has more lines than the other.
    """
    with ExitStack() as stack:
        paths = [folder / f"{split}.{pair_name(pair)}.{language}" for language in pair]
        streams = [stack.enter_context(path.open(encoding="utf-8", newline="\n")) for path in paths if path.exists()]
        while len(streams) == 2:
            sides = [[line.rstrip("\n") for line in itertools.islice(stream, size)] for stream in streams]
            if len(sides[0]) != len(sides[1]):
                raise DataError(f"{paths[0]} and {paths[1]} have different numbers of lines; run `mtmoe prepare` again")
            if not sides[0]:
                return
            yield sides[0], sides[1]


def count_pairs(folder: Path, split: str, pair: Pair) -> int:
    """Number of segments that each side of a pair has; 0 if there is no text."""
    path = folder / f"{split}.{pair_name(pair)}.{pair[0]}"
    if not path.exists():
        return 0
    with path.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _write_sides(folder: Path, split: str, pair: Pair, texts: Iterable[tuple[str, str]]) -> None:
    """Append to the two files of a pair."""
    columns = list(zip(*texts, strict=True)) or [(), ()]
    for language, lines in zip(pair, columns, strict=True):
        path = folder / f"{split}.{pair_name(pair)}.{language}"
        with path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{line}\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())


def _limit_train(folder: Path, pair: Pair, limit: int, counter: Counter[str]) -> None:
    texts = list(zip(*read_sides(folder, "train", pair), strict=True))
    if len(texts) <= limit:
        return
    for language in pair:
        (folder / f"train.{pair_name(pair)}.{language}").unlink()
    _write_sides(folder, "train", pair, _smallest(texts, limit))
    counter["over_limit"] += len(texts) - limit
    counter["kept"] -= len(texts) - limit


def _reduce(candidates: list[Candidate], part: Part, pair: Pair, counter: Counter[str]) -> list[Candidate]:
    """Apply `single_reference` and `limit`."""
    before = len(candidates)
    if part.single_reference is not None:
        side = pair.index(language) if (language := canonical(part.single_reference)) in pair else 0
        best: dict[str, Candidate] = {}
        for candidate in candidates:
            source = candidate.texts[side]
            # The most frequent translation; of equally frequent ones the first in the order of characters.
            if source not in best or (-candidate.occurrences, candidate.texts) < (
                -best[source].occurrences,
                best[source].texts,
            ):
                best[source] = candidate
        candidates = [candidate for candidate in candidates if best[candidate.texts[side]] is candidate]
        counter["second_reference"] += before - len(candidates)
    limit = part.limit_of(pair)
    if limit is not None and len(candidates) > limit:
        chosen = set(_smallest([candidate.texts for candidate in candidates], limit))
        counter["over_limit"] += len(candidates) - limit
        candidates = [candidate for candidate in candidates if candidate.texts in chosen][:limit]
    return candidates


def _smallest(texts: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """Choose by smallest hash, which is a random choice that does not depend on the order, and keep the order."""
    order = sorted(range(len(texts)), key=lambda number: (_digest(texts[number]), number))
    return [texts[number] for number in sorted(order[:limit])]


def _keys_by_language(pairs: dict[Pair, list[Candidate]]) -> dict[str, set[str]]:
    keys: dict[str, set[str]] = defaultdict(set)
    for pair, candidates in pairs.items():
        for side, language in enumerate(pair):
            keys[language].update(candidate.keys[side] for candidate in candidates)
    return dict(keys)


def _holds(held_out: dict[str, set[str]], pair: Pair, keys: tuple[str, str]) -> bool:
    return keys[0] in held_out.get(pair[0], ()) or keys[1] in held_out.get(pair[1], ())


def _digest(texts: tuple[str, str]) -> bytes:
    """8 bytes: among 100 million pairs one false duplicate is to be expected in 3,000 runs."""
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).digest()
