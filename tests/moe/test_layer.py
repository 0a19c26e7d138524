"""The whole layer against the slow one, and what must hold for any gate and layer."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.cases import cases, make_case, run_layer, run_reference
from reference.compare import assert_all_close, assert_close, gradients
from torch.autograd import gradcheck
from torch.nn import functional as F

from mtmoe.moe import MoEConfig, MoELayer

BF16_UNITS = 6  # a bf16 chain of two products, an activation and two sums; measured: at most 3


def small(**options) -> MoEConfig:
    return MoEConfig(**({"d_model": 6, "d_ffn": 10, "num_experts": 4, "top_k": 2} | options))


# Against the slow layer: outputs, losses, gradients


@settings(max_examples=150)
@given(case=cases(), training=st.booleans())
def test_fp64_agrees_with_loop_over_tokens(case, training):
    assert_all_close(run_layer(case, torch.float64, training), run_reference(case, training), torch.float64)


@settings(max_examples=40)
@given(case=cases(max_tokens=11), training=st.booleans())
def test_fp64_agrees_with_gshard_einsum(case, training):
    assert_all_close(run_layer(case, torch.float64, training), run_reference(case, training, "einsum"), torch.float64)


@settings(max_examples=80)
@given(case=cases(policies=("sampling", "random")), training=st.booleans())
def test_random_policies_agree_with_loop_once_drawn(case, training):
    assert_all_close(run_layer(case, torch.float64, training), run_reference(case, training), torch.float64)


@settings(max_examples=60)
@given(case=cases(), training=st.booleans())
def test_fp32_agrees_with_loop_over_tokens(case, training):
    assert_all_close(run_layer(case, torch.float32, training), run_reference(case, training), torch.float32)


@settings(max_examples=60)
@given(case=cases(), training=st.booleans(), autocast=st.booleans())
def test_bf16_agrees_with_loop_over_tokens(case, training, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    actual = run_layer(case, dtype, training, autocast)
    assert_all_close(actual, run_reference(case, training), torch.bfloat16, units=BF16_UNITS)
    for name in ("load_balance", "router_z"):
        assert actual[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("tokens", "padding", "crowd", "options"),
    [
        (17, "none", "one_expert", {"capacity_factor": 0.5}),  # overflow
        (17, "random", "two_groups", {"capacity_factor": 0.25, "batch_prioritized": True}),
        (3, "none", "spread", {"num_experts": 7, "top_k": 1, "normalize_weights": "none"}),  # experts without tokens
        (1, "none", "spread", {"capacity_factor": 1.0}),
        (0, "none", "spread", {"capacity_factor": 1.0}),
        (0, "none", "spread", {}),
        (9, "all", "spread", {"capacity_factor": 1.0}),
        (9, "all", "spread", {"load_balance_include_padding": True}),
        (19, "right", "one_expert", {"top_k": 3, "capacity_factor": 0.4, "normalize_weights": "before_drop"}),
    ],
)
@pytest.mark.parametrize("cmr", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_odd_batches(tokens, padding, crowd, options, cmr, dtype):
    case = make_case(small(cmr=cmr, **options), tokens, padding, crowd, seed=3)
    expected = run_reference(case, training=True)
    assert_all_close(
        run_layer(case, dtype, training=True), expected, dtype, BF16_UNITS if dtype == torch.bfloat16 else None
    )


def test_overflow_really_happens_in_the_odd_batches():
    case = make_case(small(capacity_factor=0.5), 17, crowd="one_expert", seed=3)
    assert case.layer.train()(case.x).statistics.dropped > 10
    assert case.layer.eval()(case.x).statistics.dropped == 0


# Universal tests


def test_one_expert_is_the_dense_network():  # U1
    layer = make_case(small(num_experts=1, top_k=1, normalize_weights="none"), 13).layer
    x = torch.randn(13, 6, dtype=torch.float64)
    experts = layer.experts
    dense = F.linear(F.relu(F.linear(x, experts.w_in[0], experts.b_in[0])), experts.w_out[0], experts.b_out[0])
    assert torch.equal(layer(x).y, dense)


@settings(max_examples=20)
@given(top_k=st.integers(1, 3), seed=st.integers(0, 10**6), cmr=st.booleans())
def test_equal_experts_are_the_dense_network(top_k, seed, cmr):  # U2
    if top_k == 1:
        config = small(num_experts=1, top_k=1, normalize_weights="none", cmr=cmr)
    else:
        config = small(num_experts=5, top_k=top_k, cmr=cmr)
    case = make_case(config, 11, seed=seed)
    experts = case.layer.experts
    with torch.no_grad():
        for weight in experts.parameters():
            weight[:] = weight[:1].clone()
        if cmr:  # the shared network too, so that any mixture of the two is the same
            shared = case.layer.conditional.shared
            shared.fc1.weight[:], shared.fc1.bias[:] = experts.w_in[0], experts.b_in[0]
            shared.fc2.weight[:], shared.fc2.bias[:] = experts.w_out[0], experts.b_out[0]
    dense = F.linear(F.relu(F.linear(case.x, experts.w_in[0], experts.b_in[0])), experts.w_out[0], experts.b_out[0])
    assert_close(case.layer(case.x).y, dense, torch.float64)


@settings(max_examples=20)
@given(case=cases(cmr=None, max_tokens=13))
def test_permuted_tokens_permute_the_output(case):  # U3
    layer = unlimited(case)
    order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(case.seed))
    expected = layer(case.x, case.padding).y[order]
    assert_close(layer(case.x[order], case.padding[order]).y, expected, torch.float64)


@settings(max_examples=20)
@given(case=cases(max_tokens=13))
def test_renumbered_experts_leave_the_output(case):  # U4
    expected = case.layer.eval()(case.x, case.padding)
    order = torch.randperm(case.config.num_experts, generator=torch.Generator().manual_seed(case.seed))
    with torch.no_grad():
        for parameter in (case.layer.gate.weight, *case.layer.experts.parameters()):
            parameter.copy_(parameter[order].clone())
    actual = case.layer(case.x, case.padding)
    assert_close(actual.y, expected.y, torch.float64)
    assert torch.equal(actual.statistics.tokens_per_expert, expected.statistics.tokens_per_expert[order])


@settings(max_examples=30)
@given(case=cases(max_tokens=13))
def test_padding_is_inert(case):  # U5
    layer = unlimited(case).train()
    real = ~case.padding
    with_padding = output_and_gradients(layer, case.x, case.padding, case.direction)
    without = output_and_gradients(layer, case.x[real], None, case.direction[real])
    assert torch.equal(with_padding["y"][case.padding], torch.zeros_like(case.x[case.padding]))
    assert torch.equal(with_padding["d x"][case.padding], torch.zeros_like(case.x[case.padding]))
    for name in ("y", "d x"):
        assert_close(with_padding[name][real], without[name], torch.float64, name)
    for name, value in without.items():
        if name not in ("y", "d x"):
            assert_close(with_padding[name], value, torch.float64, name)


def test_padding_takes_no_slot():  # U5
    config = small(capacity_factor=0.5, num_experts=2, top_k=1, normalize_weights="none")
    layer = MoELayer(config)
    x = torch.randn(1, 6).expand(8, 6)  # all choose the same expert, which has two slots
    first_six = torch.arange(8) < 6
    output = layer.train()(x, first_six)
    assert output.statistics.dropped == 0
    assert (output.y[6:] != 0).any(dim=-1).all()
    assert layer(x).statistics.dropped == 6


@settings(max_examples=15)
@given(case=cases(policies=("all", "sampling", "random", "threshold"), max_tokens=13))
def test_eval_is_deterministic(case):  # U6
    case.layer.eval()
    first, second = case.layer(case.x, case.padding), case.layer(case.x, case.padding)
    assert torch.equal(first.y, second.y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1, "normalize_weights": "none"},
        {"top_k": 3, "normalize_weights": "before_drop"},
        {"normalize_weights": "none", "cmr": True},
        {"capacity_factor": 0.5, "cmr": True},
    ],
)
def test_gradcheck(options):  # U7
    case = make_case(small(d_model=3, d_ffn=4, activation="gelu", **options), 5, padding="random", seed=5)
    names = [name for name, _ in case.layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in case.layer.parameters()]

    def forward(x, *weights):
        output = torch.func.functional_call(case.layer, dict(zip(names, weights, strict=True)), (x, case.padding))
        extra = output.statistics.cmr_gate_sum
        return output.y, *output.losses.values(), *(() if extra is None else (extra,))

    assert gradcheck(forward, (case.x.clone().requires_grad_(), *values))


def unlimited(case) -> MoELayer:
    """The case's layer with room for everybody, in evaluation."""
    config = replace(case.config, capacity_factor=0.0, eval_capacity_factor=0.0, eval_capacity_token_fraction=0.0)
    config = replace(config, load_balance_include_padding=False)
    layer = MoELayer(config).double().eval()
    layer.load_state_dict(case.layer.state_dict())
    return layer


def output_and_gradients(layer, x, padding, direction):
    x = x.clone().requires_grad_()
    output = layer(x, padding)
    total = (output.y * direction).sum() + output.losses["load_balance"] + output.losses["router_z"]
    if output.statistics.cmr_gate_sum is not None:
        total = total + output.statistics.cmr_gate_sum
    inputs = {"x": x, **dict(layer.named_parameters())}
    return {"y": output.y, **output.losses, **{f"d {name}": g for name, g in gradients(total, inputs).items()}}


# Shapes, types, errors


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 2), (0,), (2, 0)])
def test_any_leading_shape(shape):
    layer = MoELayer(small(cmr=True))
    x = torch.randn(*shape, 6)
    mask = torch.rand(shape) < 0.3
    output = layer(x, mask)
    assert output.y.shape == x.shape
    assert_close(output.y.reshape(-1, 6), layer(x.reshape(-1, 6), mask.reshape(-1)).y, torch.float32)


def test_input_need_not_be_contiguous():
    layer = MoELayer(small())
    x = torch.randn(5, 3, 6).transpose(0, 1)
    x.requires_grad_()
    y = layer(x).y
    y.sum().backward()
    assert torch.equal(y, layer(x.contiguous()).y)


@pytest.mark.parametrize("cmr", [False, True])
def test_output_type_is_that_of_the_input_or_of_autocast(cmr):
    layer, x = MoELayer(small(cmr=cmr)), torch.randn(5, 6)
    assert layer(x).y.dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output = layer.float()(x)
    assert output.y.dtype == torch.bfloat16
    assert {loss.dtype for loss in output.losses.values()} == {torch.float32}


def test_autocast_routes_as_fp32():
    layer, x = MoELayer(small(num_experts=8)), torch.randn(200, 6)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)
    assert torch.equal(actual.statistics.tokens_per_expert, expected.statistics.tokens_per_expert)
    assert torch.equal(actual.losses["load_balance"], expected.losses["load_balance"])


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"x of shape \(3, 5\) must end in d_model=6"):
        MoELayer(small())(torch.zeros(3, 5))


def test_wrong_mask_is_refused():
    with pytest.raises(ValueError, match=re.escape("padding_mask (3,) must be")):
        MoELayer(small())(torch.zeros(2, 3, 6), torch.zeros(3, dtype=torch.bool))


def test_names_of_parameters():
    shapes = {name: tuple(value.shape) for name, value in MoELayer(small(cmr=True, cmr_d_ffn=3)).state_dict().items()}
    assert shapes == {
        "gate.weight": (4, 6),
        "experts.w_in": (4, 10, 6),
        "experts.b_in": (4, 10),
        "experts.w_out": (4, 6, 10),
        "experts.b_out": (4, 6),
        "conditional.gate.weight": (1, 6),
        "conditional.gate.bias": (1,),
        "conditional.shared.fc1.weight": (3, 6),
        "conditional.shared.fc1.bias": (3,),
        "conditional.shared.fc2.weight": (6, 3),
        "conditional.shared.fc2.bias": (6,),
    }


def test_layer_keeps_nothing_of_a_forward_pass():
    layer = MoELayer(small(cmr=True))
    before = set(vars(layer))
    layer(torch.randn(5, 6))
    assert set(vars(layer)) == before


def test_top_1_gate_learns_through_its_probability():  # 3.1
    case = make_case(small(top_k=1, normalize_weights="none"), 9)
    grad = torch.autograd.grad((case.layer(case.x).y * case.direction).sum(), case.layer.gate.weight)[0]
    assert (grad != 0).any()
    decision = case.layer.gate(case.x)
    assert_close(decision.weight[:, 0], decision.gate_probs.amax(dim=-1), torch.float64)


def test_a_token_with_one_expert_left_gives_the_gate_nothing():  # after_drop makes its weight the constant 1
    case = make_case(small(second_expert_policy="threshold", second_expert_threshold=1.0), 9)
    grad = torch.autograd.grad((case.layer(case.x).y * case.direction).sum(), case.layer.gate.weight)[0]
    assert_close(grad, torch.zeros_like(grad), torch.float64)
