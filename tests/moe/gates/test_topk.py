"""The top-k gate: which experts, with which weights, and how it draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from reference.cases import cases
from reference.compare import assert_close

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.capacity import limit
from mtmoe.moe.gates import TopKGate


def gate_of(**options) -> TopKGate:
    torch.manual_seed(11)
    return TopKGate(MoEConfig(**({"d_model": 6, "d_ffn": 4, "num_experts": 5} | options)))


def fixed_logits(gate: TopKGate, logits: list[float], tokens: int) -> torch.Tensor:
    """Make the gate give these logits to each of the equal tokens that are returned."""
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = torch.tensor(logits)
    x = torch.zeros(tokens, gate.config.d_model)
    x[:, 0] = 1
    return x


@settings(max_examples=40)
@given(case=cases(policies=("all", "sampling", "random", "threshold")))
def test_any_decision_is_well_formed(case):
    real = ~case.padding
    config = case.config
    decision = case.layer.gate.train()(case.x, real)
    routed = decision.expert_index >= 0
    assert decision.expert_index.shape == decision.weight.shape == (len(case.x), config.top_k)
    assert (decision.expert_index < config.num_experts).all()
    assert not routed[~real].any()
    assert routed[real][:, 0].all()
    assert torch.equal(decision.expert_index[real][:, 0], decision.gate_probs[real].argmax(dim=-1))
    for row in decision.expert_index.tolist():
        known = [number for number in row if number >= 0]
        assert len(set(known)) == len(known)
    assert (decision.weight[~routed] == 0).all()
    assert (decision.weight[routed] > 0).all()
    assert_close(decision.gate_probs.sum(dim=-1), torch.ones(len(case.x)), torch.float64)


@pytest.mark.parametrize("normalize", ["before_drop", "after_drop"])
def test_weight_of_the_best_of_two_is_a_sigmoid(normalize):  # T1
    layer = MoELayer(MoEConfig(d_model=6, d_ffn=4, num_experts=5, normalize_weights=normalize)).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    best = (x @ layer.gate.weight.T).topk(2).values
    decision = limit(layer.gate(x), layer.config, training=True)
    assert_close(decision.weight[:, 0], torch.sigmoid(best[:, 0] - best[:, 1]), torch.float64)


def test_weights_are_raw_probabilities_without_normalisation():
    gate = gate_of(normalize_weights="none", top_k=3)
    decision = gate(torch.randn(20, 6))
    assert torch.equal(decision.weight, decision.gate_probs.topk(3).values)


@pytest.mark.parametrize("second_share", [0.05, 0.3, 0.45, 0.5])
def test_random_policy_keeps_the_second_with_twice_its_weight(second_share):  # T5
    gate = gate_of(second_expert_policy="random", num_experts=3).train()
    draws = 10_000
    # The third expert has a tenth of all: the share is of the two chosen, not the probability.
    logits = [math.log(0.9 * (1 - second_share)), math.log(0.9 * second_share) - 1e-4, math.log(0.1 * second_share)]
    x = fixed_logits(gate, logits, draws)
    torch.manual_seed(0)
    kept = (gate(x).expert_index[:, 1] >= 0).double().mean().item()
    rate = min(1.0, 2 * second_share)
    assert abs(kept - rate) <= 3 * math.sqrt(rate * (1 - rate) / draws) + 1e-4


def test_sampling_policy_draws_in_proportion_to_the_rest():  # T6
    gate = gate_of(second_expert_policy="sampling").train()
    draws = 20_000
    logits = torch.tensor([0.3, 2.0, -0.5, 1.0, 0.0])
    x = fixed_logits(gate, logits.tolist(), draws)
    torch.manual_seed(0)
    expert_index = gate(x).expert_index
    assert (expert_index[:, 0] == 1).all()
    probs = logits.softmax(dim=-1)
    expected = probs / (1 - probs[1]) * draws
    expected[1] = 0
    found = torch.bincount(expert_index[:, 1], minlength=5).float()
    assert found[1] == 0
    chi_squared = ((found - expected)[expected > 0].square() / expected[expected > 0]).sum()
    assert chi_squared < 16.3  # 3 degrees of freedom, p = 0.001


def test_sampling_policy_with_three_choices_takes_distinct_experts():
    gate = gate_of(second_expert_policy="sampling", top_k=3).train()
    expert_index = gate(torch.randn(500, 6)).expert_index
    assert all(len(set(row)) == 3 for row in expert_index.tolist())


@pytest.mark.parametrize("training", [False, True])
def test_threshold_policy_looks_at_the_normalised_weight(training):
    gate = gate_of(second_expert_policy="threshold", second_expert_threshold=0.3).train(training)
    x = torch.randn(200, 6) * 3
    decision = gate(x)
    best = decision.gate_probs.topk(2).values
    assert torch.equal(decision.expert_index[:, 1] >= 0, best[:, 1] / best.sum(dim=-1) > 0.3)
    assert 0 < (decision.expert_index[:, 1] >= 0).float().mean() < 1


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_random_policies_take_the_best_two_in_evaluation(policy):  # 1.2, pitfall: the release draws in eval mode too
    x = torch.randn(300, 6)
    expected = gate_of().eval()(x)
    actual = gate_of(second_expert_policy=policy).eval()(x)
    assert torch.equal(actual.expert_index, expected.expert_index)
    assert torch.equal(actual.weight, expected.weight)
    drawn = gate_of(second_expert_policy=policy).train()(x)
    assert not torch.equal(drawn.expert_index, expected.expert_index)


def test_jitter_scales_the_input_within_its_bounds():  # 1.5
    gate = gate_of(jitter=0.1, num_experts=2).train()
    x = fixed_logits(gate, [2.0, 0.0], 5000)
    with torch.no_grad():
        logits = gate.logits(x)[:, 0]
    assert logits.min() >= 1.8
    assert logits.max() <= 2.2
    sigma = 0.4 / math.sqrt(12 * 5000)
    assert abs(logits.mean() - 2.0) < 4 * sigma
    assert abs(logits.std() - 0.4 / math.sqrt(12)) < 0.01
    assert torch.equal(gate.eval().logits(x)[:, 0], torch.full((5000,), 2.0))


def test_jitter_leaves_the_input_of_the_experts_alone():
    config = MoEConfig(d_model=6, d_ffn=4, num_experts=1, top_k=1, normalize_weights="none", jitter=0.5)
    layer = MoELayer(config)
    x = torch.randn(9, 6)
    assert torch.equal(layer.train()(x).y, layer.eval()(x).y)  # one expert: its weight is 1 whatever the logits are


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_fp32_from_bf16_input(autocast):  # 1.5
    gate = gate_of(num_experts=64, d_model=32, top_k=1, normalize_weights="none")
    x = torch.randn(100, 32)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            logits = gate.logits(x)
        expected = x.double() @ gate.weight.double().T
    else:
        x = x.bfloat16()
        logits = gate.bfloat16().logits(x)
        expected = x.double() @ gate.weight.double().T
    assert logits.dtype == torch.float32
    assert_close(logits, expected, torch.float32)


def test_fp64_stays_fp64():
    decision = gate_of().double()(torch.randn(3, 6, dtype=torch.float64))
    assert decision.weight.dtype == decision.gate_probs.dtype == torch.float64


def test_losses_leave_padding_out():
    gate = gate_of()
    x = torch.randn(20, 6)
    real = torch.arange(20) % 3 > 0
    with_padding, without = gate(x, real), gate(x[real])
    for name in ("load_balance", "router_z"):
        assert_close(with_padding.losses[name], without.losses[name], torch.float32, name)


def test_losses_of_nothing_are_zero_with_a_gradient():
    gate = gate_of()
    for x, real in ((torch.zeros(0, 6), None), (torch.randn(4, 6), torch.zeros(4, dtype=torch.bool))):
        losses = gate(x, real).losses
        total = losses["load_balance"] + losses["router_z"]
        total.backward()
        assert total == 0
        assert (gate.weight.grad == 0).all()


def test_initial_weights_are_small_and_differ():
    weight = gate_of(num_experts=50, d_model=64).weight
    assert weight.abs().max() <= 1 / 8
    assert len(weight.unique(dim=0)) == 50


def test_a_bias_is_added_to_the_logits():
    gate, plain = gate_of(gate_bias=True), gate_of()
    assert dict(gate.named_parameters()).keys() == {"weight", "bias"}
    gate.load_state_dict({"weight": plain.weight, "bias": torch.tensor([0.0, 3.0, -1.0, 0.5, 0.0])})
    x = torch.randn(7, 6)
    assert_close(gate.logits(x), plain.logits(x) + gate.bias, torch.float32)
    survivors = torch.tensor([1, 3])
    assert_close(gate.logits(x, survivors), gate.logits(x)[:, survivors], torch.float32)
