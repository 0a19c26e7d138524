import pytest

from mtmoe.data.filters import fault_of
from mtmoe.data.recipe import Cleaning
from mtmoe.data.scripts import _NAMES, script_share
from mtmoe.languages import all_languages
from mtmoe.normalise import match_key


@pytest.mark.parametrize(
    ("texts", "languages", "expected"),
    [
        (("ein Haus", "a house"), ("de", "en"), ""),
        (("", "a house"), ("de", "en"), "empty"),
        (("ein Haus", ""), ("de", "en"), "empty"),
        (("x" * 401, "y" * 400), ("de", "en"), "too_long"),
        (("x" * 400, "y" * 400), ("de", "en"), ""),
        (("x" * 91, "y" * 10), ("de", "en"), "ratio"),
        (("x" * 90, "y" * 10), ("de", "en"), ""),
        (("A house!", "a  house"), ("de", "en"), "identical"),
        (("дом большой", "a house"), ("de", "en"), "wrong_script"),
        (("a house", "a big house"), ("mk", "en"), "wrong_script"),
        (("MQTT брокер", "MQTT broker"), ("mk", "en"), ""),
        (("123 !", "124 ?"), ("mk", "en"), ""),
        (("家を見る", "see the house"), ("ja", "en"), ""),
        (("カタカナー", "see the house"), ("ja", "en"), ""),
        (("ᏣᎳᎩ", "Cherokee"), ("chr", "en"), ""),
    ],
)
def test_each_filter(texts, languages, expected):
    assert fault_of(Cleaning(), texts, (match_key(texts[0]), match_key(texts[1])), languages) == expected


@pytest.mark.parametrize("texts", [("x" * 999, "y"), ("same", "same"), ("дом", "house")])
def test_filters_can_be_turned_off(texts):
    cleaning = Cleaning(max_characters=0, max_ratio=0, identical=False, min_script_share=0)
    assert fault_of(cleaning, texts, texts, ("de", "en")) == ""


def test_every_language_has_a_known_script():
    assert {row.script for row in all_languages()} <= set(_NAMES)


def test_script_share():
    assert script_share("abб", "Cyrl") == pytest.approx(1 / 3)
    assert script_share("ab б", "Latn") == pytest.approx(2 / 3)
    assert script_share("", "Latn") == 1.0
