from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtmoe.data.clean import Cleaner, read_sides, write_clean_text
from mtmoe.data.recipe import Cleaning, Input, Part, Recipe
from mtmoe.data.rows import Row
from mtmoe.normalise import match_key


def recipe(**changes):
    source = Input(type="moses", paths=("a", "b"), languages=("de", "en"))
    cleaning = changes.pop("cleaning", Cleaning(identical=False, min_script_share=0, max_ratio=0))
    return Recipe(
        name="x", source="", licence="", languages=("de", "en", "fr"), inputs=(source,), cleaning=cleaning, **changes
    )


def clean(rows, **changes):
    """The pairs kept, by split and language pair, and the counts."""
    cleaner = Cleaner(recipe(**changes))
    evaluation = cleaner.evaluation(rows)
    kept = {
        (split, pair): [one.texts for one in candidates]
        for split, pairs in evaluation.sets.items()
        for pair, candidates in pairs.items()
    }
    for pair, texts in cleaner.train(rows, evaluation):
        kept.setdefault(("train", pair), []).append(texts)
    return kept, cleaner.counts


sentences = st.sampled_from(["Go!", "go", "GO", "Stop", "stop.", "wait", "Wait…", "now", "a b", "ab", "!", "?", ""])
rows_strategy = st.lists(
    st.builds(
        lambda split, languages, a, b: Row(split, *languages, a, b),
        st.sampled_from(["train", "valid", "test", "auto"]),
        st.permutations(["de", "en", "fr"]).map(lambda order: order[:2]),
        sentences,
        sentences,
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(rows=rows_strategy, duplicates=st.sampled_from(["normalised", "exact", "keep"]), limit=st.none() | st.just(1))
def test_nothing_leaks_between_splits_in_any_pair(rows, duplicates, limit):
    cleaning = Cleaning(identical=False, min_script_share=0, max_ratio=0, duplicates=duplicates)
    kept, counts = clean(rows, cleaning=cleaning, test=Part(limit=limit))
    keys = {"train": set(), "valid": set(), "test": set()}
    for (split, pair), texts in kept.items():
        for sides in texts:
            keys[split] |= {(language, match_key(text)) for language, text in zip(pair, sides, strict=True)}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["valid"]
    assert not keys["valid"] & keys["test"]
    assert sum(counter["read"] for pair in counts.values() for counter in pair.values()) == len(rows)
    for name, splits in counts.items():
        for split, counter in splits.items():
            reasons = sum(number for reason, number in counter.items() if reason != "read")
            assert reasons == counter["read"], "each pair read is either kept or dropped for one reason"
            assert counter["kept"] == len(kept.get((split, tuple(name.split("-"))), []))


def test_overlap_counts_in_any_pair_but_only_in_its_language():
    rows = [
        Row("test", "de", "en", "Hallo", "Hello"),
        Row("train", "de", "fr", "hallo!", "Salut"),
        Row("train", "en", "fr", "Hallo", "Bonjour"),
        Row("valid", "en", "fr", "hello", "Salut"),
        Row("valid", "en", "fr", "Bye", "Au revoir"),
        Row("train", "de", "fr", "Tschüss", "au revoir"),
    ]
    kept, counts = clean(rows)
    assert kept == {
        ("test", ("de", "en")): [("Hallo", "Hello")],
        ("valid", ("en", "fr")): [("Bye", "Au revoir")],
        ("train", ("en", "fr")): [("Hallo", "Bonjour")],
    }
    assert counts["de-fr"]["train"] == Counter(read=2, in_test=1, in_valid=1)
    assert counts["en-fr"]["valid"]["in_test"] == 1


def test_sides_are_put_in_alphabetical_order():
    kept, _ = clean([Row("train", "en", "de", "Hello", "Hallo")])
    assert kept == {("train", ("de", "en")): [("Hallo", "Hello")]}


@pytest.mark.parametrize(("duplicates", "left"), [("normalised", 1), ("exact", 2), ("keep", 3)])
def test_duplicates(duplicates, left):
    rows = [Row("train", "de", "en", *texts) for texts in (("Geh", "Go"), ("geh!", "go"), ("Geh", " Go "))]
    kept, counts = clean(rows, cleaning=Cleaning(duplicates=duplicates))
    assert len(kept["train", ("de", "en")]) == left
    assert counts["de-en"]["train"]["duplicate"] == 3 - left


def test_single_reference_keeps_the_most_frequent_translation():
    translations = ["Öffnen", "Offen", "Offen", "Auf", "Auf"]
    rows = [Row("test", "de", "en", text, "Open") for text in translations]
    rows += [Row("test", "de", "en", "Zu", "Closed"), Row("train", "de", "en", "öffnen", "Open it")]
    kept, counts = clean(rows, cleaning=Cleaning(duplicates="exact"), test=Part(single_reference="en"))
    assert kept == {("test", ("de", "en")): [("Auf", "Open"), ("Zu", "Closed")]}, "a tie goes by the alphabet"
    assert counts["de-en"]["test"]["second_reference"] == 2
    assert counts["de-en"]["train"]["in_test"] == 1, "what single_reference leaves out stays out of train"


def test_a_pair_may_have_a_limit_of_its_own(tmp_path):
    rows = [Row(split, "de", code, f"{split} {n}", f"{split} {n} {code}")
            for split in ("train", "test") for code in ("en", "fr") for n in range(9)]  # fmt: skip
    own = {"de-en": 2}
    changes = {"train": Part(limit=4, limits=own), "test": Part(limits={"en-de": 3})}
    cleaner = Cleaner(recipe(**changes))
    write_clean_text(cleaner.recipe, lambda: rows, cleaner.evaluation(rows), cleaner, tmp_path)
    sizes = {
        (split, code): len(read_sides(tmp_path, split, ("de", code))[0])
        for split in ("train", "test") for code in ("en", "fr")
    }  # fmt: skip
    assert sizes == {("train", "en"): 2, ("train", "fr"): 4, ("test", "en"): 3, ("test", "fr"): 9}


def test_limits_choose_by_hash_whatever_the_order(tmp_path):
    rows = [Row(split, "de", "en", f"{split} {n}", f"{split} {n} en") for split in ("train", "test") for n in range(30)]
    changes = {"test": Part(limit=5), "train": Part(limit=7)}
    chosen = []
    for order, name in ((rows, "a"), (rows[::-1], "b")):
        cleaner = Cleaner(recipe(**changes))
        evaluation = cleaner.evaluation(order)
        write_clean_text(cleaner.recipe, lambda order=order: order, evaluation, cleaner, tmp_path / name)
        chosen.append({split: read_sides(tmp_path / name, split, ("de", "en"))[0] for split in ("train", "test")})
        assert cleaner.counts["de-en"]["train"] == Counter(read=30, kept=7, over_limit=23)
        assert cleaner.counts["de-en"]["test"] == Counter(read=30, kept=5, over_limit=25)
    assert {split: sorted(texts) for split, texts in chosen[0].items()} == {
        split: sorted(texts) for split, texts in chosen[1].items()
    }
    numbers = [int(text.split()[1]) for text in chosen[0]["test"]]
    assert numbers == sorted(numbers), "in the order they came"
    assert numbers != list(range(5)), "not simply the first"


def test_auto_split_goes_by_the_english_side():
    rows = [Row("auto", "en", other, f"sentence {n}", f"{other} {n}") for other in ("de", "fr") for n in range(500)]
    kept, _ = clean(rows)
    english = {}
    for (split, pair), texts in kept.items():
        english[split, pair] = {sides[pair.index("en")] for sides in texts}
    for split in ("train", "valid", "test"):
        assert english[split, ("de", "en")] == english[split, ("en", "fr")]
        assert english[split, ("de", "en")]
