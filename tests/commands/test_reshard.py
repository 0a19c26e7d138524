"""`mtmoe reshard`, and everything else that takes a checkpoint, over directories."""

import pytest
import torch
from reference.fairseq_file import fairseq_state
from reference.models import toy_model, write_toy_vocabulary
from reference.training_states import assert_same, whole_state

from mtmoe.checkpoint import open_model
from mtmoe.checkpoint.sharded import give_name, reshard
from mtmoe.cli import main
from mtmoe.errors import CheckpointError


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run with one sharded checkpoint, and the file that it was made from."""
    data = write_toy_vocabulary(tmp_path / "run" / "data")
    state = fairseq_state(toy_model(data, moe=True))
    del state["last_optimizer_state"]
    torch.save(state, tmp_path / "single.pt")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir()
    reshard(tmp_path / "single.pt", folder / "checkpoint_1_7", 2)
    give_name(folder / "checkpoint_1_7", folder / "checkpoint_best.pt")
    return tmp_path / "run"


@pytest.mark.parametrize("given_as", [".", "checkpoints/checkpoint_best.pt", "checkpoints/checkpoint_1_7"])
def test_a_directory_is_opened_as_a_file_is(run_folder, tmp_path, given_as):
    path = run_folder / given_as
    expected, found = open_model(tmp_path / "single.pt", run_folder / "data"), open_model(path)
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert main(["convert", str(path), "--output", str(tmp_path / "model")]) == 0
    folder = open_model(tmp_path / "model")
    assert all(torch.equal(folder.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_damage_is_told(run_folder):
    shard = run_folder / "checkpoints" / "checkpoint_1_7" / "experts-00001-of-00002.pt"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"experts-00001-of-00002.pt is cut short"):
        open_model(run_folder)


def test_from_file_to_directory_and_back(tmp_path, capsys):
    whole = whole_state((4, 8))
    torch.save(whole, tmp_path / "a.pt")
    assert main(["reshard", str(tmp_path / "a.pt"), str(tmp_path / "b"), "--expert-parallel-size", "4"]) == 0
    assert main(["reshard", str(tmp_path / "b"), str(tmp_path / "c.pt")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/b: 4 files of experts\n{tmp_path}/c.pt: one file\n"
    assert_same(torch.load(tmp_path / "c.pt", weights_only=True), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.pt", "b"], "no.pt does not exist; give a sharded checkpoint or fairseq's file (.pt)"),
        (["a.pt", "b", "--expert-parallel-size", "3"], "expert_parallel_size=3 does not divide the 4 experts"),
        (["a.pt", "b", "--expert-parallel-size", "0"], "--expert-parallel-size 0 must be at least 1"),
        (["a.pt", "a.pt", "--expert-parallel-size", "2"], "a.pt exists and is left as it is. Choose another name"),
        (["a.pt", "."], "is a directory; give the name of a file, or --expert-parallel-size"),
        (["text", "b.pt"], "text is damaged or not safe to read"),
        (["other.pt", "b.pt"], "holds no 'model': it is no fairseq checkpoint"),
    ],
)
def test_mistakes(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(whole_state((4, 8)), "a.pt")
    torch.save({"weights": 1}, "other.pt")
    (tmp_path / "text").write_text("text")
    assert main(["reshard", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "other.pt", "text"]
