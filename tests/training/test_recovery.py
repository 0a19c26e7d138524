"""Distillation against its formula, and a student that comes nearer to its parent."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtmoe.data.mmap_dataset import write_dataset
from mtmoe.errors import DataError
from mtmoe.training.recovery import (
    PairBatch,
    RecoveryOptions,
    distillation_loss,
    learning_rate,
    recover,
    training_batches,
)

VOCABULARY = 12
TAGS = {"de": 10, "en": 11}


class Toy(nn.Module):
    """Logits from the mean of the source and the last target token."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.out = nn.Linear(8, VOCABULARY)
        self.requires_grad_(False)

    def forward(self, source, target_input):
        return self.out(self.embed(source).mean(dim=1, keepdim=True) + self.embed(target_input))


def random_batch(seed, rows=4, length=5):
    generator = torch.Generator().manual_seed(seed)
    source, target = (torch.randint(4, 10, (rows, length), generator=generator) for _ in range(2))
    target[0, 3:] = 1  # padding
    target_input = torch.cat([torch.full((rows, 1), 11), target[:, :-1]], dim=1)
    return PairBatch(source, target_input, target)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.3, 1.0]), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_loss_is_the_sum_over_tokens_and_words(seed, share, dtype):
    batch, parent = random_batch(seed), Toy(seed + 1)
    logits = Toy(seed)(batch.source, batch.target_input).to(getattr(torch, dtype))
    loss = distillation_loss(logits, parent, batch, share)
    total, tokens = 0.0, 0
    wanted = parent(batch.source, batch.target_input)
    for row in range(len(batch.target)):
        for place in range(batch.target.shape[1]):
            if batch.target[row, place] == 1:
                continue
            tokens += 1
            log_probs = logits[row, place].double().log_softmax(-1)
            probs = wanted[row, place].double().softmax(-1)
            total -= (1 - share) * log_probs[batch.target[row, place]].item()
            total -= share * (probs * log_probs).sum().item()
    assert loss.item() == pytest.approx(total / tokens, rel=1e-5)
    assert loss.dtype == torch.float32


def test_gradient_vanishes_where_the_student_is_its_parent():
    parent = Toy(1)
    batch = random_batch(1)
    logits = parent(batch.source, batch.target_input).requires_grad_()
    distillation_loss(logits, parent, batch, 1.0).backward()
    assert logits.grad.abs().max() < 1e-7


def test_student_comes_nearer_and_is_frozen_again():
    parent, student = Toy(1), Toy(2)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    batches = [random_batch(seed) for seed in range(80)]
    held_out = random_batch(999)

    def distance():
        with torch.no_grad():
            return distillation_loss(student(held_out.source, held_out.target_input), parent, held_out, 1.0).item()

    start, losses = distance(), []
    options = RecoveryOptions(updates=80, learning_rate=0.05, distillation=1.0)
    recover(student, parent, iter(batches), options, lambda done, loss: losses.append((done, loss)))
    assert distance() < start - 0.2
    assert [done for done, _ in losses] == list(range(1, 81))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in student.parameters())
    assert all(torch.equal(parent.state_dict()[name], tensor) for name, tensor in before.items())


def test_learning_rate_rises_and_falls():
    options = RecoveryOptions(updates=20, learning_rate=1.0)
    rates = [learning_rate(update, options) for update in range(20)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 19)
    assert learning_rate(0, RecoveryOptions(updates=1, learning_rate=0.3)) == pytest.approx(0.3)


def test_options_are_checked():
    for wrong, message in (
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"updates": 1, "learning_rate": 0.0}, "learning_rate=0.0 and"),
        ({"updates": 1, "distillation": 1.5}, "distillation=1.5 must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RecoveryOptions(**wrong)
    with pytest.raises(ValueError, match="updates=3 need as many batches, got 2"):
        recover(Toy(1), Toy(2), [random_batch(1)] * 2, RecoveryOptions(updates=3))


@pytest.fixture
def data(tmp_path):
    """30 pairs of de-en, whose first id tells the pair, and lengths of both sides differ."""
    (tmp_path / "bin").mkdir()
    for language, extra in (("de", 0), ("en", 1)):
        segments = [[100 + number, *[5] * ((number * (3 + extra)) % 7), 2] for number in range(30)]
        ids = np.array([token for segment in segments for token in segment])
        sizes = np.array([len(segment) for segment in segments], dtype=np.int32)
        write_dataset(tmp_path / "bin" / f"train.de-en.{language}", ids, sizes, np.dtype(np.uint16))
    return tmp_path


@pytest.mark.parametrize("side", ["src", "tgt"])
@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_batches_hold_each_pair_once_before_any_twice(data, side, max_tokens):
    batches = training_batches(data, ["en-de", "mk-de"], TAGS, encoder_langtok=side, max_tokens=max_tokens)
    seen = []
    while len(seen) < 30:
        batch = next(batches)
        assert max(batch.source.numel(), batch.target.numel()) <= max_tokens or len(batch.source) == 1
        for source, target_input, target in zip(batch.source, batch.target_input, batch.target, strict=True):
            assert source[0] == TAGS["en" if side == "src" else "de"]
            assert target_input[0] == TAGS["de"]
            assert source[1] == target[0]  # the same pair on both sides
            real = target.ne(1)
            assert target[real][-1] == 2
            assert target_input[1 : int(real.sum())].tolist() == target[real][:-1].tolist()
            assert math.prod(target_input[int(real.sum()) :].tolist()) in (1,)  # padding, or nothing
            seen.append(int(target[0]))
    assert sorted(seen) == list(range(100, 130))


def test_long_pairs_are_left_out_and_draws_follow_the_seed(data):
    def first(seed, **options):
        batches = training_batches(data, ["en-de", "de-en"], TAGS, seed=seed, max_tokens=30, **options)
        return [next(batches).source.tolist() for _ in range(10)]

    assert first(1) == first(1) != first(2)
    assert all(len(row) <= 6 for batch in first(1, longest=6) for row in batch)
    with pytest.raises(DataError, match="has no training text for en-mk"):
        training_batches(data, ["en-mk"], TAGS)
    with pytest.raises(DataError, match="has no training text for en-de"):
        training_batches(data, ["en-de"], TAGS, longest=2)
