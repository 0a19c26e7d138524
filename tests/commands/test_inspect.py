"""`mtmoe inspect`: what it says of folders and checkpoints, and what it checks."""

import json
from dataclasses import replace

import pytest
import torch
from reference.fairseq_file import fairseq_state
from reference.models import as_version_1, toy_model, write_toy_vocabulary

from mtmoe.checkpoint.folder import write_folder
from mtmoe.cli import main


@pytest.fixture
def data(tmp_path):
    return write_toy_vocabulary(tmp_path / "run" / "data")


@pytest.fixture
def folder(data, tmp_path):
    model = toy_model(data, moe=True).after("pruned", keep=0.5)
    figures = {"mean_chrf++": 47.0, "mean_bleu": 30.0, "directions": {"en-de": {"chrf++": 47.0, "bleu": 30.0}}}
    write_folder(tmp_path / "model", replace(model, data={"recipe": "toy", "licence": "CC0"}, figures=figures))
    return tmp_path / "model"


def inspect(capsys, *words, code=0):
    assert main(["inspect", *map(str, words)]) == code
    return capsys.readouterr()


def test_for_people(folder, capsys):
    text = inspect(capsys, "--verify", folder).out
    for part in (
        "fp32", "encoder      2 layers, 2 heads, feed-forward 32; 1 with 4 experts of 24, top-2, CMR",
        "languages    3: de, en, mk", "directions   4", "data         toy; CC0", "history      pruned: keep 0.5",
        "figures      mean of 1 directions: 47.0 chrF++, 30.0 BLEU", "en-de         47.0 chrF++",
        "checksums    all files are as they were written",
    ):  # fmt: skip
        assert part in text, text


def test_json_counts_what_a_token_uses(folder, data, capsys):
    about = json.loads(inspect(capsys, "--json", folder).out)
    model = toy_model(data, moe=True)
    total = sum(tensor.numel() for tensor in model.tensors.values())
    experts = sum(tensor.numel() for name, tensor in model.tensors.items() if ".moe.experts." in name)
    assert about["parameters"] == total
    assert about["active_parameters"] == total - experts // 2  # two of four
    assert about["weight_bytes"] == 4 * total
    assert about["dtypes"] == {"fp32": total}
    assert about["encoder"]["experts"] == [4]
    assert about["history"][0]["operation"] == "pruned"


def test_a_dense_checkpoint_of_a_run(data, tmp_path, capsys):
    path = tmp_path / "run" / "checkpoints" / "checkpoint_best.pt"
    path.parent.mkdir()
    torch.save(fairseq_state(toy_model(data)), path)
    shown = inspect(capsys, tmp_path / "run")
    assert "feed-forward 24\n" in shown.out
    assert "converted: source fairseq checkpoint checkpoint_best.pt, updates 7" in shown.out
    assert shown.err == f"mtmoe inspect: using {path}\n"
    assert "needs a model folder with checksums" in inspect(capsys, "--verify", path, code=1).err


def test_damage_and_version_1(folder, capsys):
    content = bytearray((folder / "spm.model").read_bytes())
    content[100] ^= 1
    (folder / "spm.model").write_bytes(content)
    assert "spm.model is damaged: its SHA-256" in inspect(capsys, folder, code=1).err
    content[100] ^= 1
    (folder / "spm.model").write_bytes(content)
    as_version_1(folder)
    inspect(capsys, folder)
    assert "is of version 1, without checksums; write it anew" in inspect(capsys, "--verify", folder, code=1).err
