import math

import pytest
import torch
from reference.cases import make_case
from reference.compare import assert_close, gradients

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.losses import cmr_budget_loss


def small(**options) -> MoEConfig:
    return MoEConfig(**({"d_model": 6, "d_ffn": 10, "num_experts": 4, "cmr": True} | options))


def with_gate_bias(case, bias: float):
    with torch.no_grad():
        case.layer.conditional.gate.bias.fill_(bias)
    return case.layer


def plain_layer(case) -> MoELayer:
    layer = MoELayer(small(cmr=False)).double()
    layer.load_state_dict({name: value for name, value in case.layer.state_dict().items() if "conditional" not in name})
    return layer


def test_a_closed_gate_is_the_dense_network_and_the_experts_learn_nothing():
    case = make_case(small(), 9)
    layer = with_gate_bias(case, -1e4)
    y = layer(case.x).y
    assert torch.equal(y, layer.conditional.shared(case.x))
    found = gradients((y * case.direction).sum(), dict(layer.named_parameters()))
    for name, grad in found.items():
        assert (grad == 0).all() == ("shared" not in name), name


def test_an_open_gate_is_the_plain_layer():
    case = make_case(small(), 9)
    layer = with_gate_bias(case, 1e4)
    y = layer(case.x).y
    assert_close(y, plain_layer(case)(case.x).y, torch.float64)
    found = gradients((y * case.direction).sum(), dict(layer.named_parameters()))
    assert all((grad == 0).all() for name, grad in found.items() if "conditional" in name)
    assert (found["experts.w_in"] != 0).any()


def test_the_gate_mixes_token_by_token():
    case = make_case(small(), 9)
    gate = torch.sigmoid(case.layer.conditional.gate(case.x))
    shared, experts = case.layer.conditional.shared(case.x), plain_layer(case)(case.x).y
    assert_close(case.layer(case.x).y, (1 - gate) * shared + gate * experts, torch.float64)


def test_sum_and_count_are_over_real_tokens_and_train_the_gate():
    case = make_case(small(), 20, padding="random")
    x = case.x.clone().requires_grad_()
    statistics = case.layer(x, case.padding).statistics
    gate = torch.sigmoid(case.layer.conditional.gate(case.x))[~case.padding]
    assert statistics.cmr_gate_count == len(gate)
    assert_close(statistics.cmr_gate_sum, gate.sum(), torch.float64)
    loss = cmr_budget_loss([statistics.cmr_gate_sum], [statistics.cmr_gate_count], 0.01)
    found = gradients(loss, {"x": x, **dict(case.layer.named_parameters())})
    assert (found["x"][case.padding] == 0).all()
    assert (found["x"][~case.padding] != 0).any(dim=-1).all()
    assert {name for name, grad in found.items() if (grad != 0).any()} == {
        "x",
        "conditional.gate.weight",
        "conditional.gate.bias",
    }


def test_padding_changes_neither_sum_nor_output():
    case = make_case(small(), 20, padding="random")
    moved = torch.where(case.padding[:, None], case.x + 5, case.x)
    first, second = case.layer(case.x, case.padding), case.layer(moved, case.padding)
    assert torch.equal(first.statistics.cmr_gate_sum, second.statistics.cmr_gate_sum)
    assert torch.equal(first.y, second.y)
    assert (first.y[case.padding] == 0).all()


def test_without_cmr_there_is_no_gate_sum():
    statistics = MoELayer(small(cmr=False))(torch.randn(3, 6)).statistics
    assert statistics.cmr_gate_sum is None
    assert statistics.cmr_gate_count is None


def test_sum_is_fp32_under_autocast():
    layer = MoELayer(small(d_model=6))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(300, 6)).statistics.cmr_gate_sum.dtype == torch.float32


# Gate dropout

TOKENS = 10_000


def test_mask_mode_shows_dropped_tokens_the_shared_network_only():
    case = make_case(small(cmr_gate_drop=0.25, cmr_gate_drop_mode="mask"), TOKENS)
    torch.manual_seed(0)
    y = case.layer.train()(case.x).y
    dropped = (y == case.layer.conditional.shared(case.x)).all(dim=-1)
    assert abs(dropped.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / TOKENS)
    plain = case.layer.eval()(case.x).y
    assert_close(y[~dropped], plain[~dropped], torch.float64)  # the others are as in evaluation: no scale


def test_inverted_mode_keeps_the_expectation_and_may_pass_one():
    case = make_case(small(cmr_gate_drop=0.2), TOKENS)
    torch.manual_seed(0)
    with torch.no_grad():
        gates = case.layer.train().conditional.gates(case.x, None)
        plain = case.layer.eval().conditional.gates(case.x, None)
    dropped = gates.value == 0
    assert_close(gates.value[~dropped], plain.value[~dropped] / 0.8, torch.float64)
    assert gates.value.max() > 1
    assert torch.equal(gates.total, gates.value.sum())  # the budget sees what is used, as in NLLB's release
    sigma = plain.value.square().sum().mul(0.25).sqrt()
    assert abs(gates.total - plain.total) < 4 * sigma


@pytest.mark.parametrize("mode", ["inverted", "mask"])
def test_gate_dropout_is_for_training(mode):
    case = make_case(small(cmr_gate_drop=0.5, cmr_gate_drop_mode=mode), 9)
    y = case.layer.eval()(case.x).y
    gate = torch.sigmoid(case.layer.conditional.gate(case.x))
    expected = (1 - gate) * case.layer.conditional.shared(case.x) + gate * plain_layer(case)(case.x).y
    assert_close(y, expected, torch.float64)


def test_a_dropped_gate_gets_no_gradient():
    case = make_case(small(cmr_gate_drop=0.5), 60)
    torch.manual_seed(0)
    gates = case.layer.train().conditional.gates(case.x.requires_grad_(), None)
    grad = torch.autograd.grad(gates.total, case.x)[0]
    assert torch.equal((grad == 0).all(dim=-1), (gates.value == 0)[:, 0])


def test_shared_network_may_have_a_width_of_its_own():
    layer = MoELayer(small(cmr_d_ffn=3))
    assert layer.conditional.shared.fc1.weight.shape == (3, 6)
    assert MoELayer(small()).conditional.shared.fc1.weight.shape == (10, 6)


def test_dropout_reaches_the_shared_network():
    case = make_case(small(dropout=0.5), TOKENS)
    with_gate_bias(case, -1e4)
    torch.manual_seed(0)
    with torch.no_grad():
        share = (case.layer.train()(case.x).y == 0).double().mean()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / (TOKENS * 6))
