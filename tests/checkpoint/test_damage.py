"""Damage of every kind: an error that names the file, never a crash, a hang or wrong weights taken for right ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference.models import as_version_1, toy_model

from mtmoe.checkpoint import checksums
from mtmoe.checkpoint.folder import read_folder, write_folder
from mtmoe.errors import CheckpointError

FILES = st.integers(0, 100)
PLACES = st.floats(0, 1, exclude_max=True)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, vocabulary):
    """A whole folder of parts, and the same in version 1 in one file."""
    parts, old = (tmp_path_factory.mktemp("whole") / name for name in ("parts", "old"))
    write_folder(parts, toy_model(vocabulary, moe=True), part_bytes=12_000)
    write_folder(old, toy_model(vocabulary, moe=True))
    as_version_1(old)
    return {"parts": parts, "old": old}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Where copies are broken."""
    return tmp_path_factory.mktemp("broken") / "model"


def copy_of(whole: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(whole, to))


def pick(folder: Path, number: int) -> Path:
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    return files[number % len(files)]


def as_it_was(folder: Path, whole: Path) -> bool:
    """Whether all of a model reads as the whole one does."""
    found, expected = read_folder(folder), read_folder(whole)
    told = (found.config, found.languages, found.history, found.data, found.figures)
    return (
        told == (expected.config, expected.languages, expected.history, expected.data, expected.figures)
        and found.tensors.keys() == expected.tensors.keys()
        and all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
        and found.dictionary.read_bytes() == expected.dictionary.read_bytes()
        and found.sentencepiece.read_bytes() == expected.sentencepiece.read_bytes()
    )


def refused_or_as_it_was(folder: Path, whole: Path) -> None:
    try:
        sound = as_it_was(folder, whole)
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        assert sound


@settings(max_examples=120, deadline=None)
@given(number=FILES, place=PLACES, bit=st.integers(0, 7))
@example(number=0, place=0.05, bit=1)
def test_a_flipped_bit(folders, broken, number, place, bit):
    folder = copy_of(folders["parts"], broken)
    path = pick(folder, number)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    if path.name == "checksums.json":  # a space that becomes a tab there means nothing
        refused_or_as_it_was(folder, folders["parts"])
    else:
        with pytest.raises(CheckpointError, match=path.name):
            read_folder(folder)


@settings(max_examples=60, deadline=None)
@given(number=FILES, share=PLACES)
def test_a_truncated_file(folders, broken, number, share):
    folder = copy_of(folders["parts"], broken)
    path = pick(folder, number)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    if path.name == "checksums.json":  # all but its last line break may be there
        refused_or_as_it_was(folder, folders["parts"])
    else:
        with pytest.raises(CheckpointError, match=path.name):
            read_folder(folder)


@settings(max_examples=40, deadline=None)
@given(first=FILES, second=FILES)
def test_two_swapped_files(folders, broken, first, second):
    folder = copy_of(folders["parts"], broken)
    a, b = pick(folder, first), pick(folder, second)
    if a == b:
        return
    old = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(old)
    with pytest.raises(CheckpointError, match=r"checksums\.json|damaged"):
        read_folder(folder)


@settings(max_examples=40, deadline=None)
@given(number=FILES)
def test_a_removed_file(folders, broken, number):
    folder = copy_of(folders["parts"], broken)
    path = pick(folder, number)
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        read_folder(folder)


@settings(max_examples=120, deadline=None)
@given(number=FILES, place=PLACES, junk=st.binary(min_size=1, max_size=20), cut=st.booleans())
def test_version_1_never_crashes(folders, broken, number, place, junk, cut):
    # There are no checksums: what still reads as a model is taken for one, anything else is an error that names it.
    folder = copy_of(folders["old"], broken)
    path = pick(folder, number)
    content = path.read_bytes()
    begin = int(place * len(content))
    path.write_bytes(content[:begin] + junk + (b"" if cut else content[begin + len(junk) :]))
    try:
        model = read_folder(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        assert sum(float(tensor.sum()) for tensor in model.tensors.values()) is not None


def test_parts_of_equal_size_are_told_apart_without_hashing(folders, broken, monkeypatch):
    monkeypatch.setattr(checksums, "HASHED_BYTES", 0)
    folder = copy_of(folders["parts"], broken)
    parts = sorted(folder.glob("model-*.safetensors"))
    sizes = [path.stat().st_size for path in parts]
    pairs = [(a, b) for a in range(len(parts)) for b in range(a) if sizes[a] == sizes[b]]
    assert pairs  # the layers are alike
    a, b = (parts[number] for number in pairs[0])
    old = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(old)
    with pytest.raises(CheckpointError, match=r"safetensors lacks .* and has .*, which the index has elsewhere"):
        read_folder(folder)


def test_large_weights_are_hashed_when_asked(folders, broken, monkeypatch):
    monkeypatch.setattr(checksums, "HASHED_BYTES", 0)
    folder = copy_of(folders["parts"], broken)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read_folder(folder)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged: its SHA-256"):
        read_folder(folder, verify=True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "checksums.json lacks files"),
        ('{"files": {}}', "checksums.json lacks files"),
        ('{"files": {"a": 3}}', r"files\.a must have bytes and sha256, not 3"),
        ('{"files": {"../a": {"bytes": 3, "sha256": ""}}}', r"files\.\.\./a must have"),
        ('{"files": ' + "[" * 100_000, "checksums.json is not valid JSON"),
    ],
)
def test_checksums_of_another_form(folders, broken, content, text):
    folder = copy_of(folders["parts"], broken)
    (folder / "checksums.json").write_text(content)
    with pytest.raises(CheckpointError, match=text):
        read_folder(folder)


def test_an_index_that_leads_elsewhere(folders, broken):
    folder = copy_of(folders["parts"], broken)
    (folder / "checksums.json").unlink()
    for content, text in (
        ('{"weight_map": {"a": "../secret.safetensors"}}', r"weight_map\.a must be a file as model-00001"),
        ("{}", "lacks weight_map"),
    ):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"checksums\.json"):  # version 2 must have one
            read_folder(folder)
        files = {path.name: "" for path in folder.iterdir()}
        checksums.write_checksums(folder, files)
        with pytest.raises(CheckpointError, match=text):
            read_folder(folder)
        (folder / "checksums.json").unlink()


SPARSE = """
import json, sys
from pathlib import Path
import torch
from reference.models import toy_config, toy_model
from mtmoe.checkpoint.folder import read_folder, write_folder
from mtmoe.checkpoint.inspection import describe
from mtmoe.checkpoint.checksums import CHECKSUMS
from mtmoe.checkpoint.stored import expected_shapes
from mtmoe.checkpoint.tensors import rows_of

vocabulary, folder = Path(sys.argv[1]), Path(sys.argv[2])
model = toy_model(vocabulary, moe=True)
write_folder(folder, model)
from dataclasses import replace
wide = replace(model.config.encoder_moe, d_ffn=2_000_000, num_experts=32)
config = replace(model.config, encoder_moe=wide, decoder_moe=wide)
values = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps(values | {"model": config.to_json()}))
(folder / "model.safetensors").unlink()
names = list(expected_shapes(config).items())
halves = [names[: len(names) // 2], names[len(names) // 2 :]]
places = {}
for number, half in enumerate(halves, start=1):
    header, end = {}, 0
    for name, shape in half:
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        places[name] = f"model-{number:05}-of-00002.safetensors"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / f"model-{number:05}-of-00002.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
from mtmoe.checkpoint.checksums import sha256
files = {}
for path in folder.iterdir():
    if path.name not in (CHECKSUMS, "README.md"):
        digest = "" if path.suffix == ".safetensors" else sha256(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
(folder / CHECKSUMS).write_text(json.dumps({"files": files}))

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
model = read_folder(folder)
about = describe(model)
expert = rows_of(model.tensors, "decoder.layers.1.moe.experts.w_out", 7, 8)
print(json.dumps([about["weight_bytes"], expert.nbytes, resident() - before]))
"""


def test_a_large_folder_is_opened_without_reading_it(vocabulary, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SPARSE, str(vocabulary), str(tmp_path / "model")],
        capture_output=True, text=True, timeout=250,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, expert, grown = json.loads(done.stdout)
    assert weights > 16e9  # bytes that the files claim; the disk has none of them
    assert grown < expert + 50e6
