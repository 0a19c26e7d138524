"""Turn a checkpoint into one of another layout: a directory for any number of places, or fairseq's single file."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtmoe.checkpoint.sharded.manifest import SHARED, read_manifest
from mtmoe.checkpoint.sharded.reading import (
    allowing_plain_types,
    check_files,
    is_sharded,
    load,
    read_experts,
    read_state,
)
from mtmoe.checkpoint.sharded.state import LIST, OPTIMIZER, STACKED, ExpertTensor, SplitState, describe, split_state
from mtmoe.checkpoint.sharded.writing import SavePlan, commit, write_experts, write_shared
from mtmoe.checkpoint.writing import save
from mtmoe.errors import CheckpointError


def reshard(source: Path, target: Path, places: int | None, *, optimizer: bool = True) -> None:
    """Write a checkpoint anew, with its experts in another number of files; one place at a time is in memory.

    Args:
        source: a sharded checkpoint, or a file that fairseq wrote.
        target: a directory that does not exist yet, or, if `places` is None, a file to write or replace.
        places: expert-parallel size to lay it out for; any can be resumed from, this one opens the fewest files.
        optimizer: keep the optimiser's state; without it the checkpoint is a third of the size, and training that
            goes on from it begins with fresh moments (``--reset-optimizer``).

    Raises:
        CheckpointError: the source is damaged, the experts cannot be divided so, or the target is in the way.
    """
    if places is None:
        if target.is_dir():
            raise CheckpointError(f"{target} is a directory; give the name of a file, or --expert-parallel-size")
        save(_whole(source, optimizer), target, checksum=False)
        return
    if target.exists():
        raise CheckpointError(f"{target} exists and is left as it is. Choose another name")
    shared, part = _parts(source, places, optimizer)
    plan = SavePlan(
        directory=target, attempt=secrets.token_hex(4), world_size=places, expert_parallel_size=places
    )
    try:
        write_shared(plan, shared)
        for place in range(places):
            write_experts(plan, place, part(place))
        commit(plan, describe(shared))
    finally:
        shutil.rmtree(plan.staging, ignore_errors=True)


def share_out(split: SplitState, place: int, places: int) -> dict[str, ExpertTensor]:
    """The experts of one place, copied, of a state that has all of them.

    Raises:
        CheckpointError: the experts cannot be divided into so many places.
    """
    mine = {}
    for name, tensor in split.experts.items():
        if tensor.form not in (STACKED, LIST):
            mine[name] = tensor
            continue
        experts = len(tensor.values)
        if experts % places:
            raise CheckpointError(f"expert_parallel_size={places} does not divide the {experts} experts of {name}")
        local = experts // places
        mine[name] = ExpertTensor(tensor.values[place * local : (place + 1) * local].clone(), tensor.form)
    return mine


def _parts(
    source: Path, places: int, optimizer: bool
) -> tuple[dict[str, Any], Callable[[int], dict[str, ExpertTensor]]]:
    """The shared part, and a function that gives the experts of a place."""
    if not is_sharded(source):
        split = split_state(_whole(source, optimizer))
        return split.shared, lambda place: share_out(split, place, places)
    manifest = read_manifest(source)
    check_files(source, manifest)
    shared = _load(source / SHARED)
    if not optimizer:
        shared.pop(OPTIMIZER[0], None)

    def part(place: int) -> dict[str, ExpertTensor]:
        experts = read_experts(source, manifest, place=place, places=places, verify=False)
        return {name: each for name, each in experts.items() if optimizer or not name.startswith("/".join(OPTIMIZER))}

    return shared, part


def _whole(source: Path, optimizer: bool) -> dict[str, Any]:
    state = read_state(source) if is_sharded(source) else _load(source)
    if not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{source} holds no 'model': it is no fairseq checkpoint")
    if not optimizer:
        state.pop(OPTIMIZER[0], None)
    return state


def _load(path: Path) -> dict[str, Any]:
    with allowing_plain_types():
        return load(path)
