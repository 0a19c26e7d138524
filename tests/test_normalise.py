import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.normalise import match_key, normalise


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("  a \t b\u00a0c\u3000 ", "a b c"),
        ("e\u0301", "é"),
        ("a\x00b\x07c\ufeff", "abc"),
        ("e\x00\u0301", "é"),
        ("a \x01 b", "a b"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\ud800x", "x"),
        ("a\u2028b\x85c", "a b c"),
        ("", ""),
    ],
)
def test_normalise(given_text, expected):
    assert normalise(given_text) == expected


@given(st.text())
def test_normalise_is_idempotent_and_fits_a_line(text):
    once = normalise(text)
    assert normalise(once) == once == once.strip()
    assert unicodedata.is_normalized("NFC", once)
    assert len(once.splitlines()) <= 1
    once.encode("utf-8")


def test_match_key():
    assert match_key("Hello,  World!") == match_key("hello world") == "helloworld"
    assert match_key("ﬁ STRASSE") == match_key("fi straße")
    assert match_key("!?") == "!?"
    assert match_key("é") != match_key("e")


@given(st.text(st.characters(codec="utf-8")))
def test_match_key_keeps_letters_digits_and_marks_only(text):
    folded = unicodedata.normalize("NFKC", text).casefold()
    expected = "".join(c for c in folded if unicodedata.category(c)[0] in "LNM") or text
    assert match_key(text) == expected
