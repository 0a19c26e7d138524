import pytest

from mtmoe.errors import DataError
from mtmoe.evaluation.buckets import (
    Thresholds,
    aggregate,
    assign_buckets,
    families_of,
    group_directions,
    split_direction,
)


@pytest.mark.parametrize(
    ("pairs", "bucket"),
    [(0, "very_low"), (99_999, "very_low"), (100_000, "low"), (999_999, "low"), (1_000_000, "high")],
)
def test_edges(pairs, bucket):
    assert Thresholds().bucket(pairs) == bucket
    data = {"pairs": {"de-en": {"train": pairs}}}
    assert assign_buckets(["en-de", "de-en"], data, rule="absolute").of == {"en-de": bucket, "de-en": bucket}


def test_thresholds_are_a_setting():
    assert Thresholds(low=10, high=20).bucket(10) == "low"
    with pytest.raises(ValueError, match="low=20 and high=10"):
        Thresholds(low=20, high=10)


LARGE = {"pairs": {"de-en": {"train": 2_000_000}, "en-mk": {"train": 500}}, "resource": {"de": "low", "mk": "low"}}
SMALL = {"pairs": {"de-en": {"train": 10_000}, "en-hu": {"train": 4_999}, "en-mk": {"train": 499}}}


def test_auto_takes_the_published_thresholds_where_they_tell_apart():
    buckets = assign_buckets(["en-de", "mk-en"], LARGE)
    assert buckets.rule == "absolute"
    assert buckets.of == {"en-de": "high", "mk-en": "very_low"}


def test_auto_takes_the_recipe_for_a_small_corpus():
    data = {**SMALL, "resource": {"de": "high", "en": "high", "hu": "low", "mk": "very_low"}}
    buckets = assign_buckets(["en-de", "hu-en", "mk-hu"], data)
    assert buckets.rule == "data"
    assert buckets.of == {"en-de": "high", "hu-en": "low", "mk-hu": "very_low"}
    assert "recipe" in buckets.description


def test_auto_is_relative_without_either():
    buckets = assign_buckets(["en-de", "en-hu", "en-mk", "de-mk"], SMALL)
    assert buckets.rule == "relative"
    assert buckets.of == {"en-de": "high", "en-hu": "low", "en-mk": "very_low"}  # de-mk was not trained on
    assert "10,000 training pairs" in buckets.description


def test_given_thresholds_win_over_the_recipe():
    data = {**SMALL, "resource": {"de": "low"}}
    assert assign_buckets(["en-de"], data, thresholds=Thresholds(low=10, high=100)).of == {"en-de": "high"}


def test_bad_rules_and_levels():
    with pytest.raises(ValueError, match="rule='size' is unknown; choose one of: auto, absolute, data, relative"):
        assign_buckets([], {}, rule="size")
    with pytest.raises(DataError, match="needs 'resource'"):
        assign_buckets(["en-de"], SMALL, rule="data")
    with pytest.raises(DataError, match="resource levels medium"):
        assign_buckets(["en-de"], {"resource": {"de": "medium"}}, rule="data")
    with pytest.raises(DataError, match="not of the form"):
        split_direction("en_de")


def test_families():
    assert families_of("en-de") == ["all", "out_of_english"]
    assert families_of("sr_Latn-en") == ["all", "into_english"]
    assert families_of("de-fr") == ["all", "non_english"]


def test_low_holds_very_low():
    groups = group_directions(["en-de", "en-hu", "en-mk"], {"en-de": "high", "en-hu": "low", "en-mk": "very_low"})
    assert groups["all"] == {
        "all": ["en-de", "en-hu", "en-mk"],
        "high": ["en-de"],
        "low": ["en-hu", "en-mk"],
        "very_low": ["en-mk"],
    }
    assert list(groups) == ["all", "out_of_english"]


def test_means_count_each_direction_once():
    rows = {
        "en-de": {"chrf++": 60.0, "off_target": None, "sentences": 1000},
        "de-en": {"chrf++": 30.0, "off_target": 0.5, "sentences": 10},
    }
    means = aggregate(rows, {})
    assert means["all"]["all"] == {"directions": 2, "chrf++": 45.0, "off_target": 0.5}
    assert means["into_english"]["all"]["chrf++"] == 30.0
    assert aggregate(dict(reversed(rows.items())), {}) == means
