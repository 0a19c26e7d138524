import os
import shutil

import pytest
import torch

from mtmoe.errors import CheckpointError
from mtmoe.training.checkpoint_files import check_whole, read_header, whole_checkpoints


def write(path, num_updates, consecutive=0):
    state = {
        "model": {"weight": torch.arange(5000.0) + num_updates},
        "optimizer_history": [{"num_updates": num_updates}],
        "extra_state": {"train_iterator": {"epoch": 1, "progress": {"consecutive_skipped": consecutive}}},
    }
    torch.save(state, path)
    return path


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    """Change one bit of a weight: torch would load it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


def zero(path):
    """What some file systems leave after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def zero_end(path):
    content = path.read_bytes()
    path.write_bytes(content[:-4096] + bytes(4096))


def text(path):
    path.write_text("not a checkpoint")


def pickle_of_nothing(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is cut short"),
        (empty, "is empty"),
        (flip, "the checksum of .*data/0 is wrong"),
        (zero, "does not begin as a checkpoint does"),
        (zero_end, "is cut short"),
        (text, "does not begin as a checkpoint does"),
        (pickle_of_nothing, "cannot be loaded: list indices must be"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    path = write(tmp_path / "checkpoint_last.pt", 7)
    assert read_header(path).num_updates == 7
    check_whole(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
        check_whole(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    for check in (read_header, check_whole):
        with pytest.raises(CheckpointError, match=r"none\.pt cannot be read: No such file"):
            check(tmp_path / "none.pt")


def test_the_steady_ones_come_first_and_the_newest_of_them(tmp_path):
    write(tmp_path / "checkpoint_1_10.pt", 10)
    write(tmp_path / "checkpoint_1_20.pt", 20)
    write(tmp_path / "checkpoint_1_30.pt", 30, consecutive=2)
    flip(write(tmp_path / "checkpoint2.pt", 25))
    write(tmp_path / "crash.pt", 40)
    os.link(tmp_path / "checkpoint_1_20.pt", tmp_path / "checkpoint_best.pt")  # one file by two names counts once
    shutil.copy(tmp_path / "checkpoint_1_30.pt", tmp_path / "checkpoint_last.pt")
    wrong = []

    def names(**options):
        return [each.path.name for each in whole_checkpoints(tmp_path, wrong.append, **options)]

    last = ["checkpoint_1_30.pt", "checkpoint_last.pt"]
    assert names() == ["checkpoint_1_20.pt", "checkpoint_1_10.pt", *last]
    assert len(wrong) == 1
    assert "checkpoint2.pt is damaged" in wrong[0]
    assert names(avoid=20) == ["checkpoint_1_10.pt", "checkpoint_1_20.pt", *last]
    assert names(until=29) == ["checkpoint_1_20.pt", "checkpoint_1_10.pt"]
    assert list(whole_checkpoints(tmp_path / "none", wrong.append)) == []
