"""The portable model folder, format version 1: everything after training reads and writes it. It holds no pickle.

``config.json``        ``{"format": "mtmoe", "version": 1, "model": {… the fields of TransformerConfig …}}``
``model.safetensors``  weights under fairseq's names; shared matrices once
``dict.txt``           a piece and its count in each line, in the order of the embedding's rows
``spm.model``          SentencePiece
``languages.json``     ``{"languages": […], "directions": […], "encoder_langtok": "src"}``
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.stored import LanguageSet, StoredModel, check_tensors, read_json
from mtmoe.errors import CheckpointError
from mtmoe.files import write_json

FORMAT = "mtmoe"
VERSION = 1
CONFIG, WEIGHTS, DICTIONARY, SENTENCEPIECE, LANGUAGES = (
    "config.json",
    "model.safetensors",
    "dict.txt",
    "spm.model",
    "languages.json",
)
FILES = (CONFIG, WEIGHTS, DICTIONARY, SENTENCEPIECE, LANGUAGES)


def is_model_folder(path: Path) -> bool:
    """Whether `path` looks like a model folder, complete or not."""
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


def write_folder(path: Path, model: StoredModel) -> None:
    """Write a model folder, whole or not at all.

    The folder is written beside `path` and renamed at the end. An older model folder of that name is moved aside
    first and removed only after the new one stands in its place.

    Args:
        path: the folder to make; it may exist if it is empty or a model folder.
        model: what to write.

    Raises:
        CheckpointError: `path` is a file or a folder of something else, or a weight does not fit `model.config`.
    """
    if path.exists() and not (path.is_dir() and (is_model_folder(path) or not any(path.iterdir()))):
        raise CheckpointError(f"{path} exists and is no model folder; it is left as it is. Choose another name")
    check_tensors(model.config, model.tensors, path / WEIGHTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    try:
        write_json(staging / CONFIG, {"format": FORMAT, "version": VERSION, "model": model.config.to_json()})
        write_json(staging / LANGUAGES, model.languages.to_json())
        shutil.copyfile(model.dictionary, staging / DICTIONARY)
        shutil.copyfile(model.sentencepiece, staging / SENTENCEPIECE)
        # safetensors refuses views that share memory, which mapped checkpoints give where fairseq saved them so.
        save_file({name: tensor.clone().contiguous() for name, tensor in model.tensors.items()}, staging / WEIGHTS)
        _open_to_all(staging)
        for name in FILES:
            _sync(staging / name)
        _sync(staging)
        _put_in_place(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_folder(path: Path) -> StoredModel:
    """Read a model folder; the weights are mapped from the file and read when touched.

    Raises:
        CheckpointError: names the file, and the key or weight in it, that is missing or wrong.
    """
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} is no complete model folder: it lacks {', '.join(missing)}")
    config = _read_config(path / CONFIG)
    languages = LanguageSet.from_json(read_json(path / LANGUAGES), where=path / LANGUAGES)
    tensors = _read_tensors(path / WEIGHTS)
    check_tensors(config, tensors, path / WEIGHTS)
    return StoredModel(config, tensors, path / DICTIONARY, path / SENTENCEPIECE, languages)


def _read_config(path: Path) -> TransformerConfig:
    values = read_json(path)
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT!r}")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: version {values.get('version')!r} is unknown, this mtmoe reads version {VERSION}. Update mtmoe"
        )
    if "model" not in values:
        raise CheckpointError(f"{path} lacks model")
    try:
        return TransformerConfig.from_json(values["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _open_to_all(staging: Path) -> None:
    """Give folder and files the modes that an ordinary open() would have; mkdtemp and safetensors make them private."""
    mode = (staging / CONFIG).stat().st_mode & 0o666  # write_json follows the umask
    for name in FILES:
        os.chmod(staging / name, mode)
    os.chmod(staging, mode | (mode & 0o444) >> 2)


def _put_in_place(staging: Path, path: Path) -> None:
    if not path.exists():
        os.replace(staging, path)
    else:
        # A folder cannot replace a full one in one step; the old one stays under its new name until all is done.
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, aside)
        try:
            os.replace(staging, path)
        except BaseException:
            os.replace(aside, path)
            raise
        shutil.rmtree(aside)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
