"""The arithmetic of benchmarks/roofline.py, against figures worked out by hand and counts of a layer that runs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

PATH = Path(__file__).parents[2] / "benchmarks" / "roofline.py"
spec = importlib.util.spec_from_file_location("roofline", PATH)
roofline = importlib.util.module_from_spec(spec)
sys.modules["roofline"] = roofline  # dataclasses look their module up
spec.loader.exec_module(roofline)


def steps(tokens, layer=roofline.NLLB):
    return {step.name: step for step in roofline.forward_steps(layer, tokens) + roofline.backward_steps(layer, tokens)}


def test_products_of_nllb_by_hand():
    first = steps(512)["GEMM 1"]
    assert first.flops == 2 * 1024 * 2048 * 8192  # 34.4 GFLOP
    # 128 experts x 2048 x 8192 in bf16 are 4.29 GB; 1024 rows in and out are 21 MB.
    assert first.bytes == 4_294_967_296 + 1024 * (2048 + 8192) * 2
    a100, h100 = roofline.DEVICES
    assert first.binds(a100) == first.binds(h100) == "memory"
    assert first.seconds(a100) == pytest.approx(4.316e9 / 2.04e12, rel=1e-3)
    last = steps(131072)["GEMM 1"]  # 2048 rows an expert: above the ridge
    assert last.binds(a100) == last.binds(h100) == "compute"
    assert last.seconds(h100) == last.flops / 989e12


def test_weights_of_experts_without_tokens_are_not_read():
    assert steps(1)["GEMM 1"].bytes == 2 * (2 * 2048 * 8192 + 2 * (2048 + 8192))


def test_flops_of_products_are_those_that_torch_counts():
    layer, tokens = roofline.Layer(d_model=6, d_ffn=10, num_experts=1, top_k=1), 7
    x, gate = torch.randn(tokens, 6, requires_grad=True), torch.randn(6, 1, requires_grad=True)
    w_in, w_out = torch.randn(6, 10, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ((x @ w_in).relu() @ w_out + x @ gate).sum().backward()
    products = [step.flops for name, step in steps(tokens, layer).items() if "GEMM" in name or "gate" in name]
    assert counter.get_total_flops() == sum(products)


def test_table_has_a_row_for_each_step_and_sums_them():
    text = roofline.table(roofline.NLLB, 4096, roofline.DEVICES).splitlines()
    assert len(text) == 2 + 5 + 1 + 7 + 1 + 1
    assert len({line.count("|") for line in text}) == 1
    total = sum(step.flops for step in steps(4096).values()) / 1e9
    assert f"| **both** | **{total:.2f}** |" in text[-1]
