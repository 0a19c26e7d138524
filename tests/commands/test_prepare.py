from pathlib import Path

import pytest

from mtmoe.cli import main

SAMPLE = Path(__file__).parents[2] / "data" / "sample.yaml"


def test_prepare_prints_what_it_did(tmp_path, capsys):
    assert main(["prepare", str(SAMPLE), "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "de-en    200     20    25   245" in captured.out
    assert "3 pairs of 3 languages, 600 train sentence pairs, vocabulary 504" in captured.out
    assert "binarising, 3" in captured.err
    assert main(["prepare", str(SAMPLE), "--output", str(tmp_path / "out")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["prepare", str(SAMPLE), "-o", str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_errors_are_one_line(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\n")
    assert main(["prepare", str(recipe), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"mtmoe prepare: error: {recipe}: source: this key is missing")
    assert main(["prepare", str(SAMPLE), "--output", str(tmp_path / "out"), "--wheel", "x.whl"]) == 1
    assert "the recipe 'sample' reads none" in capsys.readouterr().err


def test_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", str(SAMPLE)])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["prepare", "--help"])
    assert caught.value.code == 0
    assert "mtmoe prepare data/quickstart.yaml" in capsys.readouterr().out
