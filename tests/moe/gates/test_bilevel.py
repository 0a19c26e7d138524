"""SMILE's gate against a loop over tokens, and against Switch where one of its levels has nothing to choose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.cases import cases, make_case, run_layer, run_reference
from reference.compare import assert_all_close, assert_close

from mtmoe.moe import MoEConfig, MoELayer

BF16_UNITS = 6  # as in tests/moe/test_layer.py


def small(**options) -> MoEConfig:
    base = {"d_model": 6, "d_ffn": 10, "num_experts": 6, "normalize_weights": "none", "expert_nodes": 2}
    return MoEConfig(**(base | {"gate": "bilevel"} | options))


@settings(max_examples=100)
@given(case=cases(nodes=True), training=st.booleans())
def test_fp64_agrees_with_loop_over_tokens(case, training):
    assert_all_close(run_layer(case, torch.float64, training), run_reference(case, training), torch.float64)


@settings(max_examples=40)
@given(case=cases(nodes=True, policies=("sampling", "random")), training=st.booleans())
def test_random_policies_agree_with_loop_once_drawn(case, training):
    assert_all_close(run_layer(case, torch.float64, training), run_reference(case, training), torch.float64)


@settings(max_examples=40)
@given(case=cases(nodes=True), training=st.booleans())
def test_fp32_agrees_with_loop_over_tokens(case, training):
    assert_all_close(run_layer(case, torch.float32, training), run_reference(case, training), torch.float32)


@settings(max_examples=40)
@given(case=cases(nodes=True), training=st.booleans(), autocast=st.booleans())
def test_bf16_agrees_with_loop_over_tokens(case, training, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    actual = run_layer(case, dtype, training, autocast)
    assert_all_close(actual, run_reference(case, training), torch.bfloat16, units=BF16_UNITS)
    assert {actual[name].dtype for name in ("node_balance", "inner_balance", "router_z")} == {torch.float32}


@pytest.mark.parametrize(
    ("tokens", "padding", "options"),
    [
        (0, "none", {}),
        (9, "all", {}),
        (9, "all", {"load_balance_include_padding": True}),
        (17, "right", {"capacity_factor": 0.4, "batch_prioritized": True}),
        (17, "none", {"num_experts": 40, "expert_nodes": 20}),  # beside the path for few experts
    ],
)
def test_odd_batches(tokens, padding, options):
    case = make_case(small(**options), tokens, padding, "one_expert", seed=3)
    assert_all_close(
        run_layer(case, torch.float64, training=True), run_reference(case, training=True), torch.float64
    )


@settings(max_examples=40)
@given(case=cases(nodes=True))
def test_statistics_agree_with_counting(case):
    from reference import moe as reference

    found = case.layer.eval()(case.x, case.padding).statistics
    parameters = dict(case.layer.named_parameters())
    expected = reference.moe_layer(parameters, case.x, case.padding.tolist(), case.config, False).statistics
    for name in ("tokens", "tokens_per_expert", "first_choice_per_expert", "dropped"):
        assert torch.equal(getattr(found, name), expected[name]), name
    for name in ("probability_per_expert", "entropy"):
        assert_close(getattr(found, name), expected[name].double(), torch.float32, name)


@settings(max_examples=40)
@given(
    level=st.sampled_from(["node", "inner"]), experts=st.integers(1, 20), tokens=st.integers(1, 30),
    seed=st.integers(0, 10**6), factor=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_with_one_level_it_is_switch(level, experts, tokens, seed, factor):
    """Outputs, gradients, and the balance of the level that chooses; to rounding, as products have one more row."""
    options = {"num_experts": experts, "top_k": 1, "capacity_factor": factor}
    case = make_case(small(expert_nodes=experts if level == "node" else 1, **options), tokens, "random", seed=seed)
    switch = MoELayer(small(gate="topk", expert_nodes=0, **options)).double()
    weights = dict(case.layer.state_dict())
    rows = slice(0, experts) if level == "node" else slice(1, None)
    switch.load_state_dict(weights | {"gate.weight": weights["gate.weight"][rows]})
    outputs = []
    for layer, name in ((case.layer, f"{level}_balance"), (switch, "load_balance")):
        x = case.x.clone().requires_grad_()
        output = layer.train()(x, case.padding)
        total = (output.y * case.direction).sum() + 0.7 * output.losses[name]
        if experts > 1:  # a router without a choice has no z-loss here, though Switch's has
            total = total + 0.3 * output.losses["router_z"]
        total.backward()
        outputs.append((output, output.losses[name], x.grad))
    (mine, my_balance, my_grad), (theirs, their_balance, their_grad) = outputs
    assert_close(mine.y, theirs.y, torch.float64, "y")
    assert_close(my_balance, their_balance, torch.float64, "balance")
    assert torch.equal(mine.statistics.tokens_per_expert, theirs.statistics.tokens_per_expert)
    assert_close(my_grad, their_grad, torch.float64, "d x")
    assert_close(case.layer.gate.weight.grad[rows], switch.gate.weight.grad, torch.float64, "d gate")
    assert_close(case.layer.experts.w_in.grad, switch.experts.w_in.grad, torch.float64, "d w_in")


def test_each_balance_is_one_when_even_and_its_number_of_choices_when_all_agree():
    layer = MoELayer(small(num_experts=8, expert_nodes=4, d_model=8, top_k=1))
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:4, :4] = torch.eye(4) * 30
        layer.gate.weight[4:, 4:6] = torch.eye(2) * 30
    places = torch.cartesian_prod(torch.arange(4), torch.arange(2))
    x = torch.zeros(8, 8)
    x[torch.arange(8), places[:, 0]] = 1.0
    x[torch.arange(8), 4 + places[:, 1]] = 1.0
    even = layer(x)
    assert even.statistics.tokens_per_expert.tolist() == [1] * 8
    assert_close(even.losses["node_balance"] + even.losses["inner_balance"], 2.0, torch.float32)
    same = layer(x[3:4].expand(5, 8)).losses
    assert_close(same["node_balance"], 4.0, torch.float32)
    assert_close(same["inner_balance"], 2.0, torch.float32)


def test_all_experts_of_a_token_are_in_one_node():
    layer = MoELayer(small(num_experts=12, expert_nodes=3, top_k=3))
    decision = layer.gate(torch.randn(200, 6))
    assert ((decision.expert_index // 4).diff(dim=1) == 0).all()
    assert len((decision.expert_index[:, 0] // 4).unique()) == 3
    assert layer.gate.weight.shape == (3 + 4, 6)


def test_survivors_are_refused():
    layer = MoELayer(small()).train()
    with pytest.raises(ValueError, match="the bilevel gate takes no survivors"):
        layer(torch.zeros(3, 6), survivors=torch.tensor([0, 1]))
