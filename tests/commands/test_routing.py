"""`mtmoe routing` from a model folder to a file, and the sum of two files."""

import json

import numpy as np
import pytest
from reference.models import DIRECTIONS, toy_model, toy_sentence, toy_translation, write_toy_vocabulary

from mtmoe.checkpoint.folder import write_folder
from mtmoe.cli import main
from mtmoe.routing_table import RoutingTable


@pytest.fixture
def data(tmp_path):
    folder = write_toy_vocabulary(tmp_path / "data")
    (folder / "data.json").write_text(json.dumps({"format": 1, "pairs": {}}))
    (folder / "text").mkdir()
    for pair in ("de-en", "en-mk"):
        sources = [toy_sentence(seed) for seed in range(6)]
        for language, lines in zip(pair.split("-"), (sources, map(toy_translation, sources)), strict=True):
            (folder / "text" / f"valid.{pair}.{language}").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def model(data, tmp_path):
    write_folder(tmp_path / "model", toy_model(data, moe=True))
    return tmp_path / "model"


def test_parts_add_up_to_the_whole(model, data, tmp_path, capsys):
    def count(name, *options):
        words = ["routing", str(model), "--data", str(data), "--output", str(tmp_path / name), *options]
        assert main(words) == 0
        return RoutingTable.load(tmp_path / name)

    whole = count("whole.json")
    printed = capsys.readouterr().out
    assert "| encoder 1 |" in printed
    assert "to the shared network" in printed
    assert whole.rows == DIRECTIONS
    assert whole.sentences == (6, 6, 6, 6)
    count("a.json", "--directions", "de-en,mk-en")
    count("b.json", "--directions", "en-de,en-mk")
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert main(["routing", "--merge", *files, "--output", str(tmp_path / "sum.json")]) == 0
    merged = RoutingTable.load(tmp_path / "sum.json")
    assert merged.model == whole.model
    for row, direction in enumerate(whole.rows):
        for mine, theirs in zip(whole.layers, merged.layers, strict=True):
            other = merged.rows.index(direction)
            np.testing.assert_array_equal(mine.first[row], theirs.first[other])
            np.testing.assert_allclose(mine.probability[row], theirs.probability[other], rtol=1e-4)


def test_by_language_and_with_data_as_second_word(model, data, tmp_path, capsys):
    output = tmp_path / "languages.json"
    assert main(["routing", str(model), str(data), "--by", "language", "--output", str(output)]) == 0
    assert RoutingTable.load(output).rows == ("de-*", "en-*", "mk-*", "*-de", "*-en", "*-mk")
    assert "busiest, x even" in capsys.readouterr().out


def test_errors(model, data, tmp_path, capsys):
    output = ["--output", str(tmp_path / "x.json")]
    for words, message in (
        ([], "give either a MODEL"),
        ([str(model)], "needs DATA, once"),
        ([str(model), str(data), "--data", str(data)], "needs DATA, once"),
        ([str(model), "--data", str(data), "--limit", "-1"], "limit=-1 must be"),
        ([str(model), "--data", str(data), "--directions", "de-mk"], "no valid text for de-mk"),
    ):
        assert main(["routing", *words, *output]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_dense_model_has_no_routing(data, tmp_path, capsys):
    write_folder(tmp_path / "dense", toy_model(data))
    words = ["routing", str(tmp_path / "dense"), "--data", str(data), "--output", str(tmp_path / "x.json")]
    assert main(words) == 1
    assert "the model is dense" in capsys.readouterr().err
