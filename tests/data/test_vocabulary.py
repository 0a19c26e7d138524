from collections import Counter

import numpy as np
import pytest

from mtmoe.data.recipe import Vocabulary
from mtmoe.data.vocabulary import dictionary_text, fairseq_ids, load_vocabulary, sample_sentences, train_vocabulary
from mtmoe.errors import DataError


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, (90, 10)), (1e9, (50, 50)), (2.0, (75, 25))])
def test_temperature(temperature, expected):
    sentences = {"de": [f"d{n}" for n in range(90)], "en": [f"e{n}" for n in range(10)], "fr": []}
    drawn = sample_sentences(sentences, Vocabulary(temperature=temperature))
    assert tuple(Counter(text[0] for text in drawn)[letter] for letter in "de") == expected
    repeats = Counter(text for text in drawn if text[0] == "e").values()
    assert max(repeats) - min(repeats) <= 1, "repeated evenly"
    assert drawn == sample_sentences(sentences, Vocabulary(temperature=temperature))
    assert len(sample_sentences(sentences, Vocabulary(temperature=temperature, sentences=20))) == 20


def write(folder, lines):
    for language in ("de", "en"):
        (folder / f"train.de-en.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_train_and_dictionary(tmp_path):
    write(tmp_path, [f"word{n} other{n % 7} thing" for n in range(100)])
    (tmp_path / "test.de-en.de").write_text("ξ" * 50 + "\n")
    models = []
    for name in ("a", "b"):
        train_vocabulary(
            tmp_path, [("de", "en")], Vocabulary(size=26, character_coverage=1.0), tmp_path / f"{name}.model"
        )
        models.append((tmp_path / f"{name}.model").read_bytes())
    assert models[0] == models[1], "the same model in every run"
    vocab = (tmp_path / "a.vocab").read_text().splitlines()
    assert len(vocab) == 26
    assert "ξ" not in "".join(vocab), "test text does not reach the vocabulary"
    processor = load_vocabulary(tmp_path / "a.model")
    table = fairseq_ids(processor)
    assert table[:4].tolist() == [3, 0, 2, 4]
    text = dictionary_text(processor, np.arange(27), ["en", "de"])
    lines = text.splitlines()
    assert lines[0] == f"{processor.id_to_piece(3)} 4"
    assert lines[-2:] == ["__de__ 1", "__en__ 1"]
    assert len(lines) == 23 + 2


def test_too_little_text(tmp_path):
    write(tmp_path, ["one two"])
    with pytest.raises(DataError, match=r"cannot make 5000 pieces of 2 sentences: .*Vocabulary size"):
        train_vocabulary(tmp_path, [("de", "en")], Vocabulary(size=5000), tmp_path / "m.model")
    write(tmp_path, [])
    with pytest.raises(DataError, match="nothing is left to train on"):
        train_vocabulary(tmp_path, [("de", "en")], Vocabulary(size=50), tmp_path / "m.model")


def test_byte_fallback(tmp_path):
    write(tmp_path, [f"word{n} thing" for n in range(100)])
    train_vocabulary(tmp_path, [("de", "en")], Vocabulary(size=280, byte_fallback=True), tmp_path / "m.model")
    processor = load_vocabulary(tmp_path / "m.model")
    assert processor.decode(processor.encode("ξ")) == "ξ"


def test_a_piece_like_a_tag_is_refused():
    class Processor:
        def get_piece_size(self):
            return 5

        def id_to_piece(self, number):
            return ["<unk>", "<s>", "</s>", "a", "__de__"][number]

    with pytest.raises(DataError, match="the text has __de__ so often"):
        dictionary_text(Processor(), np.zeros(6), ["de"])
