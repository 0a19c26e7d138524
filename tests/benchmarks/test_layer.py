"""A wrong peer is not timed, a missing one stops nothing, and what is done is not done again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference import moe as slow

from benchmarks import layer, peers
from benchmarks.cases import DTYPES, HEADLINE, Case, full_grid
from benchmarks.compare import check, compare, expected_results
from benchmarks.peers import Built, Unavailable, Weights, experts_loop, make_weights
from benchmarks.store import Store
from mtmoe.moe import MoEConfig

SMALL = Case(num_experts=4, tokens=64, d_model=64, d_ffn=256)


def prepared(case: Case, build):
    weights, x = make_weights(case)
    return layer.prepare("peer", lambda: build(case, weights), case, x, expected_results(case, weights, x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loop_over_experts_agrees_with_the_slow_layer(top_k):
    case = replace(SMALL, top_k=top_k, tokens=12, d_model=16, d_ffn=24)
    weights, x = make_weights(case)
    wide = Weights(*(getattr(weights, name).double() for name in Weights.__dataclass_fields__))
    config = MoEConfig(
        d_model=16, d_ffn=24, num_experts=4, top_k=top_k, normalize_weights="after_drop" if top_k > 1 else "none"
    )
    parameters = {"gate.weight": wide.gate, "experts.w_in": wide.w_in, "experts.b_in": wide.b_in,
                  "experts.w_out": wide.w_out, "experts.b_out": wide.b_out}  # fmt: skip
    expected = slow.moe_layer(parameters, x.double(), [False] * 12, config, training=False).y
    torch.testing.assert_close(experts_loop(x.double(), wide, top_k), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["ours", "dense", "grouped_mm"])
def test_right_peers_are_accepted(name, dtype, top_k):
    found, built = prepared(replace(SMALL, dtype=dtype, top_k=top_k), peers.PEERS[name])
    assert found["status"] == "ok", found
    assert built is not None


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_dropless", "hugging_face"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_installed_peers_are_right(name, dtype):
    pytest.importorskip("deepspeed" if "deepspeed" in name else "transformers")
    found, _ = prepared(replace(SMALL, dtype=dtype), peers.PEERS[name])
    assert found["status"] == "ok", found


def exchanged(weights: Weights) -> Weights:
    """The last two experts in each other's place: for most tokens another network."""
    order = torch.tensor([0, 1, 3, 2])
    return Weights(weights.gate, *(getattr(weights, name)[order] for name in ("w_in", "b_in", "w_out", "b_out")))


def second_expert_missing(case: Case, weights: Weights) -> Built:
    return peers.ours(replace(case, top_k=1), weights)


def no_gradient_for_the_gate(case: Case, weights: Weights) -> Built:
    right = peers.ours(case, weights)

    def call(x):
        scaled = 0.5 * x + 0.5 * x.detach()  # the output is right, the gradient half of it
        return right.call(scaled)

    return Built(call, right.parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda case, weights: peers.ours(case, exchanged(weights)), "output"),
        (second_expert_missing, "output"),
        (no_gradient_for_the_gate, "gradient"),
        (lambda case, weights: Built(lambda x: x * float("nan"), ()), "output"),
    ],
)
def test_a_wrong_peer_is_refused(build, what, dtype):
    found, built = prepared(replace(SMALL, dtype=dtype), build)
    assert built is None
    assert found["status"] == "wrong"
    assert what in found["reason"]


def test_a_missing_or_broken_peer_says_why():
    def missing(case, weights):
        raise Unavailable("not installed (no module)")

    def broken(case, weights):
        raise RuntimeError("boom")

    assert prepared(SMALL, missing) == ({"status": "unavailable", "reason": "not installed (no module)"}, None)
    assert prepared(SMALL, broken) == ({"status": "unavailable", "reason": "RuntimeError: boom"}, None)


def test_a_few_rows_of_equal_logits_do_not_condemn():
    expected = torch.randn(1000, 8)
    actual = expected.clone()
    actual[:15] = 0
    assert compare(actual, expected, torch.bfloat16).ok
    assert not compare(actual, expected, torch.float32).ok
    actual[:30] = 0
    assert not compare(actual, expected, torch.bfloat16).ok
    assert not compare(actual[:, :4], expected, torch.bfloat16).ok


def test_checking_leaves_no_gradients():
    weights, x = make_weights(SMALL)
    built = peers.ours(SMALL, weights)
    check(built, SMALL, x, expected_results(SMALL, weights, x))
    assert all(parameter.grad is None for parameter in built.parameters)
    assert x.grad is None


def test_peers_share_the_memory_of_the_weights():
    weights, _ = make_weights(SMALL)
    assert peers.ours(SMALL, weights).parameters[1].data_ptr() == weights.w_in.data_ptr()
    assert peers.dense(SMALL, weights).parameters[0].data_ptr() == weights.w_in.data_ptr()


def test_flops_and_bytes():
    case = Case(num_experts=8, tokens=10, d_model=4, d_ffn=16, top_k=2, dtype="bf16")
    assert case.flops("forward") == 10 * 2 * (2 * 4 * 16) * 2
    assert case.flops("forward_backward") == 3 * case.flops("forward")
    matrices = 5 * 2 * 4 * 16 * 2
    assert case.bytes_moved("forward", touched=5) == matrices + 2 * 10 * 4 * 2
    assert case.bytes_moved("forward_backward", touched=5) == 3 * matrices + 5 * 10 * 4 * 2 + 2 * 10 * 2 * 16 * 2


def test_the_grid_has_what_was_asked_for():
    grid = list(full_grid())
    assert len(grid) == len(set(grid)) == 3**3 * 3 * 2
    assert set(HEADLINE) <= set(grid)


def test_a_second_run_measures_nothing_again(tmp_path, monkeypatch):
    args = layer.parse(["--grid", "smoke", "--rounds", "2", "--warmup", "1", "--passes", "forward_backward"])
    cases = [replace(SMALL, dtype=dtype) for dtype in ("fp32", "bf16")]
    names = ("ours", "dense", "tutel")
    records = layer.run_cases("smoke", cases, names, Store(tmp_path / "layer.jsonl"), args)
    assert [record["peers"]["tutel"]["status"] for record in records] == ["unavailable"] * 2
    assert all(record["peers"]["ours"]["forward_backward"]["rounds"] == 2 for record in records)

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(layer, "measure", fail)
    assert layer.run_cases("smoke", cases, names, Store(tmp_path / "layer.jsonl"), args) == records
    args.rounds = 3
    with pytest.raises(AssertionError, match="measured again"):
        layer.run_cases("smoke", cases, names, Store(tmp_path / "layer.jsonl"), args)


def test_what_does_not_fit_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer, "available_bytes", lambda case: 1 << 20)
    args = layer.parse(["--grid", "headline"])
    assert layer.run_cases("headline", HEADLINE[:1], ("ours",), Store(tmp_path / "a.jsonl"), args) == []
    assert "skipped: needs about" in capsys.readouterr().out
