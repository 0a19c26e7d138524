"""The Triton cross entropy against the written-out formula in fp64, and behind the training loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.compare import assert_close

from mtmoe.training import cross_entropy as training

pytest.importorskip("triton")

from mtmoe.kernels.triton import cross_entropy

IGNORED = -100


def written_out(logits, target, mask, eps):
    """Loss, negative log likelihoods and gradient by autograd, in fp64."""
    logits = logits.double().requires_grad_()
    log_probs = torch.log_softmax(logits, dim=-1)
    nll = -log_probs.gather(1, target.clamp(min=0)[:, None]).squeeze(1) * mask
    eps_i = eps / (logits.shape[1] - 1)
    loss = (1 - eps - eps_i) * nll.sum() - eps_i * (log_probs.sum(dim=-1) * mask).sum()
    return loss.detach(), nll.detach(), torch.autograd.grad(loss, logits)[0]


@st.composite
def cases(draw):
    tokens = draw(st.sampled_from([0, 1, 2, 5]))
    vocabulary = draw(st.sampled_from([2, 127, 128, 129, 400, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([1.0, 20.0]))
    logits = (torch.randn(tokens, vocabulary, generator=generator) * scale).bfloat16().float()
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    ignored = draw(st.sampled_from(["none", "some", "all"]))
    if ignored == "some":
        target[::2] = IGNORED
    elif ignored == "all":
        target[:] = IGNORED
    return logits, target, draw(st.sampled_from([0.0, 0.1, 0.3])), ignored == "none" and draw(st.booleans())


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Several blocks for each row, as a large vocabulary has."""
    saved, cross_entropy.BLOCK_V = cross_entropy.BLOCK_V, 128
    yield
    cross_entropy.BLOCK_V = saved


@settings(max_examples=80)
@given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    in_place=st.sampled_from([True, False, None]),
)
def test_agrees_with_written_out_formula(case, dtype, in_place):
    logits, target, eps, no_mask = case
    logits = logits.to(dtype)
    mask = target != IGNORED
    expected_loss, expected_nll, expected_grad = written_out(logits, target, mask, eps)
    given_logits = logits.clone()
    grad = {True: given_logits, False: torch.full_like(logits, 7), None: None}[in_place]
    given_mask = None if no_mask else mask
    loss, nll = cross_entropy.loss_and_gradient(given_logits, target, given_mask, eps, grad)
    assert loss.dtype == nll.dtype == torch.float32
    assert_close(loss, expected_loss, torch.float32, "loss", units=32)
    assert_close(nll, expected_nll, torch.float32, "nll", units=32, scale=20.0)
    if grad is None or not in_place:
        assert torch.equal(given_logits, logits)
    if grad is not None:
        rounding = 0.5 if dtype != torch.float32 else 64
        assert_close(grad, expected_grad, dtype, "gradient", units=rounding + 0.1, scale=1.0)
        assert (grad[~mask] == 0).all()
    same, same_nll = training._loss_and_gradient(logits, target, given_mask, eps, None)
    assert_close(loss, same, torch.float32, units=64)
    assert_close(nll, same_nll, torch.float32, units=64, scale=20.0)


def test_masked_words_of_minus_infinity_have_no_gradient():
    logits = torch.randn(3, 300)
    logits[:, :200] = -float("inf")  # more than a whole block
    target = torch.tensor([250, 299, 200])
    expected = torch.log_softmax(logits.double(), dim=-1)
    grad = torch.empty_like(logits)
    loss, nll = cross_entropy.loss_and_gradient(logits, target, None, 0.0, grad)
    assert_close(nll, -expected.gather(1, target[:, None]).squeeze(1), torch.float32)
    assert loss == nll.sum()
    assert (grad[:, :200] == 0).all()


def test_rows_may_be_part_of_a_wider_array():
    wide, target = torch.randn(4, 500), torch.tensor([3, 1, 299, 0])
    logits = wide[:, 100:400]
    expected = written_out(logits, target, torch.ones(4, dtype=torch.bool), 0.1)
    before = wide.clone()
    loss, _ = cross_entropy.loss_and_gradient(logits, target, None, 0.1, logits)
    assert_close(loss, expected[0], torch.float32)
    assert_close(logits, expected[2], torch.float32)
    assert torch.equal(wide[:, :100], before[:, :100])
    assert torch.equal(wide[:, 400:], before[:, 400:])


def test_columns_are_refused():
    with pytest.raises(ValueError, match="rows that are contiguous"):
        cross_entropy.loss_and_gradient(torch.randn(30, 4).t(), torch.zeros(4, dtype=torch.int64), None, 0.1, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_logits", [False, True])
def test_training_loss_through_triton_is_the_same(dtype, from_logits, monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(9, 4).to(dtype), torch.randn(300, 4).to(dtype)
    target = torch.randint(0, 300, (9,))
    target[::3] = IGNORED

    def run(triton):
        monkeypatch.setattr(training, "_runs_triton", lambda _: triton)
        features, matrix = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if from_logits:
            loss, nll = training.label_smoothed_cross_entropy_from_logits(features @ matrix.T, target, 0.1)
        else:
            loss, nll = training.label_smoothed_cross_entropy(features, matrix, target, 0.1)
        return loss, nll, *torch.autograd.grad(2.5 * loss, (features, matrix))

    for actual, expected in zip(run(True), run(False), strict=True):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, dtype, units=4 if dtype == torch.bfloat16 else 64)
