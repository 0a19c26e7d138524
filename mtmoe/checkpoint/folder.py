"""The portable model folder, format version 2: everything after training reads and writes it. It holds no pickle.

``config.json``        ``{"format": "mtmoe", "version": 2, "model": {… the fields of TransformerConfig …},
                       "history": [… what was done …], "data": {… trained on …}, "figures": {… measured …}}``
``model.safetensors``  weights under fairseq's names, shared matrices once; above 2 GB
                       ``model-00001-of-00003.safetensors`` and so on, with ``model.safetensors.index.json``
``dict.txt``           a piece and its count in each line, in the order of the embedding's rows
``spm.model``          SentencePiece
``languages.json``     ``{"languages": […], "directions": […], "encoder_langtok": "src", "decoder_start": "tag"}``
``checksums.json``      size and SHA-256 of each file above
``README.md``          the model card, made from config.json and languages.json; free to be changed

Version 1 had neither checksums nor card nor parts, and only ``model`` in config.json; it is read as before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mtmoe.checkpoint import checksums
from mtmoe.checkpoint.card import model_card
from mtmoe.checkpoint.checksums import CHECKSUMS, MEND
from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.safetensors_file import bytes_of, write_safetensors
from mtmoe.checkpoint.stored import LanguageSet, StoredModel, check_tensors, expected_shapes, read_json
from mtmoe.checkpoint.tensors import FileTensors
from mtmoe.errors import CheckpointError
from mtmoe.files import write_json, write_text

FORMAT = "mtmoe"
VERSION = 2
CONFIG, WEIGHTS, INDEX, DICTIONARY, SENTENCEPIECE, LANGUAGES, CARD = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "dict.txt",
    "spm.model",
    "languages.json",
    "README.md",
)
FILES = (CONFIG, WEIGHTS, DICTIONARY, SENTENCEPIECE, LANGUAGES, CHECKSUMS, CARD)
"""A folder whose weights are in one file."""

PART_BYTES = 2_000_000_000
"""Weights are split into files of at most so many bytes; a single weight that is larger has a file of its own."""

PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_model_folder(path: Path) -> bool:
    """Whether `path` looks like a model folder, complete or not."""
    return any((path / name).is_file() for name in (CONFIG, WEIGHTS, INDEX, CHECKSUMS))


def write_folder(path: Path, model: StoredModel, *, part_bytes: int = PART_BYTES) -> None:
    """Write a model folder, whole or not at all.

    The folder is written beside `path` and renamed at the end. An older model folder of that name is moved aside
    first and removed only after the new one stands in its place. Lazy weights are read or computed one at a time.

    Args:
        path: the folder to make; it may exist if it is empty or a model folder, even the one that `model` is read from.
        model: what to write.
        part_bytes: most bytes of a file of weights.

    Raises:
        CheckpointError: `path` is a file or a folder of something else, or a weight does not fit `model.config`.
    """
    if path.exists() and not (path.is_dir() and (is_model_folder(path) or not any(path.iterdir()))):
        raise CheckpointError(f"{path} exists and is no model folder; it is left as it is. Choose another name")
    check_tensors(model.config, model.tensors, path / WEIGHTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    try:
        hashes = dict.fromkeys((CONFIG, LANGUAGES, DICTIONARY, SENTENCEPIECE), "")
        values = {"format": FORMAT, "version": VERSION, "model": model.config.to_json()}
        values |= {"history": list(model.history), "data": dict(model.data), "figures": dict(model.figures)}
        write_json(staging / CONFIG, values)
        write_json(staging / LANGUAGES, model.languages.to_json())
        shutil.copyfile(model.dictionary, staging / DICTIONARY)
        shutil.copyfile(model.sentencepiece, staging / SENTENCEPIECE)
        # Layer by layer, so that a part holds whole layers where it can.
        hashes |= write_parts(staging, model.tensors, list(expected_shapes(model.config)), part_bytes)
        checksums.write_checksums(staging, hashes)
        write_text(staging / CARD, model_card(path.resolve().name, model))
        put_in_place(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_folder(path: Path, *, verify: bool | None = None) -> StoredModel:
    """Read a model folder; the weights are mapped from their files and read when touched.

    Args:
        path: the folder.
        verify: compare the weights with their checksums; None does so where they have at most
            `checksums.HASHED_BYTES`. The other files, and the sizes of all, are always compared.

    Raises:
        CheckpointError: names the file, and the key or weight in it, that is missing or wrong, and the way out.
    """
    version = None
    if (path / CHECKSUMS).is_file():
        _check_files(path, verify)
    elif (path / CONFIG).is_file():
        version = _read_version(path / CONFIG, read_json(path / CONFIG))
    required = [CONFIG, DICTIONARY, SENTENCEPIECE, LANGUAGES]
    required += [WEIGHTS] * (not (path / INDEX).is_file()) + [CHECKSUMS] * (version != 1)
    missing = [name for name in required if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} is no complete model folder: it lacks {', '.join(missing)}; {MEND}")
    values = read_json(path / CONFIG)
    _read_version(path / CONFIG, values)
    config = _read_config(path / CONFIG, values)
    languages = LanguageSet.from_json(read_json(path / LANGUAGES), where=path / LANGUAGES)
    tensors = _read_weights(path)
    check_tensors(config, tensors, path / (INDEX if (path / INDEX).is_file() else WEIGHTS))
    told = _read_description(path / CONFIG, values)
    return StoredModel(config, tensors, path / DICTIONARY, path / SENTENCEPIECE, languages, **told)


def identity(path: Path) -> str | None:
    """A hash of all that decides how a model folder translates, and of nothing else: not of history, figures and card.

    Made from the checksums, so that weights are not read; None for a folder without.

    Raises:
        CheckpointError: config.json or the checksums are damaged.
    """
    if not (path / CHECKSUMS).is_file():
        return None
    files = checksums.read_checksums(path)
    values = read_json(path / CONFIG)
    _read_version(path / CONFIG, values)
    known = {name: entry["sha256"] for name, entry in files.items() if name != CONFIG}
    return hashlib.sha256(json.dumps([values.get("model"), known], sort_keys=True).encode()).hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The files of weights of a model folder.

    Raises:
        CheckpointError: the index is damaged.
    """
    if (path / INDEX).is_file():
        return sorted({path / name for name in _read_index(path / INDEX).values()})
    return [path / WEIGHTS]


# Writing


def write_parts(
    staging: Path, tensors: Mapping[str, Tensor], names: Sequence[str], part_bytes: int = PART_BYTES
) -> dict[str, str]:
    """Write weights in files of at most `part_bytes`, and the index if they need several.

    Args:
        staging: the folder to write into.
        tensors: the weights.
        names: those to write, in an order that keeps together what is read together.
        part_bytes: most bytes of a file.

    Returns:
        File -> its SHA-256; "" for the index.
    """
    parts: list[list[str]] = [[]]
    room = part_bytes
    for name in names:
        size = bytes_of(tensors, name)
        if parts[-1] and size > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(name)
        room -= size
    if len(parts) == 1:
        return {WEIGHTS: write_safetensors(staging / WEIGHTS, tensors, parts[0])}
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        hashes[file] = write_safetensors(staging / file, tensors, part)
        places |= dict.fromkeys(part, file)
    total = sum(bytes_of(tensors, name) for name in places)
    write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return hashes | {INDEX: ""}


def put_in_place(staging: Path, path: Path) -> None:
    """Move a finished folder to its name, synced to disk and with ordinary modes; what was there is replaced."""
    _open_to_all(staging)
    for file in staging.iterdir():
        _sync(file)
    _sync(staging)
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


def _open_to_all(staging: Path) -> None:
    """Give folder and files the modes that an ordinary open() would have; mkdtemp makes them private."""
    mode = (staging / CONFIG).stat().st_mode & 0o666  # write_json follows the umask
    for file in staging.iterdir():
        os.chmod(file, mode)
    os.chmod(staging, mode | (mode & 0o444) >> 2)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def _check_files(path: Path, verify: bool | None) -> None:
    """Compare with the checksums; their file must list all that is read later, or that could be exchanged unnoticed."""
    files = checksums.read_checksums(path)
    checksums.check_sizes(path, files)
    weights = [name for name in files if name == WEIGHTS or PART.fullmatch(name)]
    checksums.check_hashes(path, files, [name for name in files if name not in weights])
    for name in (CONFIG, DICTIONARY, SENTENCEPIECE, LANGUAGES, *(file.name for file in weight_files(path))):
        if name not in files:
            raise CheckpointError(f"{path / CHECKSUMS} does not list {name}; {MEND}")
    if verify or (verify is None and sum(files[name]["bytes"] for name in weights) <= checksums.HASHED_BYTES):
        checksums.check_hashes(path, files, weights)


def _read_version(path: Path, values: Any) -> int:
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        if isinstance(values, Mapping) and "model_type" in values:
            raise CheckpointError(
                f"{path}: this is a Hugging Face model; turn it into a model folder first: "
                f"mtmoe convert {path.parent} --output FOLDER"
            )
        raise CheckpointError(f"{path}: format must be {FORMAT!r}")
    version = values.get("version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise CheckpointError(
            f"{path}: version {version!r} is unknown, this mtmoe reads versions 1 to {VERSION}. Update mtmoe"
        )
    return int(version)


def _read_config(path: Path, values: Mapping[str, Any]) -> TransformerConfig:
    if "model" not in values:
        raise CheckpointError(f"{path} lacks model")
    try:
        return TransformerConfig.from_json(values["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_description(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    history, data, figures = values.get("history", []), values.get("data", {}), values.get("figures", {})
    if not isinstance(history, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("operation"), str) for entry in history
    ):
        raise CheckpointError(f"{path}: history must be a list of objects with an operation, not {history!r}")
    for name, value in (("data", data), ("figures", figures)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: {name} must be an object, not {value!r}")
    return {"history": tuple(history), "data": data, "figures": figures}


def _read_weights(path: Path) -> FileTensors:
    if (path / INDEX).is_file():
        return FileTensors({name: path / file for name, file in _read_index(path / INDEX).items()})
    return FileTensors.of_file(path / WEIGHTS)


def _read_index(path: Path) -> dict[str, str]:
    values = read_json(path)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} lacks weight_map; {MEND}")
    for name, file in places.items():
        if not isinstance(file, str) or not PART.fullmatch(file):
            raise CheckpointError(
                f"{path}: weight_map.{name} must be a file as model-00001-of-00002.safetensors, not {file!r}; {MEND}"
            )
    return places
