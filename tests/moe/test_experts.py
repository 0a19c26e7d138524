import math

import pytest
import torch
from reference.cases import make_case
from reference.compare import assert_close

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.experts import ExpertBank


def small(**options) -> MoEConfig:
    return MoEConfig(**({"d_model": 6, "d_ffn": 10, "num_experts": 4} | options))


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_initial_standard_deviation(scale):  # 3.1: the variance is scaled
    torch.manual_seed(0)
    bank = ExpertBank(MoEConfig(d_model=64, d_ffn=256, num_experts=4, init_scale=scale))
    for weight in (bank.w_in, bank.w_out):
        bound = math.sqrt(scale / weight.shape[2])  # as torch.nn.Linear: uniform within 1 / sqrt(fan_in)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert abs(weight.mean().item()) < 4 * bound / math.sqrt(3 * weight.numel())


def test_experts_start_differently_and_by_the_seed():
    torch.manual_seed(3)
    first = ExpertBank(small())
    torch.manual_seed(3)
    second = ExpertBank(small())
    assert torch.equal(first.w_in, second.w_in)
    assert len(first.w_in.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("top", "expected"), [({"top_k": 1, "normalize_weights": "none"}, 0.3), ({}, 0.3**2)], ids=["top-1", "top-2"]
)
def test_dropout_is_on_each_experts_output(top, expected):
    """An element is 0 only if all experts of the token drop it: dropout after combine would give 0.3."""
    layer = MoELayer(small(dropout=0.3, **top)).train()
    torch.manual_seed(0)
    tokens = 5000
    share = (layer(torch.randn(tokens, 6)).y == 0).double().mean().item()
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / (6 * tokens))


@pytest.mark.parametrize(
    "rates", [{"dropout": 0.3}, {"activation_dropout": 0.3}, {"dropout": 0.2, "activation_dropout": 0.2}]
)
def test_dropout_keeps_the_expectation(rates):
    case = make_case(small(**rates), 1)
    torch.manual_seed(0)
    with torch.no_grad():
        sample = case.layer.train()(case.x.expand(20_000, -1)).y
        expected = case.layer.eval()(case.x).y[0]
    bound = 4 * sample.std(dim=0) / math.sqrt(len(sample))
    assert ((sample.mean(dim=0) - expected).abs() <= bound).all()


def test_activation_dropout_is_between_the_matrices():
    case = make_case(small(activation_dropout=1.0), 5)
    decision = case.layer.gate(case.x)
    weight = decision.weight / decision.weight.sum(dim=-1, keepdim=True)
    expected = (weight[..., None] * case.layer.experts.b_out[decision.expert_index]).sum(dim=1)
    assert_close(case.layer.train()(case.x).y, expected, torch.float64)
