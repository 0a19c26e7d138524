"""The benchmark that lays the plan beside real steps: it runs, and what it counts agrees."""

from dataclasses import replace

import pytest

from benchmarks import plan
from mtmoe.planning.training import TrainingSetup

RATES = {"flops_per_second": 1e11, "bytes_per_second": 1e10}


def test_a_small_model_is_planned_and_run():
    shape = replace(
        plan.SMALL, vocabulary_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_d_ffn=32,
        decoder_d_ffn=32, encoder_expert_d_ffn=16, decoder_expert_d_ffn=16, encoder_moe_freq=1, num_experts=2,
    )  # fmt: skip
    setup = TrainingSetup(tokens=64, length=16, dtype="fp32", dropout=False)
    rows = {each.name: each for each in plan.compare(shape, setup, plan.machine_as_gpu(RATES), rounds=2, budget=0.1)}
    assert rows["parameters"].ratio == 1
    step, rate = rows["step at full rate, ms"], rows["GFLOP/s of the machine and of the step"]
    assert step.predicted > 0 and step.measured > 0
    assert rate.predicted == 100
    text = plan.report({"processor": "some", "instructions": [], "threads": 1, "allocator": "some", "versions": {}},
                       {"small": list(rows.values())}, setup)  # fmt: skip
    assert "saved activations, MiB" in text


def test_the_command_writes_a_report(monkeypatch, tmp_path, capsys):
    shape = replace(plan.SHAPES["dense"], d_model=64, encoder_layers=1, decoder_layers=1, vocabulary_size=100)
    monkeypatch.setitem(plan.SHAPES, "dense", shape)
    words = ["--models", "dense", "--tokens", "64", "--rounds", "2", "--budget", "0.1", "--allocator", "system"]
    monkeypatch.setattr("sys.argv", ["plan", *words, "--output", str(tmp_path)])
    assert plan.main() == 0
    assert (tmp_path / "plan.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert (tmp_path / "plan.json").is_file()


def test_nothing_measured_has_no_ratio():
    assert plan.Compared("memory", 3.0, None).ratio is None
    assert plan.Compared("memory", 3.0, 2.0).ratio == pytest.approx(1.5)
