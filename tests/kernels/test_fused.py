"""The fused kernels of training against plain torch in fp64: residual connection, attention, linear maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.counter_random import keep_mask
from torch import Tensor, nn

from mtmoe import kernels
from mtmoe.kernels import attention, extension, residual

TYPES = (torch.float32, torch.bfloat16)
SEED = 0x1234567890ABCDEF

compiled = pytest.mark.skipif(not extension.available(), reason="the C++ extension is not compiled")


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two implementations."""
    if request.param == "compiled" and not extension.available():
        pytest.skip("the C++ extension is not compiled")
    monkeypatch.setattr(extension, "available", lambda: request.param == "compiled")
    return str(request.param)


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, inputs, grad))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """Within some units in the last place of the largest value; sums of `terms` grow by its root."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    unit = torch.finfo(dtype).eps * max(largest, 1.0) * terms**0.5
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=8 * unit)


def doubled(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 40), (5, 4, 64), (33, 2, 17)])
def test_residual_norm(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    branch = torch.randn(shape).to(dtype).requires_grad_()
    norm = nn.LayerNorm(shape[-1])
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    total, normed = kernels.residual_norm(x, branch, norm, 0.0, dtype)
    assert total.dtype == torch.float32 and normed.dtype == dtype
    # One element cannot be normalised: its gradient is a difference of like numbers.
    factor = 0.0 if shape[-1] == 1 else 1.0
    grads = torch.randn(shape), (factor * torch.randn(shape)).to(dtype)
    actual = torch.autograd.grad((total, normed), (x, branch, norm.weight, norm.bias), grads)
    x64, branch64, exact = doubled(x), doubled(branch), nn.LayerNorm(shape[-1], dtype=torch.float64)
    exact.load_state_dict(norm.state_dict())
    expected_total = x64 + branch64
    expected = exact(expected_total)
    close(total, expected_total.detach(), torch.float32)
    close(normed, expected.detach(), dtype)
    wanted = torch.autograd.grad(
        (expected_total, expected), (x64, branch64, exact.weight, exact.bias), [each.double() for each in grads]
    )
    rows = shape[0] * shape[1]
    for ours, theirs, kind, terms in zip(
        actual, wanted, (torch.float32, dtype, torch.float32, torch.float32), (4, 1, rows, rows), strict=True
    ):
        close(ours, theirs, kind, terms)


@pytest.mark.parametrize("dtype", TYPES)
def test_residual_without_branch_or_norm(path: str, dtype: torch.dtype) -> None:
    x, branch = torch.randn(6, 2, 24, requires_grad=True), torch.randn(6, 2, 24).to(dtype).requires_grad_()
    total, normed = kernels.residual_norm(x, None, nn.LayerNorm(24))
    assert total is x
    close(normed, torch.nn.functional.layer_norm(doubled(x), (24,)).detach(), torch.float32)
    added = kernels.residual_add(x, branch)
    assert torch.equal(added, x + branch)
    grad = torch.randn(6, 2, 24)
    for ours in gradients(added, grad, x, branch):
        assert torch.equal(ours, grad.to(ours.dtype))


@compiled
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_residual_dropout_draws_the_same_mask_backward(monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    monkeypatch.setattr(residual, "draw_seed", lambda: SEED)
    x, branch = torch.randn(9, 3, 40, requires_grad=True), torch.randn(9, 3, 40, requires_grad=True)
    mask = keep_mask(SEED, 27, 40, p).view(9, 3, 40)
    norm = nn.LayerNorm(40)
    for total in (kernels.residual_add(x, branch, p), kernels.residual_norm(x, branch, norm, p)[0]):
        close(total, (x.double() + branch.double() * mask).detach(), torch.float32)
        grad = torch.randn_like(x)
        ours = gradients(total, grad, x, branch)
        close(ours[0], grad.double(), torch.float32)
        close(ours[1], grad.double() * mask, torch.float32)


@compiled
def test_dropout_has_the_wanted_rate_and_changes_with_the_generator() -> None:
    x = torch.zeros(400, 256)
    torch.manual_seed(3)
    first, second = (kernels.residual_add(x, torch.ones_like(x), 0.3) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, kernels.residual_add(x, torch.ones_like(x), 0.3))
    assert not torch.equal(first, second)
    dropped = (first == 0).double()
    assert abs(float(dropped.mean()) - 0.3) < 5 * (0.21 / dropped.numel()) ** 0.5
    deviation = (0.21 / 400) ** 0.5
    assert float((dropped.mean(0) - 0.3).abs().max()) < 5 * deviation
    assert abs(float(dropped.mean(0).std()) / deviation - 1) < 0.25


sizes = st.integers(1, 37)


def attention_case(
    seed: int, length: int, keys: int | None, batch: int, heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(length, batch, 3 if keys is None else 1, heads, width, generator=generator).to(dtype)
    kv = None if keys is None else torch.randn(keys, batch, 2, heads, width, generator=generator).to(dtype)
    mask = torch.full((length, length), -torch.inf).triu(1) if keys is None else None
    columns = length if keys is None else keys
    lengths = torch.randint(1, columns + 1, (batch, 1), generator=generator)
    return q.requires_grad_(), None if kv is None else kv.requires_grad_(), mask, torch.arange(columns) >= lengths


def check_attention(case: tuple, dtype: torch.dtype, p: float = 0.0, kept: Tensor | None = None) -> None:
    q, kv, mask, padding = case
    out = kernels.attend(q, kv, mask, padding, p)
    grad = torch.randn(out.shape).to(dtype)
    inputs = [each for each in (q, kv) if each is not None]
    ours = gradients(out, grad, *inputs)
    exact = [doubled(each) for each in inputs]
    packed = exact[0].unbind(2) if kv is None else (exact[0].select(2, 0), *exact[1].unbind(2))
    query, key, value = (part.permute(1, 2, 0, 3) for part in packed)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
    weights = scores.softmax(dim=-1)
    expected = ((weights if kept is None else weights * kept) @ value).permute(2, 0, 1, 3)
    close(out, expected.detach(), dtype, 4)
    for actual, wanted in zip(ours, gradients(expected, grad.double(), *exact), strict=True):
        close(actual, wanted, dtype, 16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.usefixtures("path")
def test_attention(dtype: torch.dtype, own: bool) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), sizes, sizes, st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16, 24, 64]))
    def check(seed: int, length: int, keys: int, batch: int, heads: int, width: int) -> None:
        case = attention_case(seed, length, None if own else keys, batch, heads, width, dtype)
        check_attention(case, dtype)

    check()


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("own", [True, False])
def test_attention_dropout_draws_the_same_mask_backward(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, own: bool
) -> None:
    monkeypatch.setattr(attention, "draw_seed", lambda: SEED)
    length, keys, batch, heads = 19, 19 if own else 23, 2, 3
    case = attention_case(1, length, None if own else keys, batch, heads, 16, dtype)
    kept = keep_mask(SEED, batch * heads * length, keys, 0.2).view(batch, heads, length, keys)
    check_attention(case, dtype, 0.2, kept)


def test_attention_of_a_row_without_keys_stays_finite(path: str) -> None:
    q = torch.randn(5, 2, 3, 2, 8, requires_grad=True)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0] = True
    out = kernels.attend(q, None, torch.full((5, 5), -torch.inf).triu(1), padding)
    out.sum().backward()
    assert out.isfinite().all() and q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 9, 70])
@pytest.mark.parametrize("sizes", [(24,), (24, 24, 24), (16, 130), (13,)])
def test_linear_is_several_maps_of_one_input(path: str, autocast: bool, sizes: tuple[int, ...], rows: int) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if autocast else torch.float32
    x, maps = torch.randn(rows, 3, 12, requires_grad=True), [nn.Linear(12, size) for size in sizes]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = kernels.linear(x, *maps)
    assert y.dtype == dtype
    parameters = [each.weight for each in maps] + [each.bias for each in maps]
    grad = torch.randn(y.shape).to(dtype)
    ours = gradients(y, grad, x, *parameters)
    expected = torch.cat([each(x) for each in maps], dim=-1)
    close(y, expected.detach().double(), dtype)
    for actual, wanted in zip(ours, gradients(expected, grad.float(), x, *parameters), strict=True):
        assert actual.dtype == torch.float32
        close(actual, wanted.double(), dtype, max(rows, 4))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(0, 40), (1, 40), (9, 130), (70, 41)])
def test_feed_forward(path: str, autocast: bool, rows: int, width: int) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if autocast else torch.float32
    x, first, second = torch.randn(rows, 3, 12, requires_grad=True), nn.Linear(12, width), nn.Linear(width, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = kernels.feed_forward(x, first, second)
        plain = second(first(x).relu())
    parameters = [*first.parameters(), *second.parameters()]
    grad = torch.randn(y.shape).to(dtype)
    close(y, plain.detach().double(), dtype)
    for actual, wanted in zip(gradients(y, grad, x, *parameters), gradients(plain, grad, x, *parameters), strict=True):
        assert actual.dtype == torch.float32
        close(actual, wanted.double(), dtype, max(rows, 4))
