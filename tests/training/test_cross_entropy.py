import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mtmoe.kernels import extension
from mtmoe.training import cross_entropy
from mtmoe.training.cross_entropy import label_smoothed_cross_entropy, label_smoothed_cross_entropy_from_logits

PAD = 1


def reference(logits, target, eps):
    """fairseq's label_smoothed_nll_loss, written out; in fp64."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    kept = target != PAD
    nll = -log_probs.gather(1, target[:, None]).squeeze(1) * kept
    smooth = -log_probs.sum(dim=-1) * kept
    eps_i = eps / (logits.shape[1] - 1)
    return (1 - eps - eps_i) * nll.sum() + eps_i * smooth.sum(), nll


@st.composite
def cases(draw):
    tokens, vocabulary, width = draw(st.integers(0, 20)), draw(st.integers(3, 40)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    # Eighths are exact in bf16, so that both dtypes start from the same numbers.
    features = torch.randint(-12, 13, (tokens, width), generator=generator) / 8
    weight = torch.randint(-12, 13, (vocabulary, width), generator=generator) / 8
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    if draw(st.booleans()):
        target[:] = PAD
    return features, weight, target, draw(st.sampled_from([0.0, 0.1, 0.3]))


def gradients(loss, *inputs, scale=1.0):
    return torch.autograd.grad(loss * scale, inputs)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1.0, 2.5]), st.booleans())
@settings(deadline=None)
def test_loss_of_features_agrees_with_reference(case, dtype, scale, in_blocks):
    features, weight, target, eps = case
    x64, w64 = features.double().requires_grad_(), weight.double().requires_grad_()
    expected, expected_nll = reference(x64 @ w64.T, target, eps)
    expected_grads = gradients(expected, x64, w64, scale=scale)
    x, w = features.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
    saved = cross_entropy.LOGITS_AT_ONCE, cross_entropy.ROWS_IN_CACHE
    try:
        if in_blocks:
            cross_entropy.LOGITS_AT_ONCE, cross_entropy.ROWS_IN_CACHE = 3 * len(weight), 2 * len(weight)
        actual, nll = label_smoothed_cross_entropy(x, w, target, eps, PAD)
    finally:
        cross_entropy.LOGITS_AT_ONCE, cross_entropy.ROWS_IN_CACHE = saved
    actual_grads = gradients(actual, x, w, scale=scale)
    eps_of = torch.finfo(dtype).eps
    largest_logit = float((features @ weight.T).abs().max()) if len(target) else 0.0
    room = 16 * eps_of * (1 + largest_logit)
    assert_close(nll.double(), expected_nll, atol=room, rtol=0)
    assert_close(actual.double(), expected, atol=room * max(1, len(target)), rtol=0)
    for ours, theirs, other in zip(actual_grads, expected_grads, (weight, features), strict=True):
        assert ours.dtype == dtype
        size = float(other.abs().max()) if other.numel() else 0.0
        assert_close(ours.double(), theirs, atol=room * scale * (1 + size) * (1 + len(target) ** 0.5), rtol=0)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_loss_of_logits_agrees_with_reference(case, dtype):
    features, weight, target, eps = case
    logits = (features @ weight.T).to(dtype)
    exact = logits.double().requires_grad_()
    expected, expected_nll = reference(exact, target, eps)
    ours = logits.clone().requires_grad_()
    actual, nll = label_smoothed_cross_entropy_from_logits(ours, target, eps, PAD)
    assert_close(nll.double(), expected_nll, atol=1e-5, rtol=1e-5)
    assert_close(actual.double(), expected, atol=1e-4, rtol=1e-5)
    (grad,), (expected_grad,) = gradients(actual, ours), gradients(expected, exact)
    assert grad.dtype == dtype
    assert_close(grad.double(), expected_grad, atol=2 * torch.finfo(dtype).eps, rtol=0)


def test_value_is_that_of_fairseq():
    fairseq = pytest.importorskip("fairseq.criterions.label_smoothed_cross_entropy")
    torch.manual_seed(0)
    features, weight, target = torch.randn(30, 8), torch.randn(50, 8), torch.randint(0, 50, (30,))
    theirs, nll = fairseq.label_smoothed_nll_loss(torch.log_softmax(features @ weight.T, -1), target, 0.1, PAD)
    loss, our_nll = label_smoothed_cross_entropy(features, weight, target, 0.1, PAD)
    assert_close(loss, theirs)
    assert_close(our_nll.sum(), nll)


def test_autocast_gives_fp32_gradients_of_bf16_products():
    torch.manual_seed(0)
    x, w = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.randint(2, 50, (30,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = label_smoothed_cross_entropy(x, w, target, 0.1, PAD)
        plain = reference(torch.nn.functional.linear(x, w), target, 0.1)[0]
    assert loss.dtype == torch.float32
    assert_close(loss.double(), plain, rtol=1e-5, atol=1e-4)
    assert all(grad.dtype == torch.float32 for grad in gradients(loss, x, w))


def test_no_gradient_is_made_where_none_is_wanted():
    x, w, target = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(2, 9, (6,))
    with torch.no_grad():
        loss, nll = label_smoothed_cross_entropy(x, w, target)
    assert not loss.requires_grad
    assert_close(loss, nll.sum())


def test_second_backward_is_refused():
    x, w, target = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), torch.randint(2, 9, (6,))
    loss, _ = label_smoothed_cross_entropy(x, w, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the first backward"):
        loss.backward()


def test_wrong_shapes_and_eps_are_refused():
    x, w, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(2, 9, (6,))
    with pytest.raises(ValueError, match="features have 4 columns, the output layer has 3"):
        label_smoothed_cross_entropy(x, w[:, :3], target)
    with pytest.raises(ValueError, match=r"got \(6, 4\) and \(5,\)"):
        label_smoothed_cross_entropy(x, w, target[:5])
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0 must be in"):
        label_smoothed_cross_entropy(x, w, target, 1.0)


@pytest.mark.skipif(not extension.available(), reason="the C++ extension is not compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2, 17, 1003])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compiled_rows_agree_with_plain_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocabulary: int, smoothing: float
) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(50, vocabulary)).to(dtype)
    logits[3] *= 40  # far apart: exponentials that vanish
    target = torch.randint(0, vocabulary, (50,))
    target[::7] = -100
    results = []
    for compiled in (True, False):
        monkeypatch.setattr(extension, "available", lambda compiled=compiled: compiled)
        x = logits.clone().requires_grad_()
        loss, nll = label_smoothed_cross_entropy_from_logits(x, target, smoothing)
        loss.backward()
        results.append((loss.detach(), nll, x.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5 if ours.dtype == torch.float32 else 1e-2, atol=1e-4)


@pytest.mark.skipif(not extension.available(), reason="the C++ extension is not compiled")
def test_compiled_rows_pass_on_what_is_not_finite() -> None:
    logits = torch.zeros(2, 9)
    logits[1, 4] = torch.nan
    loss, nll = label_smoothed_cross_entropy_from_logits(logits, torch.tensor([1, 4]), 0.1)
    assert loss.isnan() and nll.isnan().tolist() == [False, True]
    with pytest.raises(IndexError, match="outside"):
        label_smoothed_cross_entropy_from_logits(logits, torch.tensor([1, 9]), 0.1)
