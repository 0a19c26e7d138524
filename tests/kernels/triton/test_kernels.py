"""The Triton kernels against the reference in fp64, forward and backward: compiled if there is a GPU, else interpreted.

The interpreter cuts fp32 off where it makes bf16 of it, instead of rounding: one unit more than on a GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.compare import assert_all_close, gradients

pytest.importorskip("triton")

from mtmoe import kernels
from mtmoe.kernels.plan import plan_on_cpu, plan_on_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 100 if DEVICE == "cuda" else 40
UNITS = {torch.float64: 1e4, torch.float32: 500.0, torch.bfloat16: 4.0, torch.float16: 8.0}
AUTOCAST = (torch.float32, torch.bfloat16)
MODES = [(dtype, None) for dtype in UNITS] + [AUTOCAST]  # type of the values, autocast type


class Inputs:
    """A routing and tensors for it, whose values are exact in bf16 and in fp16."""

    def __init__(self, tokens, top_k, num_experts, d_in, d_out, unrouted, skew, trimmed, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return (torch.randint(-32, 33, shape, generator=generator).double() / 16).to(DEVICE)

        scores = torch.randn(tokens, num_experts, generator=generator) - skew * torch.arange(num_experts)
        index = scores.topk(top_k, dim=-1).indices
        index = index.masked_fill(torch.rand(tokens, top_k, generator=generator) < unrouted, -1)
        self.expert_index = index.to(DEVICE)
        self.plan = plan_on_cpu(index, num_experts) if trimmed else plan_on_device(self.expert_index, num_experts)
        rows, self.belong = self.plan.routed, int(self.plan.offsets[-1])
        self.x, self.matrix, self.bias = draw(tokens, d_in), draw(num_experts, d_out, d_in), draw(num_experts, d_out)
        self.weight, self.rows_in, self.rows_out = draw(tokens, top_k), draw(rows, d_in), draw(rows, d_out)
        self.direction_in, self.direction_rows = draw(rows, d_in), draw(rows, d_out)
        self.direction = draw(tokens, d_out)
        for direction in (self.direction_in, self.direction_rows):
            direction[self.belong :] = float("nan")  # rows that belong to nobody: no gradient may come from there


@st.composite
def inputs(draw):
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 9]))
    return Inputs(
        tokens=draw(st.sampled_from([0, 1, 5, 16, 33])),
        top_k=draw(st.integers(1, min(3, num_experts))),
        num_experts=num_experts,
        d_in=draw(st.sampled_from([1, 7, 16, 35])),
        d_out=draw(st.sampled_from([1, 13, 32, 33])),
        unrouted=draw(st.sampled_from([0.0, 0.3, 1.0])),
        skew=draw(st.sampled_from([0.0, 3.0, 50.0])),  # 50: all tokens to the first experts, the others are empty
        trimmed=draw(st.booleans()) if DEVICE == "cpu" else False,
        seed=draw(st.integers(0, 10**6)),
    )


def compare(function, mode, tensors, direction, rows=None, dtypes=None):
    """Run on Triton in `mode` and on the reference in fp64; the first `rows` rows of the result count."""
    dtype, autocast = mode
    found = {}
    for backend in ("triton", "reference"):
        fast = backend == "triton"
        leaves = {
            name: value.to((dtypes or {}).get(name, dtype) if fast else torch.float64).clone().requires_grad_()
            for name, value in tensors.items()
        }
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=bool(autocast) and fast):
            y = function(backend=backend, **leaves)
        y.backward(direction.to(y.dtype))
        found[backend] = {"y": y[:rows], **{f"d {name}": leaf.grad for name, leaf in leaves.items()}}
        if fast:
            assert y.dtype == (autocast if autocast and "matrix" in tensors else dtype)
    return found


def assert_agree(found, mode):
    unit = mode[1] or mode[0]
    assert_all_close(found["triton"], found["reference"], unit, UNITS[unit])


@settings(max_examples=EXAMPLES)
@given(case=inputs(), mode=st.sampled_from(MODES))
def test_dispatch(case, mode):
    found = compare(
        lambda x, backend: kernels.dispatch(x, case.plan, backend=backend),
        mode,
        {"x": case.x},
        case.direction_in,
        case.belong,
    )
    assert torch.equal(found["triton"]["y"].double(), found["reference"]["y"])
    assert_agree(found, mode)


@settings(max_examples=2 * EXAMPLES)
@given(
    case=inputs(),
    mode=st.sampled_from(MODES),
    activation=st.sampled_from([None, *kernels.ACTIVATIONS]),
    with_bias=st.booleans(),
)
def test_grouped_linear(case, mode, activation, with_bias):
    if case.belong < case.plan.routed:
        case.rows_in[case.belong :] = float("nan")  # whatever stands there, nobody reads it

    def run(x, matrix, bias=None, *, backend):
        return kernels.grouped_linear(x, case.plan, matrix, bias, activation, backend=backend)

    tensors = {"x": case.rows_in, "matrix": case.matrix} | ({"bias": case.bias} if with_bias else {})
    found = compare(run, mode, tensors, case.direction_rows, case.belong)
    for side in found.values():
        side["d x"] = side["d x"][: case.belong]
    assert_agree(found, mode)


@settings(max_examples=EXAMPLES)
@given(case=inputs(), mode=st.sampled_from(MODES))
def test_combine(case, mode):
    case.rows_out[case.belong :] = float("nan")

    def run(y, weight, backend):
        return kernels.combine(y, case.plan, weight, backend=backend)

    wide = torch.float64 if mode[0] == torch.float64 else torch.float32
    found = compare(run, mode, {"y": case.rows_out, "weight": case.weight}, case.direction, dtypes={"weight": wide})
    for side in found.values():
        side["d y"] = side["d y"][: case.belong]
    assert_agree(found, (mode[0], None))


@pytest.mark.parametrize("trimmed", [True, False] if DEVICE == "cpu" else [False])
def test_layer_with_more_rows_than_a_tile(trimmed):
    """Several tiles of each expert, more tiles than programs, and an empty expert in the middle."""
    case = Inputs(
        tokens=150, top_k=2, num_experts=4, d_in=40, d_out=40, unrouted=0.1, skew=0.5, trimmed=trimmed, seed=1
    )

    def run(x, matrix, bias, weight, backend):
        rows = kernels.dispatch(x, case.plan, backend=backend)
        rows = kernels.grouped_linear(rows, case.plan, matrix, bias, "gelu", backend=backend)
        return kernels.combine(rows, case.plan, weight, backend=backend)

    tensors = {name: getattr(case, name) for name in ("x", "matrix", "bias", "weight")}
    mode = (torch.float32, None)
    assert_agree(compare(run, mode, tensors, case.direction), mode)


def test_same_bits_every_time_and_inputs_that_are_not_contiguous():
    case = Inputs(
        tokens=33, top_k=3, num_experts=5, d_in=33, d_out=33, unrouted=0.2, skew=1.0, trimmed=False, seed=1
    )

    def run(arrange):
        x = arrange(case.x.float()).requires_grad_()
        matrix, bias = arrange(case.matrix.float()).requires_grad_(), arrange(case.bias.float()).requires_grad_()
        rows = kernels.dispatch(x, case.plan, backend="triton")
        rows = kernels.grouped_linear(rows, case.plan, matrix, bias, "silu", backend="triton")
        y = kernels.combine(rows, case.plan, arrange(case.weight.float()), backend="triton")
        return (y, *gradients((arrange(case.direction.float()) * y).sum(), {"x": x, "w": matrix, "b": bias}).values())

    first = run(lambda value: value.clone())
    for again in (run(lambda value: value.clone()), run(lambda value: value.clone().mT.contiguous().mT)):
        for expected, actual in zip(first, again, strict=True):
            assert torch.equal(expected, actual)


def test_weights_of_unrouted_choices_are_ignored_and_infinite_rows_stay_with_their_token():
    plan = plan_on_device(torch.tensor([[0, 1], [1, -1], [-1, -1]], device=DEVICE), 2)
    y = torch.ones(6, 2, device=DEVICE)
    y[0] = float("inf")
    weight = torch.full((3, 2), 0.5, device=DEVICE)
    weight[1, 1], weight[2] = float("nan"), float("inf")
    total = kernels.combine(y, plan, weight.requires_grad_(), backend="triton")
    assert total[1:].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    total[1:].sum().backward()
    assert weight.grad[1:].tolist() == [[2.0, 0.0], [0.0, 0.0]]
    x = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    kernels.dispatch(x, plan, backend="triton").backward(y)
    assert x.grad[1:].tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_an_infinite_row_does_not_reach_the_weights_of_another_expert():
    plan = plan_on_device(torch.tensor([[0], [1]], device=DEVICE), 2)
    x = torch.tensor([[1.0], [float("inf")]], device=DEVICE)
    matrix = torch.ones(2, 3, 1, device=DEVICE, requires_grad=True)
    kernels.grouped_linear(x, plan, matrix, None, backend="triton").sum().backward()
    assert matrix.grad[0].flatten().tolist() == [1.0] * 3


@pytest.mark.parametrize("wanted", ["x", "matrix", "bias"])
def test_gradients_of_some_inputs_only(wanted):
    case = Inputs(tokens=9, top_k=2, num_experts=4, d_in=3, d_out=2, unrouted=0, skew=1.0, trimmed=False, seed=1)
    tensors = {"x": case.rows_in, "matrix": case.matrix, "bias": case.bias}

    def run(backend, **wants):
        given = {**tensors, **wants}
        return kernels.grouped_linear(given["x"], case.plan, given["matrix"], given["bias"], "relu", backend=backend)

    found = compare(run, (torch.float64, None), {wanted: tensors[wanted]}, case.direction_rows)
    assert_all_close(found["triton"], found["reference"], torch.float64)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_waits_for_a_gpu():
    case = Inputs(tokens=64, top_k=2, num_experts=4, d_in=32, d_out=32, unrouted=0.2, skew=0, trimmed=False, seed=1)

    def run():
        x, matrix = case.x.float().requires_grad_(), case.matrix.float().requires_grad_()
        rows = kernels.grouped_linear(kernels.dispatch(x, case.plan), case.plan, matrix, None, "gelu")
        kernels.combine(rows, case.plan, case.weight.float()).sum().backward()

    run()  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
