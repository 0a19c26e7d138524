"""Ratios, limits and tables of records that were written by hand."""

from pathlib import Path

import pytest

from benchmarks import plots, report


def record(dtype="bf16", experts=8, hugging_face=True):
    def peer(milliseconds):
        return {
            "status": "ok",
            "memory_bytes": 2**20,
            "comparison": {"output": {"error": 1e-3, "rows_off": 0.0, "ok": True}},
            "forward_backward": {"median": milliseconds / 1e3, "min": milliseconds / 1e3, "rounds": 5},
        }

    other = peer(1000) if hugging_face else {"status": "wrong", "reason": "output off for 50.0 % of the tokens"}
    case = {"tokens": 2048, "d_model": 512, "d_ffn": 2048, "top_k": 2, "dtype": dtype, "num_experts": experts}
    return {
        "key": {"case": case, "settings": {"rounds": 5}},
        "peers": {"ours": peer(60), "dense": peer(50), "deepspeed": peer(90), "hugging_face": other},
        "limits": {"forward_backward": {"gemm": 0.020, "bandwidth": 0.030}},
        "touched_experts": experts,
    }


MACHINE = {
    "processor": "P", "instructions": ["avx2"], "threads": 2, "allocator": "tcmalloc",
    "versions": {"torch": "2.13", "tutel": "not installed"},
}  # fmt: skip


def test_ratios_are_of_medians_and_none_without_a_time():
    row = record(hugging_face=False)
    assert report.ratio(row, "forward_backward", "ours", "dense") == pytest.approx(1.2)
    assert report.ratio(row, "forward_backward", "deepspeed", "ours") == pytest.approx(1.5)
    assert report.ratio(row, "forward_backward", "hugging_face", "dense") is None
    assert report.ratio(row, "forward", "ours", "dense") is None


def test_the_larger_limit_binds():
    ratio, binding = report.limit_ratio(record(), "forward_backward")
    assert (ratio, binding) == (pytest.approx(2.0), "bandwidth")


def test_a_table_has_the_ratios_and_names_who_was_not_timed():
    text = report.layer_report(MACHINE, {"headline": [record(), record(experts=32, hugging_face=False)]})
    first = next(line for line in text.splitlines() if line.startswith("| 2048"))
    cells = [cell.strip() for cell in first.split("|")[4:-1]]
    assert cells == ["**1.20**", "1.80", "20.00", "1.50", "2.0", "bandwidth"]
    assert "Hugging Face NllbMoeSparseMLP: output off for 50.0 % of the tokens (bf16 32)" in text
    assert "tutel" not in text


def test_plots_are_written(tmp_path: Path):
    curve = [record(experts=4), record(experts=8, hugging_face=False)]
    groups = {"headline": [record(), record("fp32")], "curve": curve}
    plots.plot_layer(groups, tmp_path)
    plots.plot_losses({"a": {"train": [(1, 2.0), (2, 1.0)], "valid": []}}, tmp_path / "loss.svg")
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["layer-experts.svg", "layer-ratios.svg", "loss.svg"]
    assert len(list(tmp_path.glob("*.png"))) == 3
