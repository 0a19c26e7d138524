"""The translator: order, empty and long texts, languages, formats, options."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.fairseq_file import fairseq_state
from reference.models import LANGUAGES, toy_model, toy_sentence

from mtmoe.checkpoint import LanguageSet
from mtmoe.checkpoint.folder import write_folder
from mtmoe.errors import CheckpointError, UnknownLanguage
from mtmoe.inference import Translator
from mtmoe.inference.translator import batches_by_tokens
from mtmoe.inference.vocabulary import Vocabulary, read_dictionary

TEXTS = [toy_sentence(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def translator(vocabulary):
    return Translator.from_stored(toy_model(vocabulary, moe=True))


def test_from_checkpoint_to_folder_to_translator(model, vocabulary, tmp_path):
    torch.save(fairseq_state(model, vocabulary), tmp_path / "checkpoint.pt")
    write_folder(tmp_path / "model", model)
    expected = Translator.from_stored(model).translate(TEXTS, "en", "de", beam=2)
    assert any(expected)
    for path in (tmp_path / "checkpoint.pt", tmp_path / "model", str(tmp_path / "model")):
        assert Translator.load(path).translate(TEXTS, "en", "de", beam=2) == expected


def test_keeps_order_and_empty_lines(translator):
    texts = ["", TEXTS[0], "  \t", TEXTS[1], "\u200b\ufeff\x00" * 0, TEXTS[0]]
    found = translator.translate(texts, "en", "de", beam=2)
    assert found[0] == found[2] == found[4] == ""
    assert found[1] == found[5] == translator.translate([TEXTS[0]], "en", "de", beam=2)[0] != ""
    assert found[3] == translator.translate([TEXTS[1]], "en", "de", beam=2)[0] != found[1]
    assert translator.translate([], "en", "de") == translator.translate([""], "en", "de")[1:] == []


@settings(max_examples=20)
@given(st.lists(st.text(max_size=20), max_size=5))
def test_takes_any_text_and_gives_one_line_each(translator, texts):
    found = translator.translate(texts, "en", "de", beam=1)
    assert len(found) == len(texts)
    for text, translation in zip(texts, found, strict=True):
        assert len(translation.splitlines()) <= 1
        assert text.strip() or not translation


@pytest.mark.parametrize("max_tokens", [1, 20, 100_000])
def test_batching_changes_nothing(translator, max_tokens):
    whole = translator.translate(TEXTS, "en", "mk", beam=2)
    assert translator.translate(TEXTS, "en", "mk", beam=2, max_tokens=max_tokens) == whole


def test_languages_and_tags_matter(translator):
    found = {target: tuple(translator.translate(TEXTS, "en", target, beam=1)) for target in ("de", "mk")}
    assert found["de"] != found["mk"]
    assert translator.translate(TEXTS, "eng_Latn", "deu_Latn", beam=1) == list(found["de"])
    assert translator.languages == LANGUAGES
    assert "en-de" in translator.directions


def test_never_produces_tags_or_unknown(translator, vocabulary):
    found = " ".join(translator.translate([toy_sentence(seed) for seed in range(40)], "en", "de", beam=2))
    assert "__" not in found
    assert "⁇" not in found
    assert "<" not in found


def test_tag_of_the_target_before_the_source(vocabulary):
    model = toy_model(vocabulary)
    source_tag = Translator.from_stored(model)
    languages = LanguageSet(model.languages.languages, model.languages.directions, "tgt")
    target_tag = Translator.from_stored(replace(model, languages=languages))
    assert source_tag.translate(TEXTS, "en", "de", beam=1) != target_tag.translate(TEXTS, "en", "de", beam=1)
    assert target_tag._encode(TEXTS[:1], "en", "de")[0][0] == target_tag.vocabulary.tags["de"]


@pytest.mark.parametrize(
    ("code", "text"),
    [("fr", "language 'fr' is not in this model; it knows: de, en, mk"), ("xx_Nope", "this model knows: de, en, mk")],
)
def test_unknown_language(translator, code, text):
    for source, target in ((code, "de"), ("en", code)):
        with pytest.raises(UnknownLanguage, match=text):
            translator.translate(TEXTS, source, target)


def test_warns_of_an_untrained_direction(translator, caplog):
    with caplog.at_level(logging.WARNING):
        translator.translate(TEXTS[:1], "de", "mk", beam=1)
    assert "de-mk is no direction that this model was trained on" in caplog.text


def test_a_long_text_is_cut_with_a_warning(translator, caplog):
    with caplog.at_level(logging.WARNING):
        found = translator.translate([TEXTS[0], TEXTS[1] * 50], "en", "de", beam=1)
    assert "1 of 2 texts were cut to the model's 62 source tokens" in caplog.text
    assert all(found)


def test_progress(translator):
    calls = []
    texts = ["", *TEXTS]
    translator.translate(texts, "en", "de", beam=1, max_tokens=40, progress=lambda *call: calls.append(call))
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (len(texts), len(texts))


def test_several_threads(translator):
    expected = translator.translate(TEXTS, "en", "de", beam=2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: translator.translate(TEXTS, "en", "de", beam=2), range(8)))
    assert all(texts == expected for texts in found)


def test_bfloat16(vocabulary):
    model = toy_model(vocabulary)
    found = Translator.from_stored(model, dtype="bfloat16")
    assert found.model.decoder.output.weight.dtype == torch.bfloat16
    assert len(found.translate(TEXTS, "en", "de")) == len(TEXTS)


def test_threads(vocabulary, tmp_path):
    write_folder(tmp_path / "model", toy_model(vocabulary))
    before = torch.get_num_threads()
    try:
        Translator.load(tmp_path / "model", threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "int3"}, "dtype='int3' is unknown; choose one of: float32, bfloat16"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"device": "abacus"}, "device='abacus' cannot be used"),
    ],
)
def test_load_options_out_of_range(vocabulary, tmp_path, options, text):
    write_folder(tmp_path / "model", toy_model(vocabulary))
    with pytest.raises(ValueError, match=text):
        Translator.load(tmp_path / "model", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"beam": 0}, "beam=0 must be at least 1"), ({"max_tokens": 0}, "max_tokens=0 must be at least 1")],
)
def test_options_out_of_range(translator, options, text):
    with pytest.raises(ValueError, match=text):
        translator.translate(TEXTS, "en", "de", **options)
    with pytest.raises(ValueError, match="texts must be a sequence of strings, not one string"):
        translator.translate("one", "en", "de")


def test_a_dictionary_of_another_model(vocabulary, tmp_path):
    model = toy_model(vocabulary)
    other = tmp_path / "dict.txt"
    other.write_text(model.dictionary.read_text() + "more 1\n")
    with pytest.raises(CheckpointError, match=r"makes \d+ entries .* but the model has \d+; is it another model's"):
        Translator.from_stored(replace(model, dictionary=other))
    other.write_text("\n".join(f"w{i} 1" for i in range(model.config.vocabulary_size - 4)))
    with pytest.raises(CheckpointError, match="lacks the tags of: de, en, mk"):
        Translator.from_stored(replace(model, dictionary=other))
    with pytest.raises(CheckpointError, match="is no SentencePiece model"):
        Translator.from_stored(replace(model, sentencepiece=other))


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"a 1\nb\n", r"line 2: expected an entry and its count, not 'b'"), (b"a 1\n\xff 2\n", "cannot be read")],
)
def test_a_broken_dictionary(tmp_path, content, text):
    (tmp_path / "dict.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        read_dictionary(tmp_path / "dict.txt")


def test_a_dictionary_with_every_kind_of_line(tmp_path):
    # U+0085 and U+2028 end lines for str.splitlines, but not in this format.
    (tmp_path / "dict.txt").write_text("▁a 10\n\x85 3\n\u2028 2\n__de__ 1\n<s> 1 #fairseq:overwrite", encoding="utf-8")
    assert read_dictionary(tmp_path / "dict.txt") == ["▁a", "\x85", "\u2028", "__de__", "<s>"]


def test_vocabulary_there_and_back(vocabulary):
    words = Vocabulary.load(vocabulary / "dict.txt", vocabulary / "spm.model", LANGUAGES)
    for text in TEXTS:
        assert words.decode(words.encode(text)) == text
    assert words.encode(" \n\t") == words.encode("") == []
    assert words.encode("ka\ntan") == words.encode("ka tan")
    assert words.frame([7, 8], "de") == [words.ids["__de__"], 7, 8, 2]
    assert 3 in words.encode("家")


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_each_item_once_and_keep_to_the_limit(lengths, max_tokens):
    batches = list(batches_by_tokens(lengths, range(len(lengths)), max_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens


def test_the_library_loads_without_fairseq(tmp_path):
    program = "import sys, mtmoe.inference; assert not {'fairseq', 'fairseq_plugins', 'fastapi'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(root)})
