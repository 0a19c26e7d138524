"""Binarised sides of a pair in one file or in several: shards, which training reads as one set.

A set in shards has the files ``{split}.{a}-{b}.{number}.{a|b}.{bin,idx}`` and, written last, the list
``{split}.{a}-{b}.shards.json`` of what each of them holds, so that a missing, torn or foreign one is noticed at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtmoe.data.mmap_dataset import MappedDataset, index_path, map_dataset
from mtmoe.errors import DataError
from mtmoe.files import write_json

FORMAT = 1
"""Version of the list."""

_AGAIN = "copy it again, or run `mtmoe prepare` again"


@dataclass(frozen=True, slots=True)
class Shard:
    """What one shard holds."""

    sentences: int
    """Pairs of sentences."""
    ids: dict[str, int]
    """Language -> ids, ``</s>`` included."""


def list_path(prefix: Path) -> Path:
    """Give the path of the list of shards.

    Args:
        prefix: ``bin/{split}.{a}-{b}``.
    """
    return Path(f"{os.fspath(prefix)}.shards.json")


def shard_prefix(prefix: Path, number: int, language: str) -> Path:
    """Give the path, without suffix, of one side of a shard; shards are numbered from 0."""
    return Path(f"{os.fspath(prefix)}.{number:05d}.{language}")


def write_list(prefix: Path, shards: Sequence[Shard]) -> None:
    """Write the list; the shards have to be there already."""
    listed = [{"sentences": shard.sentences, "ids": shard.ids} for shard in shards]
    write_json(list_path(prefix), {"format": FORMAT, "shards": listed})


def read_list(prefix: Path) -> list[Shard] | None:
    """Read the list of shards; None where the set is one file or not there at all.

    Raises:
        DataError: it is damaged, of a later version, or lies beside a set of one file.
    """
    path = list_path(prefix)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        listed: Any = json.loads(text)
        if listed["format"] != FORMAT:
            raise DataError(f"{path} has format {listed['format']}, this version reads {FORMAT}; update mtmoe")
        shards = [
            Shard(int(shard["sentences"]), {str(code): int(ids) for code, ids in shard["ids"].items()})
            for shard in listed["shards"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {_AGAIN}") from None
    whole = [name for code in (shards[0].ids if shards else ()) if (name := _whole(prefix, code)).exists()]
    if not shards or whole:
        fault = f"{whole[0].name} is there as well" if whole else "it lists no shards"
        raise DataError(f"{path}: {fault}; remove the older of the two, or run `mtmoe prepare` again")
    return shards


def has_side(prefix: Path, language: str) -> bool:
    """Whether a side of a set is there, as one file or in shards."""
    return _whole(prefix, language).is_file() or list_path(prefix).is_file()


def map_side(prefix: Path, language: str) -> list[MappedDataset]:
    """Map one side of a set into memory, shard by shard; a set that is one file is one shard.

    Nothing is read but heads and ends of shards; of a set of one file, which has no list to compare it with, all sizes.

    Args:
        prefix: ``bin/{split}.{a}-{b}``.
        language: the side.

    Raises:
        DataError: a file is missing, torn, or not of this set; the text names it.
    """
    shards = read_list(prefix)
    if shards is None:
        dataset = map_dataset(Path(f"{os.fspath(prefix)}.{language}"))
        dataset.check_sizes()
        return [dataset]
    datasets = []
    for number, shard in enumerate(shards):
        if language not in shard.ids:
            raise DataError(f"{list_path(prefix)} has {', '.join(shard.ids)}, not {language!r}; {_AGAIN}")
        try:
            dataset = map_dataset(shard_prefix(prefix, number, language))
            dataset.check_end()
        except DataError as error:
            raise DataError(f"shard {number} of {len(shards)}: {error}") from None
        if (len(dataset.sizes), len(dataset.ids)) != (shard.sentences, shard.ids[language]):
            raise DataError(
                f"shard {number} of {len(shards)}: {dataset.prefix} has {len(dataset.sizes)} sentences of "
                f"{len(dataset.ids)} ids, {list_path(prefix).name} says {shard.sentences} of {shard.ids[language]}: it "
                f"is of another preparation; {_AGAIN}"
            )
        datasets.append(dataset)
    return datasets


def remove_set(prefix: Path) -> None:
    """Remove a set of whatever kind, the list first: what is left of it cannot be taken for a whole one."""
    list_path(prefix).unlink(missing_ok=True)
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        if path.suffix in (".idx", ".bin"):
            path.unlink()


def _whole(prefix: Path, language: str) -> Path:
    return index_path(Path(f"{os.fspath(prefix)}.{language}"))
