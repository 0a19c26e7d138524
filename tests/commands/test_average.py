"""`mtmoe average`: folders and checkpoints by name, or the last of a run."""

import pytest
import torch
from reference.fairseq_file import fairseq_state
from reference.models import toy_model, write_toy_vocabulary

from mtmoe.checkpoint import open_model
from mtmoe.checkpoint.folder import write_folder
from mtmoe.cli import main

WEIGHT = "encoder.layers.0.fc1.weight"


@pytest.fixture
def run_folder(tmp_path):
    data = write_toy_vocabulary(tmp_path / "run" / "data")
    (tmp_path / "run" / "checkpoints").mkdir()
    for seed in range(3):
        state = fairseq_state(toy_model(data, seed=seed))
        state["optimizer_history"][-1]["num_updates"] = 100 * seed
        torch.save(state, tmp_path / "run" / "checkpoints" / f"checkpoint_1_{100 * seed}.pt")
    return tmp_path / "run"


def test_checkpoints_and_folders_together(run_folder, tmp_path, capsys):
    write_folder(tmp_path / "third", toy_model(run_folder / "data", seed=5))
    first = run_folder / "checkpoints" / "checkpoint_1_0.pt"
    assert main(["average", str(first), str(tmp_path / "third"), "-o", str(tmp_path / "out")]) == 0
    weights = [toy_model(run_folder / "data", seed=seed).tensors[WEIGHT].double() for seed in (0, 5)]
    found = open_model(tmp_path / "out")
    assert torch.equal(found.tensors[WEIGHT], (sum(weights) / 2).float())
    assert found.history[-1]["models"] == ["checkpoint_1_0.pt", "third"]
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: the mean of 2 models\n"


def test_the_last_of_a_run(run_folder, tmp_path, capsys):
    assert main(["average", "--last", "2", str(run_folder), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "mtmoe average: checkpoint_1_100.pt, checkpoint_1_200.pt\n"
    weights = [toy_model(run_folder / "data", seed=seed).tensors[WEIGHT].double() for seed in (1, 2)]
    assert torch.equal(open_model(tmp_path / "out").tensors[WEIGHT], (sum(weights) / 2).float())


def test_mistakes(run_folder, tmp_path, capsys):
    checkpoint = str(run_folder / "checkpoints" / "checkpoint_1_0.pt")
    write_folder(tmp_path / "moe", toy_model(run_folder / "data", moe=True))
    for words, text in (
        ([checkpoint, checkpoint], "the same model is given twice"),
        ([checkpoint], "needs two models or more, not 1"),
        (["--last", "9", str(run_folder)], "has 3 checkpoints of different updates, not 9"),
        (["--last", "1", str(run_folder)], "--last 1: an average needs two checkpoints or more"),
        (["--last", "2", checkpoint, checkpoint], "--last takes the folder of one run, not 2 paths"),
        ([checkpoint, str(tmp_path / "moe")], "are no models of one training: encoder_moe_freq is 0 and 2"),
    ):
        assert main(["average", *words, "-o", str(tmp_path / "out")]) == 1
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
