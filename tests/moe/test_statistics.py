import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import moe as reference
from reference.cases import cases
from reference.compare import assert_close

from mtmoe.moe import MoEConfig, MoELayer

NAMES = (
    "tokens",
    "tokens_per_expert",
    "first_choice_per_expert",
    "probability_per_expert",
    "dropped",
    "dropped_share",
    "load",
    "entropy",
)


@settings(max_examples=80)
@given(case=cases(), training=st.booleans())
def test_agree_with_counting(case, training):
    actual = case.layer.train(training)(case.x, case.padding).statistics
    parameters = dict(case.layer.named_parameters())
    expected = reference.moe_layer(parameters, case.x, case.padding.tolist(), case.config, training).statistics
    for name in NAMES:
        assert_close(getattr(actual, name), expected[name], torch.float32, name)
        assert not getattr(actual, name).requires_grad


def test_load_is_one_when_even_and_num_experts_when_collapsed():
    layer = MoELayer(MoEConfig(d_model=4, d_ffn=4, num_experts=4, top_k=1, normalize_weights="none"))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(4) * 3)
    even = layer(torch.eye(4).repeat(5, 1)).statistics
    assert even.load.tolist() == [1, 1, 1, 1]
    collapsed = layer(torch.eye(4)[2].expand(7, 4)).statistics
    assert collapsed.load.tolist() == [0, 0, 4, 0]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.3863), (1000.0, 0.0)])
def test_entropy_is_in_nats(scale, expected):
    layer = MoELayer(MoEConfig(d_model=4, d_ffn=4, num_experts=4))
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(4) * scale)
    assert layer(torch.eye(4)).statistics.entropy.item() == pytest.approx(expected, abs=1e-4)


def test_of_nothing_are_zero():
    layer = MoELayer(MoEConfig(d_model=4, d_ffn=4, cmr=True))
    for x, mask in ((torch.zeros(0, 4), None), (torch.randn(3, 4), torch.ones(3, dtype=torch.bool))):
        statistics = layer(x, mask).statistics
        for name in NAMES:
            assert (getattr(statistics, name) == 0).all(), name
        assert statistics.cmr_gate_sum == 0
        assert statistics.cmr_gate_count == 0
