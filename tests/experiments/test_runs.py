"""A whole experiment on the sample data: trained, stopped, gone on with, scored."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint
from mtmoe.evaluation.metrics import score
from mtmoe.evaluation.test_sets import PreparedData
from mtmoe.routing_table import RoutingTable

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "experiments" / "low_resource.py"

pytestmark = pytest.mark.slow

BASE = {
    "arch": "mtmoe_transformer_tiny",
    "options": {
        "moe-freq": 2,
        "encoder-layers": 2, "decoder-layers": 2, "encoder-embed-dim": 32, "encoder-ffn-embed-dim": 64,
        "encoder-attention-heads": 2, "decoder-attention-heads": 2, "num-experts": 4, "dropout": 0.1, "max-tokens": 512,
        "max-update": 300, "lr": 0.003, "lr-scheduler": "polynomial_decay", "warmup-updates": 10, "cpu": True,
        "log-interval": 10, "validate-interval-updates": 100, "save-interval-updates": 100, "keep-interval-updates": 1,
        "validate-interval": 1000000, "save-interval": 1000000, "no-epoch-checkpoints": True, "train-sample": 5,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    document = {
        "name": "tiny", "recipe": str(ROOT / "data" / "sample.yaml"), "output": str(folder / "runs"),
        "results": str(folder / "results"), "baseline": "moe", "seeds": [1], "jobs": 1, "checkpoint": "last",
        "beam": 1, "base": BASE,
        "configurations": {
            "moe": {"title": "MoE"},
            "late": {"title": "late", "derived": {"source": "moe", "shares": [1.0, 0.5]}},
        },
    }  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def start(path, *words):
    command = [sys.executable, str(SCRIPT), "--experiment", str(path), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(path, *words):
    process = start(path, *words)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    return output


def test_an_experiment_survives_a_stop_and_is_scored_once(experiment):
    folder = experiment.parent
    assert "0 of 2 runs are done" in finish(experiment, "--dry-run")
    process = start(experiment, "--only", "moe")
    log = folder / "runs" / "moe" / "seed1" / "log.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (log.is_file() and '"kind": "valid"' in log.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "run the same command to go on" in output
    assert " of 300 updates" in finish(experiment, "--dry-run")

    finish(experiment)
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "results" / "runs").iterdir()}
    assert set(results) == {"moe.seed1", "late.seed1"}
    moe, late = results["moe.seed1"], results["late.seed1"]
    assert [point["update"] for point in moe["valid"]] == [100, 200, 300]
    assert moe["updates"] == 300
    assert set(moe["valid"][0]["nll_loss"]) == set(moe["bucket"]) == set(moe["valid_scores"])
    assert [point["update"] for point in moe["train_sample"]] == [100, 200, 300]
    assert moe["test_scores"] is None
    table = RoutingTable.load(folder / "results" / "routing" / "moe.seed1.json")
    assert set(table.rows) == set(moe["bucket"])
    assert moe["total_seconds"] > 0
    assert moe["command"][:1] == ["fairseq-train"]
    assert moe["command"][moe["command"].index("--user-dir") + 1] == "fairseq_plugins"
    assert late["settings"]["curriculum"] != moe["settings"]["curriculum"]
    assert late["model"] == moe["model"]
    last = read_fairseq_checkpoint(folder / "runs" / "moe" / "seed1" / "checkpoints" / "checkpoint_last.pt")
    tensors = load_file(folder / "runs" / "moe" / "seed1" / "model" / "model.safetensors")
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(tensors[name], last.tensors[name])

    finish(experiment, "--test")
    scored = json.loads((folder / "results" / "runs" / "moe.seed1.json").read_text())["test_scores"]
    data = PreparedData(folder / "runs" / "data")
    with lzma.open(folder / "results" / "outputs" / "moe.seed1.test.jsonl.xz", "rt", encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    assert {line["direction"] for line in lines} == set(scored)
    line = lines[0]
    test_set = data.read(line["direction"], "test")
    assert scored[line["direction"]]["chrf++"] == score(
        test_set.sources, line["hypotheses"], test_set.references, test_set.target
    ).chrf


def test_wrong_names_are_told(experiment):
    process = start(experiment, "--only", "nothing")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "configuration 'nothing' is unknown; tiny has: moe, late" in output
