"""Find and read a model by its path, whatever its format."""

from __future__ import annotations

from pathlib import Path

from mtmoe.checkpoint import fairseq, folder
from mtmoe.checkpoint.sharded import MANIFEST, is_sharded
from mtmoe.checkpoint.stored import StoredModel
from mtmoe.errors import CheckpointError

RUN_CHECKPOINTS = ("checkpoints/checkpoint_best.pt", "checkpoints/checkpoint_last.pt")
"""What stands for a run folder, the first that exists."""


def locate_model(path: Path) -> Path:
    """The model folder or checkpoint that `path` means.

    Args:
        path: a model folder, a fairseq checkpoint, a sharded checkpoint, or the folder of a training run, whose best
            checkpoint (else its last) is taken.

    Raises:
        CheckpointError: there is nothing, or nothing of the kind.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model folder, a checkpoint (.pt) or the folder of a run")
    if path.is_file() or folder.is_model_folder(path) or is_sharded(path):
        return path
    for name in RUN_CHECKPOINTS:
        if (path / name).is_file() or is_sharded(path / name):
            return path / name
    raise CheckpointError(
        f"{path} is neither a model folder ({', '.join(folder.FILES)}) nor a sharded checkpoint ({MANIFEST}) nor a run "
        f"with {' or '.join(RUN_CHECKPOINTS)}"
    )


def open_model(path: Path, data: Path | None = None, *, verify: bool | None = None) -> StoredModel:
    """Read a model of any format.

    Args:
        path: as `locate_model` takes it.
        data: folder of prepared data, for a checkpoint that lies apart from it.
        verify: compare a folder's weights with their checksums; see `mtmoe.checkpoint.folder.read_folder`.

    Raises:
        CheckpointError: nothing there, damaged, unsafe or unsupported.
    """
    found = locate_model(path)
    if folder.is_model_folder(found):
        return folder.read_folder(found, verify=verify)
    return fairseq.read_model(found, data)
