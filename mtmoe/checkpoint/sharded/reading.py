"""Read a sharded checkpoint for any place of any layout: only the files that hold the wanted experts are opened.

Files are torch's own, read by its weights-only loader, which runs nothing from them, and mapped: of a shard with more
experts than are wanted only those are read. Their checksums are compared before.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtmoe.checkpoint.sharded.manifest import (
    MANIFEST,
    SHARED,
    WAY_OUT,
    FileRecord,
    Manifest,
    TensorRecord,
    expert_file,
    read_manifest,
)
from mtmoe.checkpoint.sharded.state import LIST, STACKED, ExpertTensor, insert
from mtmoe.errors import CheckpointError


def is_sharded(path: Path) -> bool:
    """Whether `path` is the directory of a sharded checkpoint, or a link to one."""
    return (path / MANIFEST).is_file()


def plain_types() -> list[Any]:
    """Types that fairseq's options and meters are pickled as; the weights-only loader may build them."""
    core: Any = getattr(np, "_core", None) or np.core  # numpy 2, and before
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [argparse.Namespace, core.multiarray.scalar, np.dtype, *dtypes]


@contextlib.contextmanager
def allowing_plain_types() -> Iterator[None]:
    """Let the weights-only loader build `plain_types` for a while; afterwards it may build what it might before."""
    known = torch.serialization.get_safe_globals()  # torch's own context forgets these too
    with torch.serialization.safe_globals([each for each in plain_types() if each not in known]):
        yield


def check_files(
    directory: Path, manifest: Manifest, names: Iterable[str] | None = None, *, contents: bool = True
) -> None:
    """Compare files with what the manifest says of them.

    Args:
        directory: of the checkpoint.
        manifest: its manifest.
        names: files to look at; by default all.
        contents: compare checksums too, for which each byte is read; else sizes only.

    Raises:
        CheckpointError: one is missing, cut short or damaged; the text names it and the way out.
    """
    for name in manifest.files if names is None else names:
        path, record = directory / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != record.size:
                short = "is cut short" if size < record.size else "is damaged"
                raise CheckpointError(f"{path} {short}: it has {size:,} bytes of {record.size:,}. {WAY_OUT}")
            if contents:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != record.sha256:
                    raise CheckpointError(f"{path} is damaged: its checksum is wrong. {WAY_OUT}")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing. {WAY_OUT}") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. {WAY_OUT}") from error


def wanted_files(manifest: Manifest, place: int, places: int) -> list[str]:
    """Names of the expert files that a place of another layout needs, in the order of their experts.

    Args:
        manifest: of the checkpoint.
        place: from 0.
        places: of the new layout.

    Raises:
        CheckpointError: the experts cannot be divided into so many places.
    """
    if not 0 <= place < places:
        raise ValueError(f"place={place} must be between 0 and {places - 1}")
    for tensor, experts in manifest.experts.items():
        if experts % places:
            allowed = ", ".join(str(each) for each in range(1, experts + 1) if experts % each == 0)
            raise CheckpointError(
                f"expert_parallel_size={places} does not divide the {experts} experts of {tensor}; choose one of: "
                f"{allowed}"
            )
    have = manifest.expert_parallel_size
    first, end = place * have // places, -(-(place + 1) * have // places)
    return [expert_file(each, have) for each in range(first, end)]


def read_state(directory: Path, *, place: int = 0, places: int = 1, verify: bool = True) -> dict[str, Any]:
    """The training state of one place of any layout; by default of one process that has all experts.

    Args:
        directory: of the checkpoint.
        place: from 0, in an expert-parallel group of the new layout.
        places: size of these groups.
        verify: compare the checksums of the files that are read.

    Raises:
        CheckpointError: names the file (and the tensor) that is missing or damaged.
    """
    manifest = read_manifest(directory)
    if verify:
        check_files(directory, manifest, [SHARED])
    with allowing_plain_types():
        state: dict[str, Any] = load(directory / SHARED)
    fill(state, directory, manifest, place=place, places=places, verify=verify)
    return state


def fill(
    state: dict[str, Any], directory: Path, manifest: Manifest, *, place: int = 0, places: int = 1, verify: bool = True
) -> None:
    """Put the experts of one place into the shared part of a state, in place.

    Args:
        state: content of the shared file.
        directory: of the checkpoint.
        manifest: its manifest.
        place: as for `read_state`.
        places: as for `read_state`.
        verify: as for `read_state`.

    Raises:
        CheckpointError: names the file and the tensor that is missing or damaged.
    """
    for name, tensor in read_experts(directory, manifest, place=place, places=places, verify=verify).items():
        insert(state, name, tensor)


def read_experts(
    directory: Path, manifest: Manifest, *, place: int = 0, places: int = 1, verify: bool = True, prefix: str = ""
) -> dict[str, ExpertTensor]:
    """What one place has of experts, as `split_state` would give it there.

    Args:
        directory: of the checkpoint.
        manifest: its manifest.
        place: as for `read_state`.
        places: as for `read_state`.
        verify: as for `read_state`.
        prefix: only tensors whose path begins so.

    Raises:
        CheckpointError: names the file and the tensor that is missing or damaged.
    """
    names = wanted_files(manifest, place, places)
    check_files(directory, manifest, names, contents=verify)
    files = {name: _load_experts(directory / name, manifest.files[name]) for name in names}
    tensors = sorted({each for name in names for each in manifest.files[name].tensors if each.startswith(prefix)})
    return {tensor: _gather(tensor, manifest, files, place, places) for tensor in tensors}


def _gather(
    tensor: str, manifest: Manifest, files: dict[str, dict[str, Tensor]], place: int, places: int
) -> ExpertTensor:
    """Copy the wanted experts of one tensor from the files that have some; the others have zeros.

    A file lacks a tensor of the optimiser when none of its experts ever had a gradient.
    """
    records = {name: manifest.files[name].tensors[tensor] for name in files if tensor in files[name]}
    some = next(iter(records.values()))
    if some.form not in (STACKED, LIST):
        return ExpertTensor(torch.stack([files[name][tensor] for name in records]).amax(dim=0), some.form)
    local = some.shape[0] * manifest.expert_parallel_size // places
    start = place * local
    values = torch.zeros(local, *some.shape[1:], dtype=getattr(torch, some.dtype))
    for name, record in records.items():
        assert record.experts is not None
        first, end = max(record.experts[0], start), min(record.experts[1], start + local)
        values[first - start : end - start] = files[name][tensor][first - record.experts[0] : end - record.experts[0]]
    return ExpertTensor(values, some.form)


def _load_experts(path: Path, record: FileRecord) -> dict[str, Tensor]:
    values: dict[str, Tensor] = load(path)
    for name, tensor in record.tensors.items():
        _check_tensor(path, name, values.get(name), tensor)
    return values


def _check_tensor(path: Path, name: str, tensor: Any, record: TensorRecord) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path} lacks {name}, which the manifest lists. {WAY_OUT}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != record.shape or dtype != record.dtype:
        raise CheckpointError(
            f"{path}: {name} is {dtype} {tuple(tensor.shape)}, the manifest says {record.dtype} {record.shape}. "
            f"{WAY_OUT}"
        )


def load(path: Path) -> dict[str, Any]:
    """A file of a checkpoint by torch's weights-only loader, mapped.

    Raises:
        CheckpointError: it is missing, damaged or not safe.
    """
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. {WAY_OUT}") from error
    except Exception as error:  # a damaged pickle can end in nearly any error of the loader
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged or not safe to read: {first}. {WAY_OUT}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no part of a checkpoint: it holds a {type(value).__name__}")
    return value
