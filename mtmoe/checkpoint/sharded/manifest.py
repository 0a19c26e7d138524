"""The manifest of a sharded checkpoint: which files it has, and what is in each. It is written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtmoe.errors import CheckpointError
from mtmoe.files import write_json

MANIFEST, SHARED = "manifest.json", "shared.pt"
FORMAT, VERSION = "mtmoe sharded checkpoint", 1

WAY_OUT = "Put that file back from a copy, or resume from another checkpoint (--restore-file)"


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: "float32"."""
    experts: tuple[int, int] | None = None
    """First expert, and the one after the last; None = it is not stacked by expert."""
    form: str = ""
    """What it is in the state, see `mtmoe.checkpoint.sharded.state`; "" in the shared file."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str
    tensors: dict[str, TensorRecord]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any, where: Path) -> FileRecord:
        """Rebuild what `to_json` gave.

        Raises:
            CheckpointError: something is missing or of the wrong type.
        """
        try:
            tensors = {
                name: TensorRecord(
                    tuple(map(int, each["shape"])),
                    str(each["dtype"]),
                    None if each["experts"] is None else (int(each["experts"][0]), int(each["experts"][1])),
                    str(each["form"]),
                )
                for name, each in values["tensors"].items()
            }
            return cls(int(values["size"]), str(values["sha256"]), tensors)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{where} is damaged: {type(error).__name__} {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    world_size: int
    """Processes that trained it."""
    expert_parallel_size: int
    """Places that its experts lie in: so many expert files."""
    about: dict[str, Any]
    """What a run wants to know without opening a file: num_updates, steady, …; plain values."""
    files: dict[str, FileRecord]

    @property
    def num_updates(self) -> int:
        """Updates that it has behind it."""
        return int(self.about.get("num_updates", 0))

    @property
    def experts(self) -> dict[str, int]:
        """Each tensor that is stacked by expert, and how many experts it has over all files."""
        totals: dict[str, int] = {}
        for record in self.files.values():
            for name, tensor in record.tensors.items():
                if tensor.experts is not None:
                    totals[name] = max(totals.get(name, 0), tensor.experts[1])
        return totals


def expert_file(place: int, places: int) -> str:
    """Name of the file with the experts of one place of so many."""
    return f"experts-{place:05}-of-{places:05}.pt"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose files are all on disk."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "world_size": manifest.world_size,
        "expert_parallel_size": manifest.expert_parallel_size,
        "about": manifest.about,
        "files": {name: record.to_json() for name, record in sorted(manifest.files.items())},
    }
    write_json(directory / MANIFEST, {**values, "checksum": _checksum(values)})


def read_manifest(directory: Path) -> Manifest:
    """Read what a checkpoint consists of; its other files are not touched.

    Raises:
        CheckpointError: the manifest is missing, damaged, of a later version or contradicts itself.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is no complete checkpoint: it has no {MANIFEST}, which is written last"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. {WAY_OUT}") from error
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT!r}")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {values.get('version')!r} is unknown, this mtmoe reads {VERSION}. Update mtmoe"
        )
    rest = {key: value for key, value in values.items() if key != "checksum"}
    if values.get("checksum") != _checksum(rest):
        raise CheckpointError(f"{path} is damaged: its checksum is wrong. {WAY_OUT}")
    try:
        files = {str(name): FileRecord.from_json(each, path) for name, each in rest["files"].items()}
        places = int(rest["expert_parallel_size"])
        manifest = Manifest(
            world_size=int(rest["world_size"]), expert_parallel_size=places, about=dict(rest["about"]), files=files
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error
    expected = {SHARED, *(expert_file(place, places) for place in range(places))}
    if set(files) != expected:
        raise CheckpointError(f"{path} must list {', '.join(sorted(expected))}, not {', '.join(sorted(files))}")
    return manifest


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
