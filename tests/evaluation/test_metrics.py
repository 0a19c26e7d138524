import json
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import DataError
from mtmoe.evaluation import metrics

HYPOTHESES = [
    "The cat sits on the mat.",
    "A dog barks loudly",
    "",
    "It is 12.5 % more expensive, isn't it?",
    "¿Qué tal?",
]
REFERENCES = [
    "The cat sat on the mat.",
    "The dog barks loudly.",
    "Nothing",
    "It's 12.5 % dearer, isn't it?",
    "¿Qué tal?",
]
SOURCES = ["Die Katze sitzt.", "Ein Hund bellt.", "Nichts", "Es ist 12,5 % teurer, oder?", "¿Qué tal?"]

segments = st.lists(
    st.tuples(st.text("ab .", max_size=8), st.text("ab .", min_size=1, max_size=8)), min_size=1, max_size=8
)


@pytest.mark.parametrize("target", ["en", "zh_Hant"])
def test_scores_are_those_of_the_sacrebleu_command(tmp_path, target):
    for name, lines in (("hyp", HYPOTHESES), ("ref", REFERENCES)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-m", "bleu", "chrf", "--chrf-word-order", "2"]
    command += ["-w", "10", "-f", "json", "--tokenize", "zh" if target == "zh_Hant" else "13a"]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    bleu, chrf = json.loads(printed)
    scores = metrics.score(SOURCES, HYPOTHESES, REFERENCES, target)
    assert scores.chrf == pytest.approx(chrf["score"], abs=1e-9)
    assert scores.bleu == pytest.approx(bleu["score"], abs=1e-9)
    assert (scores.chrf_signature, scores.bleu_signature) == (chrf["signature"], bleu["signature"])
    assert "nw:2" in scores.chrf_signature


def test_identical_text_scores_100():
    scores = metrics.score(SOURCES, REFERENCES, REFERENCES, "en")
    assert (scores.chrf, scores.length_ratio, scores.untranslated) == (pytest.approx(100), 1.0, 0.0)
    assert scores.bleu == pytest.approx(100)


@given(segments, st.randoms(use_true_random=False))
def test_order_of_segments_is_irrelevant(pairs, chance: random.Random):
    shuffled = chance.sample(pairs, len(pairs))
    first, second = (
        metrics.score([o for o, _ in some], [o for o, _ in some], [r for _, r in some], "en")
        for some in (pairs, shuffled)
    )
    assert first == second


def test_copies_count_only_where_the_reference_is_another_text():
    sources = ["Save", "PostgreSQL", "Open  the file", "Quit"]
    outputs = ["save", "PostgreSQL", "Open the File", "Beenden"]
    references = ["Speichern", "PostgreSQL", "Datei öffnen", "Beenden"]
    scores = metrics.score(sources, outputs, references, "de")
    assert scores.untranslated == 0.5
    assert scores.copy_chrf < scores.chrf
    copied = metrics.score(sources, sources, references, "de")
    assert copied.chrf == copied.copy_chrf == scores.copy_chrf


def test_length_ratio_counts_tokens():
    assert metrics.score(["x"], ["a b c d e f"], ["a b c d"], "en").length_ratio == 1.5


@pytest.mark.parametrize(
    ("target", "installed", "expected"),
    [
        ("de", False, "13a"),
        ("sr_Latn", False, "13a"),
        ("zh", False, "zh"),
        ("zh_Hant", False, "zh"),
        ("ja", True, "ja-mecab"),
        ("ja", False, "char"),
        ("ko", True, "ko-mecab"),
        ("ko", False, "char"),
        ("th", False, "char"),
    ],
)
def test_tokeniser_follows_language_and_what_is_installed(monkeypatch, target, installed, expected):
    monkeypatch.setattr(metrics, "find_spec", lambda name: object() if installed else None)
    metrics.bleu_tokeniser.cache_clear()
    try:
        assert metrics.bleu_tokeniser(target) == expected
    finally:
        metrics.bleu_tokeniser.cache_clear()


def test_japanese_scores_without_mecab_say_so(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    metrics.bleu_tokeniser.cache_clear()
    try:
        scores = metrics.score(["x"], ["猫は座る"], ["猫が座る"], "ja")
    finally:
        metrics.bleu_tokeniser.cache_clear()
    assert "tok:char" in scores.bleu_signature
    assert scores.length_ratio == 1.0


def test_wrong_sizes_and_names_are_told():
    with pytest.raises(DataError, match="2 sources, 1 outputs and 2 references"):
        metrics.score(["a", "b"], ["a"], ["a", "b"], "en")
    with pytest.raises(DataError, match="nothing to score"):
        metrics.score([], [], [], "en")
    with pytest.raises(ValueError, match=r"metric='ter' is unknown; choose one of: chrf\+\+, bleu"):
        metrics.build_metric("ter", "en")
