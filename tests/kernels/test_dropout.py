"""Dropout, compiled and of four elements a draw, against what dropout means."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import counter_random
from torch.autograd import gradcheck

from mtmoe import kernels
from mtmoe.kernels import extension
from mtmoe.kernels.dropout import keep_mask

SHAPES = [(100_003,), (333, 301), (7, 11, 1301)]  # none a multiple of four elements
BLOCK = 1024
"""Elements that share a key in the compiled kernel."""


@pytest.fixture(params=["compiled", "torch"], autouse=True, scope="module")
def path(request):
    """Each of the two implementations."""
    if request.param == "compiled" and not extension.available():
        pytest.skip("the C++ extension is not compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "available", lambda: request.param == "compiled")
        yield request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9])
def test_rate_and_scale(shape, p):
    torch.manual_seed(0)
    y = kernels.dropout(torch.ones(shape), p)
    dropped = y == 0
    assert y.shape == shape
    assert abs(dropped.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / y.numel()) + 2**-17
    torch.testing.assert_close(y[~dropped].unique(), torch.tensor([1 / (1 - p)]), rtol=2e-4, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.77])
def test_expectation(p):
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    sample = kernels.dropout(x.expand(100_000, -1), p)
    bound = 4 * x.abs() * math.sqrt(p / (1 - p) / 100_000) + 1e-12
    assert ((sample.mean(dim=0) - x).abs() <= bound).all()


def test_rate_is_rounded_and_the_scale_with_it():
    y = kernels.dropout(torch.ones(1001, dtype=torch.float64), 0.1)
    assert y.max() == 65536 / (65536 - round(0.1 * 65536))


def test_neighbours_are_independent():
    """The four elements of a draw, and elements one and more draws apart."""
    torch.manual_seed(0)
    kept = (kernels.dropout(torch.ones(400_000), 0.25) > 0).double() - 0.75
    sigma = 0.25 * 0.75 / math.sqrt(400_000)
    for distance in (1, 2, 3, 4, 5, 8):
        assert abs((kept[:-distance] * kept[distance:]).mean()) < 4 * sigma


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(0, 61), max_size=3),
    p=st.floats(0.001, 0.99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_compiled_mask_is_that_of_its_seed_both_ways(path, shape, p, dtype, seed):
    if path != "compiled":
        pytest.skip("the mask of the compiled kernel")
    x, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["mtmoe.kernels.dropout"], "draw_seed", lambda: seed)
        y = kernels.dropout(x, p)
    y.backward(grad)
    mask = counter_random.keep_mask(seed, -(-x.numel() // BLOCK), BLOCK, p).flatten()[: x.numel()].view(shape)
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y.double(), x.double() * mask, rtol=rtol, atol=0)
    torch.testing.assert_close(x.grad.double(), grad.double() * mask, rtol=rtol, atol=0)


@pytest.mark.parametrize("place", range(4))
def test_each_place_in_a_draw_has_the_rate(place):
    torch.manual_seed(0)
    kept = keep_mask((400_000,), 16384)[place::4].double().mean()
    assert abs(kept - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 100_000)


@pytest.mark.parametrize(("levels", "expected"), [(0, True), (65536, False)])
def test_mask_at_the_ends(levels, expected):
    assert (keep_mask((200_001,), levels) == expected).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_has_the_mask_and_the_scale_of_the_output(dtype):
    x = torch.ones(37, 5, dtype=dtype, requires_grad=True)
    y = kernels.dropout(x, 0.4)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y)
    assert x.grad.dtype == y.dtype == dtype


def test_gradcheck():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def forward(x):
        torch.manual_seed(4)
        return kernels.dropout(x, 0.4)

    assert gradcheck(forward, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_off_or_nothing_left(p, dtype):
    x = torch.randn(9, 7, dtype=dtype)
    assert kernels.dropout(x, p, training=False) is x
    y = kernels.dropout(x, p)
    if p == 0:
        assert y is x
    if p == 1:
        assert torch.equal(y, torch.zeros_like(x))


def test_nothing_left_has_a_zero_gradient():
    x = torch.ones(7, requires_grad=True)
    kernels.dropout(x, 1.0).sum().backward()
    assert x.grad.tolist() == [0.0] * 7


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.3, False), (1.0, False)])
def test_draws_nothing_when_off(p, training):
    before = torch.get_rng_state()
    kernels.dropout(torch.ones(10), p, training)
    assert torch.equal(torch.get_rng_state(), before)


def test_follows_torchs_seed():
    x = torch.ones(1001)

    def run(seed):
        torch.manual_seed(seed)
        return kernels.dropout(x, 0.3)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    assert not torch.equal(kernels.dropout(x, 0.3), kernels.dropout(x, 0.3))


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    p=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_shape_and_rate(shape, p, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = kernels.dropout(x, p)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    kept = y != 0
    scale = 1 / (1 - min(p, 1 - 2**-16))
    # p within half a level of 1: one level more or less is a factor of two, so compare where that does not matter.
    if p < 0.99:
        torch.testing.assert_close(y[kept], (x * scale)[kept], rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)


def test_input_need_not_be_contiguous():
    x = torch.randn(6, 5).t().requires_grad_()
    torch.manual_seed(0)
    y = kernels.dropout(x, 0.5)
    kept = y != 0
    torch.testing.assert_close(y[kept], 2 * x[kept])
    y.sum().backward()


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_none_is_refused(p):
    with pytest.raises(ValueError, match=f"dropout p={p} must be between 0 and 1"):
        kernels.dropout(torch.ones(3), p)
