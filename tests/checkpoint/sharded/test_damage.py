"""Damaged checkpoints: each is refused with the file, the reason and the way out, and an older one is found."""

import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.training_states import assert_same, save_all, whole_state

from mtmoe.checkpoint.sharded import (
    check_files,
    complete_checkpoints,
    is_sharded,
    newest_complete,
    read_manifest,
    read_state,
)
from mtmoe.checkpoint.sharded.manifest import write_manifest
from mtmoe.errors import CheckpointError

FILES = ["manifest.json", "shared.pt", "experts-00000-of-00002.pt", "experts-00001-of-00002.pt"]


def truncate(path, draw):
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def remove(path, draw):
    path.unlink()


def zero(path, draw):
    path.write_bytes(bytes(path.stat().st_size))


def grow(path, draw):
    with path.open("ab") as file:
        file.write(b"\0")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder / "checkpoint_1_5", whole_state(updates=5), 2)
    save_all(folder / "checkpoint_1_7", whole_state(updates=7, seed=1), 2)
    return folder


@settings(max_examples=60)
@given(
    name=st.sampled_from(FILES),
    damage=st.sampled_from([truncate, flip, remove, zero, grow]),
    seed=st.integers(0, 10**6),
)
def test_damage_is_found_named_and_an_older_one_is_taken(saved, name, damage, seed):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoints"
        shutil.copytree(saved, folder)
        newest = folder / "checkpoint_1_7"
        damage(newest / name, random.Random(seed))
        if name == "manifest.json" and damage is grow:
            return  # a byte after the JSON is refused, or is white space
        with pytest.raises(CheckpointError) as caught:
            read_state(newest)
        assert name in str(caught.value)
        complaints = []
        assert newest_complete(folder, complaints.append) == folder / "checkpoint_1_5"
        assert len(complaints) == 1
        assert name in complaints[0]
        assert_same(read_state(folder / "checkpoint_1_5"), whole_state(updates=5))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"experts-00001-of-00002.pt is cut short: it has [\d,]+ bytes of [\d,]+. Put that file back"),
        (flip, r"experts-00001-of-00002.pt is damaged: its checksum is wrong. .*--restore-file"),
        (remove, "experts-00001-of-00002.pt is missing. Put that file back"),
    ],
)
def test_errors_tell_the_way_out(saved, tmp_path, damage, message):
    copy = shutil.copytree(saved / "checkpoint_1_7", tmp_path / "checkpoint_1_7")
    damage(copy / "experts-00001-of-00002.pt", random.Random(1))
    with pytest.raises(CheckpointError, match=message):
        read_state(copy, place=1, places=2)
    read_state(copy, place=0, places=2)  # the other place does not need that file


def test_swapped_shards_and_an_older_manifest_are_found(saved, tmp_path):
    copy = shutil.copytree(saved / "checkpoint_1_7", tmp_path / "checkpoint_1_7")
    first, second = copy / FILES[2], copy / FILES[3]
    content = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"experts-00000.*checksum is wrong"):
        read_state(copy)
    shutil.rmtree(copy)
    shutil.copytree(saved / "checkpoint_1_7", copy)
    shutil.copyfile(saved / "checkpoint_1_5" / "manifest.json", copy / "manifest.json")
    with pytest.raises(CheckpointError, match="checksum is wrong"):
        read_state(copy)


def test_a_tensor_of_another_shape_is_named(saved, tmp_path):
    """As when somebody has edited both a shard and the manifest's checksum of it."""
    copy = shutil.copytree(saved / "checkpoint_1_7", tmp_path / "checkpoint_1_7")
    manifest = read_manifest(copy)
    path = copy / FILES[2]
    values = torch.load(path, weights_only=True)
    name = "model/decoder.layers.0.moe.experts.b_in"
    values[name] = values[name].double()
    torch.save(values, path)
    with pytest.raises(CheckpointError, match=f"{name} is float64 .*the manifest says float32"):
        read_state(copy, verify=False, places=2) if path.stat().st_size == manifest.files[FILES[2]].size else _reseal(
            copy, manifest, FILES[2]
        )


def _reseal(directory, manifest, name):
    import hashlib
    from dataclasses import replace

    content = (directory / name).read_bytes()
    record = replace(manifest.files[name], size=len(content), sha256=hashlib.sha256(content).hexdigest())
    write_manifest(directory, replace(manifest, files={**manifest.files, name: record}))
    read_state(directory, places=2)


def test_a_file_that_wants_to_run_code_is_refused(saved, tmp_path):
    copy = shutil.copytree(saved / "checkpoint_1_7", tmp_path / "checkpoint_1_7")

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model/decoder.layers.0.moe.experts.b_in": Bomb()}, copy / FILES[2])
    with pytest.raises(CheckpointError, match=r"experts-00000.* not safe to read"):
        _reseal(copy, read_manifest(copy), FILES[2])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 is unknown, this mtmoe reads 1. Update mtmoe"),
        ({"format": "other"}, "format must be 'mtmoe sharded checkpoint'"),
        ({"world_size": 99}, "its checksum is wrong"),
    ],
)
def test_manifests_of_another_kind(saved, tmp_path, changes, message):
    copy = shutil.copytree(saved / "checkpoint_1_7", tmp_path / "checkpoint_1_7")
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(copy)


def test_sizes_alone_do_not_read_the_files(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "checkpoints")
    flip(copy / "checkpoint_1_7" / FILES[3], random.Random(3))
    check_files(copy / "checkpoint_1_7", read_manifest(copy / "checkpoint_1_7"), contents=False)
    found = list(complete_checkpoints(copy, pytest.fail, contents=False))
    assert [each.manifest.num_updates for each in found] == [7, 5]
    assert is_sharded(copy / "checkpoint_1_7")
    assert not is_sharded(copy)
