import json
import os
import stat

import pytest

from mtmoe.files import duplicate, remove_abandoned, replacing, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_block_replaces_the_file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.bin"]


def test_a_block_that_raises_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(ValueError), replacing(tmp_path / "new") as temporary:
        temporary.write_bytes(b"half")
        raise ValueError
    assert names(tmp_path) == []


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"


def test_the_file_is_as_readable_as_one_from_open(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert names(tmp_path) == ["file"]


def test_data_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("sync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write_text(tmp_path / "file", "text")
    assert calls == ["sync", "rename", "sync"]


def test_a_failed_rename_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "file", "text")
    assert names(tmp_path) == []


def test_text_is_utf8_with_plain_line_ends(tmp_path):
    write_text(str(tmp_path / "file"), "Ж\nß\n")
    assert (tmp_path / "file").read_bytes() == "Ж\nß\n".encode()


def test_json_is_indented_and_keeps_letters(tmp_path):
    value = {"name": "македонски", "scores": [1, 2.5, None]}
    write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "македонски" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "file.json", {"new": value})
    assert json.loads((tmp_path / "file.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_gets_a_second_name(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError("not supported")

    (tmp_path / "new").write_text("new")
    (tmp_path / "second").write_text("old")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for _ in range(2):  # once more when it has the name already
        duplicate(tmp_path / "new", tmp_path / "second")
        assert (tmp_path / "second").read_text() == "new"
        assert (tmp_path / "new").samefile(tmp_path / "second") == links
        assert names(tmp_path) == ["new", "second"]


def test_what_a_killed_writer_leaves_is_removed(tmp_path):
    for name in ("model.pt", ".model.pt.abcdefgh.tmp", ".other.txt.abcdefgh.tmp", ".model.pt.x.tmp"):
        (tmp_path / name).touch()
    assert [path.name for path in remove_abandoned(tmp_path, "model*.pt")] == [".model.pt.abcdefgh.tmp"]
    assert names(tmp_path) == [".model.pt.x.tmp", ".other.txt.abcdefgh.tmp", "model.pt"]
    assert remove_abandoned(tmp_path / "none", "*") == []
