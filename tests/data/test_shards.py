import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mtmoe.data import load_recipe, prepare
from mtmoe.data.mmap_dataset import data_path, read_dataset
from mtmoe.data.shards import has_side, list_path, map_side, read_list, shard_prefix
from mtmoe.errors import ConfigError, DataError

SAMPLE = Path(__file__).parents[2] / "data" / "sample.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return prepare(load_recipe(SAMPLE), tmp_path_factory.mktemp("whole") / "data").folder


def in_shards(folder, size):
    return prepare(dataclasses.replace(load_recipe(SAMPLE), shard_size=size), folder).folder


@pytest.fixture
def sharded(tmp_path):
    return in_shards(tmp_path / "data", 70)


def test_shards_hold_what_one_file_does(whole, sharded):
    prefix = sharded / "bin" / "train.de-en"
    assert [shard.sentences for shard in read_list(prefix)] == [70, 70, 60]
    for language in ("de", "en"):
        ids, sizes = read_dataset(whole / "bin" / f"train.de-en.{language}")
        parts = map_side(prefix, language)
        assert np.array_equal(np.concatenate([part.ids for part in parts]), ids)
        assert np.array_equal(np.concatenate([part.sizes for part in parts]), sizes)
        for part in parts:
            part.check_sizes()
        one = map_side(whole / "bin" / "train.de-en", language)
        assert len(one) == 1
        assert np.array_equal(one[0].ids, ids)
    others = {path.relative_to(whole) for path in whole.rglob("*") if not path.name.startswith("train.")}
    for path in others:  # valid and test stay whole, and the counts of the dictionary are the same
        if (whole / path).is_file() and path.name not in ("data.json", "summary.md"):  # they have the fingerprint
            assert (whole / path).read_bytes() == (sharded / path).read_bytes()
    settings = [json.loads((folder / "data.json").read_text())["settings"] for folder in (whole, sharded)]
    assert settings[1].pop("shard_size") == 70
    assert settings[0] == settings[1]


@pytest.mark.parametrize("size", [1, 33, 199, 200, 10_000])
def test_any_size_of_shard(whole, tmp_path, size):
    folder = in_shards(tmp_path / "data", size)
    prefix = folder / "bin" / "train.de-en"
    assert (read_list(prefix) is None) == (size >= 200)  # a small corpus stays one file
    ids, _ = read_dataset(whole / "bin" / "train.de-en.en")
    assert np.array_equal(np.concatenate([part.ids for part in map_side(prefix, "en")]), ids)


def test_missing_torn_and_foreign_shards_are_named(sharded):
    prefix = sharded / "bin" / "train.de-en"
    path = data_path(shard_prefix(prefix, 1, "de"))
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"shard 1 of 3: .*train\.de-en\.00001\.de\.bin is missing; copy it again"):
        map_side(prefix, "de")
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"shard 1 of 3: .*train\.de-en\.00001\.de\.bin has \d+ bytes, its index says"):
        map_side(prefix, "de")
    path.write_bytes(content)
    for suffix in (".bin", ".idx"):
        other = Path(f"{shard_prefix(prefix, 2, 'de')}{suffix}")
        Path(f"{shard_prefix(prefix, 1, 'de')}{suffix}").write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"shard 1 of 3: .* has 60 sentences .* says 70 of \d+: it is of another prep"):
        map_side(prefix, "de")
    assert len(map_side(prefix, "en")) == 3


def test_a_list_that_is_wrong_is_refused(sharded):
    prefix = sharded / "bin" / "train.de-en"
    path = list_path(prefix)
    good = path.read_text()
    for text, message in (
        (good[:30], "is damaged"),
        ('{"format": 2, "shards": []}', "has format 2, this version reads 1; update mtmoe"),
        ('{"format": 1, "shards": []}', "it lists no shards"),
        (good.replace('"de"', '"nl"'), "has nl, en, not 'de'"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            map_side(prefix, "de")
    path.write_text(good)
    (prefix.parent / "train.de-en.de.idx").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.de-en\.de\.idx is there as well; remove the older of the two"):
        map_side(prefix, "de")
    assert has_side(prefix, "de")
    assert not has_side(prefix.with_name("train.de-fr"), "de")


def test_another_size_replaces_the_shards_of_a_run_that_was_cut_off(tmp_path, monkeypatch, whole):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mtmoe.data.prepare"], "_describe", killed)
    for size in (70, 0):
        with pytest.raises(KeyboardInterrupt):
            in_shards(tmp_path / "data", size)
    monkeypatch.undo()
    folder = in_shards(tmp_path / "data", 0)
    names = [sorted(path.name for path in (root / "bin").iterdir()) for root in (folder, whole)]
    assert names[0] == names[1]


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="shard_size: -1 must be at least 1 sentence pair, or 0 for one file"):
        dataclasses.replace(load_recipe(SAMPLE), shard_size=-1)
