"""``mtmoe plan``: what it reads, prints and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from reference.fairseq_file import fairseq_state
from reference.models import toy_model, write_toy_vocabulary

from mtmoe import cli
from mtmoe.checkpoint.folder import write_folder


def plan(capsys, *words):
    status = cli.main(["plan", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def planned(capsys, *words):
    status, out, err = plan(capsys, *words, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_tables_and_recommendation(capsys):
    status, out, _ = plan(capsys, "mtmoe_transformer_base", "--vocab", 32000, "--gpu", "h100", "--options", "--explain")
    assert status == 0
    for text in ("Parameters", "Layouts", "Memory of a GPU", "Time of an update", "Options, each alone", "utilisation",
                 "Recommended: expert-parallel size"):  # fmt: skip
        assert text in out
    assert max(map(len, out.splitlines()[:40])) < 200


def test_none_fits_is_status_1(capsys):
    status, out, _ = plan(capsys, "mtmoe_transformer_nllb", "--gpus", 8)
    assert status == 1
    assert "Recommended: none: no layout fits" in out


def test_options_change_the_shape(capsys):
    model = planned(
        capsys, "mtmoe_transformer_tiny", "--vocab", 1000, "--d-model", 128, "--d-ffn", 256, "--layers", 4,
        "--encoder-layers", 5, "--experts", 16, "--moe-freq", 1, "--top-k", 1, "--cmr", "--cmr-d-ffn", 64, "--eom", 0.1,
        "--no-share-embeddings",
    )["model"]  # fmt: skip
    expected = {
        "vocabulary_size": 1000, "d_model": 128, "encoder_d_ffn": 256, "decoder_expert_d_ffn": 256,
        "encoder_layers": 5, "decoder_layers": 4, "num_experts": 16, "decoder_moe_freq": 1, "top_k": 1, "cmr": True,
        "cmr_d_ffn": 64, "eom": 0.1, "share_all_embeddings": False,
    }  # fmt: skip
    assert {name: model[name] for name in expected} == expected


def test_hardware_and_training_options(capsys):
    document = planned(
        capsys, "mtmoe_transformer_tiny", "--gpus", 16, "--gpus-per-node", 4, "--memory", 24, "--flops", 100,
        "--network", "50,5", "--tokens", 1024, "--dtype", "fp16", "--zero1", "--expert-parallel-size", 4,
        "--assume", "utilisation=0.25",
    )  # fmt: skip
    gpu = document["cluster"]["gpu"]
    assert gpu["memory"] == 24 * 2**30
    assert (gpu["flops"]["half"], gpu["network_in_node"], gpu["network_between_nodes"]) == (100e12, 50e9, 5e9)
    assert [layout["expert_parallel"] for layout in document["layouts"]] == [4]
    assert document["setup"]["zero1"] and document["setup"]["tokens"] == 1024
    assert document["assumptions"]["utilisation"] == 0.25


def test_a_preset_and_its_data(capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "dict.txt").write_text("a 1\nb 1\n", encoding="utf-8")
    preset = tmp_path / "preset.yaml"
    options = {"num-experts": 4, "encoder-layers": 2, "share-all-embeddings": True, "max-tokens": 512,
               "update-freq": [2], "bf16": True, "checkpoint-activations": True}  # fmt: skip
    content = {"data": str(data), "output": str(tmp_path), "arch": "mtmoe_transformer_base", "options": options}
    preset.write_text(yaml.safe_dump(content))
    document = planned(capsys, preset)
    model, setup = document["model"], document["setup"]
    assert (model["vocabulary_size"], model["num_experts"], model["encoder_layers"]) == (6, 4, 2)
    assert (model["decoder_layers"], model["d_model"]) == (6, 512)
    assert (setup["tokens"], setup["accumulate"], setup["dtype"], setup["recompute"]) == (512, 2, "bf16", True)
    changed = planned(capsys, preset, "--tokens", 256, "--dtype", "fp32")["setup"]
    assert (changed["tokens"], changed["accumulate"], changed["dtype"]) == (256, 2, "fp32")


@pytest.mark.parametrize("name", ["tiny", "base", "demo", "demo_dense"])
def test_presets_of_the_project(capsys, name):
    preset = Path(__file__).parents[2] / "scripts" / "train" / f"{name}.yaml"
    assert planned(capsys, preset)["recommended"] >= 1


def test_a_model_folder(capsys, tmp_path):
    model = toy_model(write_toy_vocabulary(tmp_path / "data"), moe=True)
    write_folder(tmp_path / "model", model)
    document = planned(capsys, tmp_path / "model", "--gpus", 4)
    assert document["parameters"]["total"] == sum(tensor.numel() for tensor in model.tensors.values())
    assert document["model"]["eom"] == 0.2


def test_a_checkpoint_beside_its_data(capsys, tmp_path):
    data = write_toy_vocabulary(tmp_path / "data")
    model = toy_model(data, moe=True)
    path = tmp_path / "checkpoints" / "checkpoint_best.pt"
    path.parent.mkdir()
    torch.save(fairseq_state(model), path)
    document = planned(capsys, path, "--data", data, "--gpus", 2)
    assert document["parameters"]["total"] == sum(tensor.numel() for tensor in model.tensors.values())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nllb"], "model 'nllb' is unknown; choose one of: mtmoe_transformer, "),
        (["--gpu", "tpu"], "--gpu 'tpu' is unknown; choose one of: v100-32, "),
        (["--gpus", "12"], "12 GPUs do not fill nodes of 8"),
        (["--network", "300"], "--network '300' must be two numbers in GB/s, such as 300,25"),
        (["--network", "300,0"], "network_between_nodes=0.0 of a100-80 must be above 0"),
        (["--memory", "-3"], "must be above 0"),
        (["--top-k", "99"], "top_k=99 must be between 1 and num_experts=8"),
        (["--expert-parallel-size", "3"], "expert-parallel size 3 must divide 8 GPUs and 8 experts"),
        (["--assume", "x=1"], "must be NAME=VALUE"),
        (["--overlap"], "add --cmr"),
    ],
)
def test_bad_values_are_one_line(capsys, words, text):
    status, out, err = plan(capsys, *words)
    assert (status, out) == (1, "")
    assert err.startswith("mtmoe plan: error: ") and err.count("\n") == 1
    assert text in err


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {}}', '{"model": {"encoder_moe": 3}}'])
def test_folders_of_something_else(capsys, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    status, _, err = plan(capsys, tmp_path)
    assert status == 1
    assert str(tmp_path) in err


def test_planning_loads_nothing_heavy():
    script = (
        "import sys; from mtmoe import cli; status = cli.main(['plan', 'mtmoe_transformer_base', '--json'])\n"
        "print(sorted({'torch', 'numpy', 'fairseq'} & set(sys.modules)), status, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[] 0\n"
