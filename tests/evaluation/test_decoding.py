import logging

import pytest

from mtmoe.errors import DataError
from mtmoe.evaluation.decoding import HypothesisStore, decode
from mtmoe.evaluation.test_sets import TestSet

TEST_SET = TestSet("en-de", ["one", "two"], ["eins", "zwei"])
MADE_BY = {"model": "m", "decoding": {"beam": 4}}


def upper(texts, source, target, advance):
    return [text.upper() for text in texts]


def never(texts, source, target, advance):
    raise AssertionError("decoded again")


def test_outputs_are_kept_and_used_again(tmp_path):
    first = decode(TEST_SET, upper, HypothesisStore(tmp_path, MADE_BY), lambda segments: None)
    again = decode(TEST_SET, never, HypothesisStore(tmp_path, MADE_BY), lambda segments: None)
    assert (first.outputs, first.reused) == (["ONE", "TWO"], False)
    assert (again.outputs, again.reused) == (["ONE", "TWO"], True)
    assert again.seconds == pytest.approx(first.seconds, abs=1e-3)
    assert (tmp_path / "en-de.txt").read_text() == "ONE\nTWO\n"


@pytest.mark.parametrize(
    ("made_by", "test_set"),
    [
        ({**MADE_BY, "model": "other"}, TEST_SET),
        ({**MADE_BY, "decoding": {"beam": 1}}, TEST_SET),
        (MADE_BY, TestSet("en-de", ["one", "three"], ["eins", "drei"])),
        (MADE_BY, TestSet("en-de", ["one"], ["eins"])),
    ],
)
def test_outputs_of_anything_else_are_not_used(tmp_path, made_by, test_set):
    decode(TEST_SET, upper, HypothesisStore(tmp_path, MADE_BY), lambda segments: None)
    assert HypothesisStore(tmp_path, made_by).load(test_set) is None


def test_other_references_do_not_matter(tmp_path):
    decode(TEST_SET, upper, HypothesisStore(tmp_path, MADE_BY), lambda segments: None)
    assert HypothesisStore(tmp_path, MADE_BY).load(TestSet("en-de", ["one", "two"], ["x", "y"])) is not None


@pytest.mark.parametrize("damage", ["ONE\n", "ONE\nTWO\nTHREE\n", "ONE\nTOO\n", None])
def test_damaged_outputs_are_decoded_again(tmp_path, damage, caplog):
    store = HypothesisStore(tmp_path, MADE_BY)
    decode(TEST_SET, upper, store, lambda segments: None)
    if damage is None:
        (tmp_path / "en-de.json").write_text("{")
    else:
        (tmp_path / "en-de.txt").write_text(damage)
    with caplog.at_level(logging.INFO):
        assert decode(TEST_SET, upper, store, lambda segments: None).outputs == ["ONE", "TWO"]
    assert "decoding en-de again" in caplog.text


def test_every_segment_is_told_once(tmp_path):
    told = []

    def reports_some(texts, source, target, advance):
        advance(1)
        return list(texts)

    store = HypothesisStore(tmp_path, MADE_BY)
    decode(TEST_SET, reports_some, store, told.append)
    assert sum(told) == 2
    decode(TEST_SET, never, store, told.append)
    assert sum(told) == 4


def test_line_breaks_do_not_shift_lines(tmp_path):
    def broken(texts, source, target, advance):
        return ["a\nb", ""]

    store = HypothesisStore(tmp_path, MADE_BY)
    assert decode(TEST_SET, broken, store, lambda segments: None).outputs == ["a b", ""]
    assert decode(TEST_SET, never, store, lambda segments: None).outputs == ["a b", ""]


def test_a_model_that_loses_segments(tmp_path):
    with pytest.raises(DataError, match="1 translations for 2 segments of en-de"):
        decode(TEST_SET, lambda *_: ["x"], HypothesisStore(tmp_path, MADE_BY), lambda segments: None)
    assert not list(tmp_path.iterdir())
