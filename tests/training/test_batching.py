import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.training.batching import Batches, make_batches

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=120)


@given(lengths, st.integers(40, 200), st.sampled_from([None, 1, 7]), st.sampled_from([1, 4, 8]))
def test_every_sentence_once_and_limits_hold(pairs, max_tokens, max_sentences, multiple):
    source, target = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    batches = make_batches(source, target, max_tokens=max_tokens, max_sentences=max_sentences, multiple=multiple)
    assert sorted(batches.sentences.tolist()) == list(range(len(pairs)))
    for batch in batches:
        longest = max(source[batch].max(), target[batch].max())
        assert len(batch) * longest <= max_tokens
        assert max_sentences is None or len(batch) <= max_sentences


def test_no_limit_is_one_batch():
    assert [len(batch) for batch in make_batches(np.arange(1, 9), np.arange(1, 9), max_tokens=None)] == [8]


def test_too_long_a_sentence_is_refused():
    with pytest.raises(ValueError, match="has 50 tokens, more than max-tokens=40; raise --max-tokens"):
        make_batches(np.array([3, 50]), np.array([3, 4]), max_tokens=40)


def test_little_padding_and_fast():
    generator = np.random.default_rng(0)
    source = generator.geometric(0.07, 300_000).clip(1, 200)
    target = (source * generator.uniform(0.6, 1.6, len(source))).astype(np.int64).clip(1, 250)
    begun = time.perf_counter()
    batches = make_batches(source, target, max_tokens=1024)
    seconds = time.perf_counter() - begun
    padded = sum(len(b) * (source[b].max() + target[b].max()) for b in batches)
    assert padded < 1.04 * (source.sum() + target.sum())
    assert seconds < 6  # 0.8 s on an idle core


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=8), st.randoms())
def test_flat_batches_are_like_a_list(lists, random):
    sentences = np.array([number for each in lists for number in each], dtype=np.int64)
    flat = Batches(sentences, np.cumsum([0, *map(len, lists)]))
    order = list(range(len(lists)))
    random.shuffle(order)
    reordered = flat.reordered(np.array(order, dtype=np.int64))
    assert [batch.tolist() for batch in reordered] == [lists[i] for i in order]
    assert [batch.tolist() for batch in flat.head(3)] == lists[:3]
    assert [batch.tolist() for batch in flat.followed_by(reordered)] == lists + [lists[i] for i in order]
    with pytest.raises(IndexError, match=f"batch {len(lists)} of {len(lists)}"):
        flat[len(lists)]
