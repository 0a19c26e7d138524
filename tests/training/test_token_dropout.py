import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.training.token_dropout import drop_tokens, share_by_passes

PAD, END, UNKNOWN, TAG = 1, 2, 3, 9


def batch(rows, length=50):
    tokens = np.random.default_rng(1).integers(10, 99, size=(rows, length))
    tokens[:, 0] = TAG
    tokens[:, -2], tokens[:, -1] = END, PAD
    return tokens


@given(passes=st.floats(0.0, 100.0), scale=st.floats(0.1, 50.0))
def test_the_share_rises_with_the_passes_towards_one(passes, scale):
    assert 0.0 <= share_by_passes(passes, scale) <= share_by_passes(passes + 1.0, scale) <= 1.0
    assert share_by_passes(0.0, scale) == 0.0
    assert share_by_passes(passes, 0.0) == 1.0


def test_the_share_is_63_percent_after_one_scale():
    assert share_by_passes(5.0, 5.0) == pytest.approx(1 - 1 / np.e)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (1.0, -1.0)])
def test_negative_numbers_are_refused(values):
    with pytest.raises(ValueError, match="must not be negative"):
        share_by_passes(*values)


def test_tags_ends_and_padding_stay_and_rates_are_kept_by_sentence():
    tokens = batch(4000)
    rates = np.where(np.arange(4000) < 2000, 0.0, 0.3)
    dropped = drop_tokens(tokens, rates, (PAD, END), UNKNOWN, (1, 2, 3))
    changed = dropped != tokens
    assert (dropped[changed] == UNKNOWN).all()
    assert not changed[:2000].any()
    assert not changed[:, [0, -2, -1]].any()
    inner = changed[2000:, 1:-2]
    assert abs(inner.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / inner.size)
    assert tokens[0, 0] == TAG, "the batch itself is not changed"


def test_the_choice_is_a_function_of_the_key():
    tokens, rates = batch(8), np.full(8, 0.5)
    one = drop_tokens(tokens, rates, (PAD, END), UNKNOWN, (1, 7, 0, 0, 0))
    assert (one == drop_tokens(tokens, rates, (PAD, END), UNKNOWN, (1, 7, 0, 0, 0))).all()
    for key in ((2, 7, 0, 0, 0), (1, 8, 0, 0, 0), (1, 7, 1, 0, 0), (1, 7, 0, 1, 0), (1, 7, 0, 0, 1)):
        assert (one != drop_tokens(tokens, rates, (PAD, END), UNKNOWN, key)).any()
