"""Write a sharded checkpoint: several processes, one directory that appears under its name when it is whole.

Each process writes its files into a hidden directory beside the final one, and after each a small record of it. The
process of the first rank looks for the records of all; with the last it writes the manifest and renames the directory.
So processes agree without a message: one that has died or is slow holds up only the saving, never a collective of the
training, and the previous checkpoint stays as it is. All processes must see one file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtmoe.checkpoint.sharded.manifest import (
    SHARED,
    FileRecord,
    Manifest,
    TensorRecord,
    expert_file,
    write_manifest,
)
from mtmoe.checkpoint.sharded.state import LIST, STACKED, ExpertTensor
from mtmoe.checkpoint.writing import NotWritten, not_written, save
from mtmoe.errors import CheckpointError
from mtmoe.files import sync_folder, write_json, write_text

PATIENCE = 600.0
"""Seconds without any progress on disk after which a save is given up."""

GRACE = 5.0
"""Seconds without any progress on disk after which the files of a save that has failed are removed, even though some
process has not said that it is done: one that writes later would leave its file behind."""

RECORD, FAILURE = ".record.json", ".failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """What the processes that write one checkpoint have to know alike."""

    directory: Path
    """Where it will be; it must not exist."""
    attempt: str
    """A word that no earlier attempt had, so that what a killed one left is not taken for a part of this."""
    world_size: int
    expert_parallel_size: int

    @property
    def staging(self) -> Path:
        """Where it is until it is whole."""
        return self.directory.parent / f".{self.directory.name}.{self.attempt}.saving"

    @property
    def files(self) -> list[str]:
        """Names of the files that it will have, but for the manifest."""
        places = self.expert_parallel_size
        return [SHARED, *(expert_file(place, places) for place in range(places))]


def write_shared(plan: SavePlan, state: Mapping[str, Any]) -> None:
    """Write everything but the experts; the process of rank 0 calls this.

    Raises:
        NotWritten: the disk is full or fails; `commit` will say the same.
    """
    tensors = {path: TensorRecord(tuple(each.shape), _dtype(each)) for path, each in _tensors(state)}
    _write(plan, SHARED, dict(state), tensors)


def write_experts(plan: SavePlan, place: int, experts: Mapping[str, ExpertTensor]) -> None:
    """Write the experts of one place; a process of each place calls this.

    Args:
        plan: the same in all processes.
        place: from 0; it holds the experts [place * n, (place + 1) * n) of each layer, n = experts / places.
        experts: as `split_state` gives them.

    Raises:
        NotWritten: the disk is full or fails; `commit` will say the same.
    """
    tensors = {}
    for name, each in experts.items():
        experts_here = None
        if each.form in (STACKED, LIST):
            local = len(each.values)
            experts_here = (place * local, (place + 1) * local)
        tensors[name] = TensorRecord(tuple(each.values.shape), _dtype(each.values), experts_here, each.form)
    values = {name: each.values.contiguous() for name, each in experts.items()}
    _write(plan, expert_file(place, plan.expert_parallel_size), values, tensors)


def _write(plan: SavePlan, name: str, value: Any, tensors: dict[str, TensorRecord]) -> None:
    path = plan.staging / name
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            size, digest = save(value, path)
            write_json(path.with_name(name + RECORD), FileRecord(size, digest, tensors).to_json())
        except OSError as error:
            raise not_written(path, error, 0) from error
    except Exception as error:
        failure = path.with_name(name + FAILURE)
        try:
            write_text(failure, f"{error}\n")
        except OSError:
            with contextlib.suppress(OSError):  # a name often finds room where a line finds none
                failure.touch()
        raise


def commit(
    plan: SavePlan,
    about: Mapping[str, Any],
    *,
    patience: Callable[[], float] = lambda: PATIENCE,
    poll: float = 0.1,
) -> Manifest:
    """Wait for the files of all processes, write the manifest and give the directory its name; rank 0 calls this.

    Args:
        plan: the same in all processes.
        about: plain values for the manifest; num_updates orders checkpoints.
        patience: seconds without progress (a new record, or a file that grows) after which it gives up; asked at
            each look, since a process that is ending has less.
        poll: seconds between two looks.

    Raises:
        NotWritten: a process failed or is not heard of; all that was written is removed.
        CheckpointError: the files do not fit together.
    """
    try:
        records = _wait(plan, patience, poll)
        _check_fit(plan, records)
        manifest = Manifest(
            world_size=plan.world_size,
            expert_parallel_size=plan.expert_parallel_size,
            about=dict(about),
            files=records,
        )
        try:
            write_manifest(plan.staging, manifest)
            for name in records:
                (plan.staging / (name + RECORD)).unlink()
            sync_folder(plan.staging)
            os.replace(plan.staging, plan.directory)
            sync_folder(plan.directory.parent)
        except OSError as error:
            raise not_written(plan.directory, error, 0) from error
    except _Failed:
        give_up(plan, poll=poll)
        raise
    except BaseException:
        shutil.rmtree(plan.staging, ignore_errors=True)
        raise
    return manifest


class _Failed(NotWritten):
    """A process has said that it cannot write its file; the others may be writing theirs."""


def give_up(plan: SavePlan, *, grace: float = GRACE, poll: float = 0.1) -> None:
    """Remove what was written of a save that has failed, once no process writes any more; rank 0 calls this.

    Args:
        plan: the same in all processes.
        grace: seconds without progress after which processes that have not said that they are done are left out.
        poll: seconds between two looks.
    """
    seen, since = "", time.monotonic()
    while time.monotonic() - since <= grace:
        done = [any((plan.staging / (name + end)).exists() for end in (RECORD, FAILURE)) for name in plan.files[1:]]
        if all(done):
            break
        progress = _progress(plan.staging)
        if progress != seen:
            seen, since = progress, time.monotonic()
        time.sleep(poll)
    shutil.rmtree(plan.staging, ignore_errors=True)


def _wait(plan: SavePlan, patience: Callable[[], float], poll: float) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    seen, since = "", time.monotonic()
    while True:
        for name in plan.files:
            path = plan.staging / name
            failure = path.with_name(name + FAILURE)
            if failure.exists():
                reason = failure.read_text(encoding="utf-8").strip() or f"{path} could not be written"
                raise _Failed(f"{plan.directory} is not complete: {reason}")
            if name not in records:
                record = _record(path)
                if record is not None:
                    records[name] = record
        if len(records) == len(plan.files):
            return records
        progress, now = _progress(plan.staging), time.monotonic()
        if progress != seen:
            seen, since = progress, now
        limit = patience()
        if now - since > limit:
            lacking = [name for name in plan.files if name not in records]
            raise NotWritten(
                f"{plan.directory} is not complete: {', '.join(lacking)} did not arrive, and nothing was written for "
                f"{limit:.0f} seconds. Its process has died, or does not see {plan.directory.parent}: all need one "
                "file system"
            )
        time.sleep(poll)


def _progress(staging: Path) -> str:
    """Changes whenever a process has written something, also into a file that has not got its name yet."""
    try:
        return str(sorted((each.name, each.stat().st_size) for each in staging.iterdir()))
    except OSError:  # there is nothing yet, or a file has just got its name
        return ""


def _record(path: Path) -> FileRecord | None:
    """What is known of a file; None if it is not there yet, or not yet seen whole from this machine."""
    where = path.with_name(path.name + RECORD)
    try:
        record = FileRecord.from_json(json.loads(where.read_text(encoding="utf-8")), where)
        return record if path.stat().st_size == record.size else None
    except (OSError, ValueError):
        return None


def _check_fit(plan: SavePlan, records: Mapping[str, FileRecord]) -> None:
    """Refuse shards that do not hold the same tensors of other experts.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    first_name, *others = plan.files[1:]
    first = records[first_name].tensors
    for name in others:
        mine = records[name].tensors
        for tensor in first.keys() & mine.keys():
            a, b = first[tensor], mine[tensor]
            if (a.shape, a.dtype, a.form) != (b.shape, b.dtype, b.form):
                raise CheckpointError(
                    f"{plan.directory}: {tensor} is {b.dtype} {b.shape} in {name}, but {a.dtype} {a.shape} in "
                    f"{first_name}"
                )
        lacking = sorted(each for each in first.keys() ^ mine.keys() if each.startswith("model/"))
        if lacking:
            raise CheckpointError(f"{plan.directory}: {lacking[0]} is not in both {first_name} and {name}")


def _tensors(value: Any, path: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(path, value)]
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return []
    return [each for key, item in items for each in _tensors(item, f"{path}/{key}" if path else str(key))]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
