"""Each backend against a loop over tokens, forward and backward, and the contract that all share."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.compare import assert_all_close, assert_close, gradients
from torch.autograd import gradcheck
from torch.nn import functional as F

from mtmoe import kernels
from mtmoe.kernels import ACTIVATIONS, BACKENDS, extension, plan_dispatch

# Where the compiled kernels are available, "cpu" is them; "plain" is what it is elsewhere. Triton has tests of its own.
ALL = ["cpu", "plain", "reference"]
BACKENDS["plain"] = "reference.plain_cpu"
LEAVES = ("x", "matrix", "bias", "weight", "rows_in", "rows_out")
MODES = {  # type of the values, autocast
    "fp64": (torch.float64, False),
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


class Inputs:
    """Tokens, choices and weights with values that are exact in bf16."""

    def __init__(self, tokens, top_k, num_experts, d_in, d_out, unrouted, skew, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16().double()

        scores = torch.randn(tokens, num_experts, generator=generator) - skew * torch.arange(num_experts)
        self.expert_index = scores.topk(top_k, dim=-1).indices
        hidden = torch.rand(tokens, top_k, generator=generator) < unrouted
        self.expert_index = self.expert_index.masked_fill(hidden, -1)
        self.plan = plan_dispatch(self.expert_index, num_experts)
        self.x, self.matrix, self.bias = draw(tokens, d_in), draw(num_experts, d_out, d_in), draw(num_experts, d_out)
        self.weight = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).bfloat16().double()
        self.rows_in, self.rows_out = draw(self.plan.routed, d_in), draw(self.plan.routed, d_out)
        self.direction_rows, self.direction = draw(self.plan.routed, d_out), draw(tokens, d_out)
        self.direction_in = draw(self.plan.routed, d_in)


@st.composite
def inputs(draw):
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 7]))
    return Inputs(
        tokens=draw(st.sampled_from([0, 1, 2, 5, 17, 33, 140])),
        top_k=draw(st.integers(1, min(3, num_experts))),
        num_experts=num_experts,
        d_in=draw(st.sampled_from([1, 4, 7, 34, 128])),
        d_out=draw(st.sampled_from([1, 8, 13, 66])),
        unrouted=draw(st.sampled_from([0.0, 0.3, 1.0])),
        skew=draw(st.sampled_from([0.0, 3.0, 50.0])),  # 50: all tokens to the first experts, the others are empty
        seed=draw(st.integers(0, 10**6)),
    )


def leaves(dtype, **tensors):
    return {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}


def with_gradients(y, direction, tensors):
    found = gradients((y.double() * direction).sum(), tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
    return {"y": y, **{f"d {name}": grad for name, grad in found.items()}}


def check(actual, expected, mode):
    dtype, autocast = MODES[mode]
    assert_all_close(actual, expected, torch.bfloat16 if autocast else dtype)


@settings(max_examples=60)
@given(case=inputs(), backend=st.sampled_from(ALL), mode=st.sampled_from(sorted(MODES)))
def test_dispatch_copies_tokens_to_their_experts(case, backend, mode):
    order = [(int(row), token) for token, slots in enumerate(case.plan.slot) for row in slots if row >= 0]

    def loop(x):
        rows = [x[token] for _, token in sorted(order)]
        return torch.stack(rows) if rows else x[:0]

    dtype, autocast = MODES[mode]
    actual, expected = leaves(dtype, x=case.x), leaves(torch.float64, x=case.x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = kernels.dispatch(actual["x"], case.plan, backend=backend)
    assert torch.equal(y.double(), loop(case.x))
    check(
        with_gradients(y, case.direction_in, actual),
        with_gradients(loop(expected["x"]), case.direction_in, expected),
        mode,
    )


@settings(max_examples=100)
@given(
    case=inputs(),
    backend=st.sampled_from(ALL),
    mode=st.sampled_from(sorted(MODES)),
    with_bias=st.booleans(),
    activation=st.sampled_from([None, *ACTIVATIONS]),
)
def test_grouped_linear_runs_each_row_through_its_expert(case, backend, mode, with_bias, activation):
    names = {"x": case.rows_in, "weight": case.matrix} | ({"bias": case.bias} if with_bias else {})
    row_experts = case.expert_index.flatten()[case.plan.assignment].tolist()

    def loop(x, weight, bias=None):
        rows = [
            F.linear(row, weight[e], None if bias is None else bias[e]) for row, e in zip(x, row_experts, strict=True)
        ]
        y = torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1]) + 0 * x.sum()
        return y if activation is None else getattr(F, activation)(y)

    dtype, autocast = MODES[mode]
    actual, expected = leaves(dtype, **names), leaves(torch.float64, **names)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = kernels.grouped_linear(
            actual["x"], case.plan, actual["weight"], actual.get("bias"), activation, backend=backend
        )
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    check(
        with_gradients(y, case.direction_rows, actual),
        with_gradients(loop(**expected), case.direction_rows, expected),
        mode,
    )


@settings(max_examples=100)
@given(case=inputs(), backend=st.sampled_from(ALL), mode=st.sampled_from(sorted(MODES)))
def test_combine_adds_up_the_weighted_rows(case, backend, mode):
    def loop(y, weight):
        tokens = []
        for token in range(case.plan.tokens):
            total = y.new_zeros(y.shape[1])
            for choice, row in enumerate(case.plan.slot[token].tolist()):
                if row >= 0:
                    total = total + weight[token, choice] * y[row]
            tokens.append(total)
        return (torch.stack(tokens) if tokens else y.new_zeros(0, y.shape[1])) + 0 * (y.sum() + weight.sum())

    dtype, autocast = MODES[mode]
    weight_dtype = torch.float64 if mode == "fp64" else torch.float32
    actual = leaves(dtype, y=case.rows_out) | leaves(weight_dtype, weight=case.weight)
    expected = leaves(torch.float64, y=case.rows_out, weight=case.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = kernels.combine(actual["y"], case.plan, actual["weight"], backend=backend)
    assert total.dtype == dtype
    check(
        with_gradients(total, case.direction, actual), with_gradients(loop(**expected), case.direction, expected), mode
    )


@pytest.mark.parametrize("backend", ALL)
def test_combine_sums_bf16_in_fp32(backend):
    """1 + 7 * 2**-9: rounded to bf16 after each sum, the small terms would vanish one by one."""
    plan = plan_dispatch(torch.arange(8)[None], 8)
    y = torch.full((8, 1), 2.0**-9).bfloat16()
    y[0] = 1
    total = kernels.combine(y, plan, torch.ones(1, 8), backend=backend)
    assert total.item() == 1 + 2**-6  # 1.0137 rounded once


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("unrouted", [0.0, 0.4])
def test_gradcheck(backend, unrouted):
    case = Inputs(tokens=5, top_k=2, num_experts=4, d_in=3, d_out=2, unrouted=unrouted, skew=1.0, seed=1)
    plan = case.plan
    double = {name: value.clone().requires_grad_() for name, value in vars(case).items() if name in LEAVES}
    x, rows_in, rows_out = double["x"], double["rows_in"], double["rows_out"]
    assert gradcheck(lambda x: kernels.dispatch(x, plan, backend=backend), (x,))
    linear = (rows_in, double["matrix"], double["bias"])
    assert gradcheck(lambda x, w, b: kernels.grouped_linear(x, plan, w, b, backend=backend), linear)
    assert gradcheck(lambda x, w: kernels.grouped_linear(x, plan, w, None, backend=backend), linear[:2])
    assert gradcheck(lambda y, w: kernels.combine(y, plan, w, backend=backend), (rows_out, double["weight"]))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradients_of_some_inputs_only(backend, wanted):
    case = Inputs(tokens=9, top_k=2, num_experts=4, d_in=3, d_out=2, unrouted=0.2, skew=1.0, seed=1)
    arguments = {"x": case.rows_in, "weight": case.matrix, "bias": case.bias}
    all_of_them = leaves(torch.float64, **arguments)
    y = kernels.grouped_linear(all_of_them["x"], case.plan, all_of_them["weight"], all_of_them["bias"], backend=backend)
    expected = gradients((y * case.direction_rows).sum(), all_of_them)[wanted]
    one = arguments | {wanted: arguments[wanted].clone().requires_grad_()}
    y = kernels.grouped_linear(one["x"], case.plan, one["weight"], one["bias"], backend=backend)
    assert torch.equal(torch.autograd.grad((y * case.direction_rows).sum(), one[wanted])[0], expected)


@pytest.mark.parametrize("backend", ALL)
def test_gradient_that_is_not_contiguous(backend):
    case = Inputs(tokens=6, top_k=2, num_experts=3, d_in=4, d_out=4, unrouted=0.2, skew=1.0, seed=1)

    def run(transform):
        x, matrix = case.x.clone().requires_grad_(), case.matrix.clone().requires_grad_()
        rows = kernels.grouped_linear(
            kernels.dispatch(x, case.plan, backend=backend), case.plan, matrix, None, backend=backend
        )
        y = kernels.combine(rows, case.plan, case.weight, backend=backend)
        y.backward(transform(case.direction))
        return {"x": x.grad, "weight": matrix.grad}

    strided = run(lambda grad: grad.t().contiguous().t())
    assert_all_close(strided, run(lambda grad: grad), torch.float64)
    expanded = run(lambda grad: torch.ones(1, 1, dtype=torch.float64).expand_as(grad))
    assert_all_close(expanded, run(torch.ones_like), torch.float64)


@pytest.mark.parametrize("backend", ALL)
def test_a_token_may_go_to_an_expert_twice(backend):
    """Gating dropout maps two choices onto one local expert."""
    plan = plan_dispatch(torch.tensor([[1, 1], [0, 1]]), 2)
    x = torch.tensor([[1.0], [10.0]], requires_grad=True)
    matrix = torch.tensor([[[2.0]], [[3.0]]])
    weight = torch.tensor([[0.25, 0.5], [1.0, 2.0]])
    rows = kernels.grouped_linear(kernels.dispatch(x, plan, backend=backend), plan, matrix, None, backend=backend)
    y = kernels.combine(rows, plan, weight, backend=backend)
    assert y[:, 0].tolist() == [0.75 * 3, 20 + 60]
    y.sum().backward()
    assert x.grad[:, 0].tolist() == [0.75 * 3, 2 + 6]


@pytest.mark.parametrize("backend", ALL)
def test_weights_of_unrouted_choices_are_ignored(backend):
    plan = plan_dispatch(torch.tensor([[0, -1], [-1, -1]]), 1)
    weight = torch.tensor([[0.5, float("nan")], [float("inf"), 7.0]], requires_grad=True)
    y = kernels.combine(torch.ones(1, 3), plan, weight, backend=backend)
    assert y.tolist() == [[0.5] * 3, [0.0] * 3]
    y.sum().backward()
    assert weight.grad.tolist() == [[3.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("backend", ALL)
def test_a_row_that_overflowed_stays_with_its_token(backend):
    plan = plan_dispatch(torch.tensor([[0, 1], [1, -1], [-1, -1]]), 2)
    y = torch.ones(3, 2)
    y[0] = float("inf")
    total = kernels.combine(y, plan, torch.full((3, 2), 0.5), backend=backend)
    assert total[1:].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    x = torch.ones(3, 2, requires_grad=True)
    kernels.dispatch(x, plan, backend=backend).backward(y)
    assert x.grad[1:].tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("backend", ALL)
def test_inputs_are_left_as_they_were(backend):
    case = Inputs(tokens=9, top_k=2, num_experts=4, d_in=3, d_out=2, unrouted=0.2, skew=1.0, seed=1)
    saved = {name: value.clone() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    rows = kernels.dispatch(case.x.requires_grad_(), case.plan, backend=backend)
    rows = kernels.grouped_linear(rows, case.plan, case.matrix.requires_grad_(), case.bias, backend=backend)
    kernels.combine(rows, case.plan, case.weight.requires_grad_(), backend=backend).backward(case.direction)
    for name, value in saved.items():
        assert torch.equal(getattr(case, name), value), name


@pytest.mark.parametrize("backend", ALL)
def test_same_bits_every_time(backend):
    case = Inputs(tokens=33, top_k=3, num_experts=5, d_in=33, d_out=33, unrouted=0.2, skew=1.0, seed=1)

    def run():
        x = case.x.float().requires_grad_()
        rows = kernels.dispatch(x, case.plan, backend=backend)
        rows = kernels.grouped_linear(rows, case.plan, case.matrix.float(), None, backend=backend)
        y = kernels.combine(rows, case.plan, case.weight.float(), backend=backend)
        return y, torch.autograd.grad(y.sum(), x)[0]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# The contract


PLAN = plan_dispatch(torch.tensor([[0, 1], [1, -1], [0, 1]]), 3)  # 3 tokens, 5 rows


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: kernels.dispatch(torch.zeros(4, 2), PLAN), r"x of shape \(4, 2\); the plan is for \(3, d_model\)"),
        (lambda: kernels.dispatch(torch.zeros(3), PLAN), r"x of shape \(3,\)"),
        (
            lambda: kernels.grouped_linear(torch.zeros(4, 2), PLAN, torch.zeros(3, 6, 2), None),
            r"x \(4, 2\) and weight \(3, 6, 2\); the plan has 5 rows for 3 experts",
        ),
        (lambda: kernels.grouped_linear(torch.zeros(5, 2), PLAN, torch.zeros(2, 6, 2), None), "the plan has 5 rows"),
        (lambda: kernels.grouped_linear(torch.zeros(5, 2), PLAN, torch.zeros(3, 6, 4), None), "the plan has 5 rows"),
        (
            lambda: kernels.grouped_linear(torch.zeros(5, 2), PLAN, torch.zeros(3, 6, 2), torch.zeros(6)),
            r"bias \(6,\); weight asks for \(3, 6\)",
        ),
        (
            lambda: kernels.grouped_linear(torch.zeros(5, 2), PLAN, torch.zeros(3, 6, 2).bfloat16(), None),
            "x of torch.float32 and weight of torch.bfloat16; cast one, or use autocast",
        ),
        (
            lambda: kernels.combine(torch.zeros(4, 2), PLAN, torch.zeros(3, 2)),
            r"y \(4, 2\) and weight \(3, 2\); the plan has 5 rows of 3 tokens with 2 choices",
        ),
        (lambda: kernels.combine(torch.zeros(5, 2), PLAN, torch.zeros(3, 1)), "3 tokens with 2 choices"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match="activation='tanh' is unknown; choose None or one of: relu, gelu, silu"):
        kernels.grouped_linear(torch.zeros(5, 2), PLAN, torch.zeros(3, 6, 2), None, "tanh")


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activation_is_applied_to_the_sum(backend, activation):
    case = Inputs(tokens=9, top_k=2, num_experts=4, d_in=3, d_out=2, unrouted=0.2, skew=1.0, seed=1)

    def run(fused):
        rows, matrix, bias = (value.clone().requires_grad_() for value in (case.rows_in, case.matrix, case.bias))
        y = kernels.grouped_linear(rows, case.plan, matrix, bias, activation if fused else None, backend=backend)
        y = y if fused else getattr(F, activation)(y)
        return with_gradients(y, case.direction_rows, {"x": rows, "weight": matrix, "bias": bias})

    assert_all_close(run(True), run(False), torch.float64)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="backend='cuda' is unknown; choose one of: cpu, plain, reference, triton"):
        kernels.dispatch(torch.zeros(3, 2), PLAN, backend="cuda")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("cuda", "triton"), ("meta", "reference")])
def test_default_backend_of_a_device(device, name, installed, monkeypatch):
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: installed)
    expected = "reference" if name == "triton" and not installed else name
    assert kernels.load_backend(None, torch.device(device)).__name__ == BACKENDS[expected]


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: False)
    with pytest.raises(ImportError, match=r"needs the package triton.*pip install mtmoe\[gpu\]"):
        kernels.load_backend("triton", torch.device("cpu"))


def test_kernels_need_no_triton():
    code = "import sys, mtmoe.kernels as kernels; kernels.load_backend('cpu', None); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_autograd_is_needed():
    case = Inputs(tokens=9, top_k=2, num_experts=4, d_in=3, d_out=2, unrouted=0.2, skew=1.0, seed=1)
    for context in (torch.no_grad(), torch.inference_mode(), nullcontext()):
        with context:
            rows = kernels.grouped_linear(kernels.dispatch(case.x, case.plan), case.plan, case.matrix, case.bias)
            assert_close(kernels.combine(rows, case.plan, case.weight).sum(dim=0), sum_of_outputs(case), torch.float64)


def sum_of_outputs(case):
    total = torch.zeros(2, dtype=torch.float64)
    for token in range(9):
        for choice, expert in enumerate(case.expert_index[token].tolist()):
            if expert >= 0:
                total += case.weight[token, choice] * (case.matrix[expert] @ case.x[token] + case.bias[expert])
    return total


@pytest.mark.skipif(not extension.available(), reason="no compiled kernels on this machine")
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_the_compiled_kernels_give_the_same_bits_on_any_number_of_threads(mode):
    dtype, autocast = MODES[mode]
    case = Inputs(tokens=140, top_k=2, num_experts=5, d_in=130, d_out=194, unrouted=0.2, skew=1.0, seed=1)

    def run(threads):
        torch.set_num_threads(threads)
        values = leaves(dtype, x=case.rows_in, weight=case.matrix, bias=case.bias)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = kernels.grouped_linear(values["x"], case.plan, values["weight"], values["bias"], "relu", backend="cpu")
        return list(with_gradients(y, case.direction_rows, values).values())

    before = torch.get_num_threads()
    try:
        for one, three in zip(run(1), run(3), strict=True):
            assert torch.equal(one, three)
    finally:
        torch.set_num_threads(before)
