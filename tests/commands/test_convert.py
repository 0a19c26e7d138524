"""`mtmoe convert`: from a checkpoint to a folder that translates the same."""

import pytest
import torch
from reference.fairseq_file import fairseq_state
from reference.models import DIRECTIONS, toy_model, toy_sentence, write_toy_vocabulary

from mtmoe.checkpoint.folder import FILES
from mtmoe.cli import main
from mtmoe.inference import Translator


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run, with one checkpoint of a random model."""
    data = write_toy_vocabulary(tmp_path / "run" / "data")
    (tmp_path / "run" / "checkpoints").mkdir()
    torch.save(fairseq_state(toy_model(data, moe=True)), tmp_path / "run" / "checkpoints" / "checkpoint_best.pt")
    return tmp_path / "run"


@pytest.mark.parametrize("given_as", ["run", "checkpoint"])
def test_the_folder_translates_as_the_checkpoint(run_folder, tmp_path, capsys, given_as):
    checkpoint = run_folder / "checkpoints" / "checkpoint_best.pt"
    path = run_folder if given_as == "run" else checkpoint
    assert main(["convert", str(path), "--output", str(tmp_path / "model")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'model'}: ")
    assert "parameters, languages de, en, mk" in captured.out
    assert captured.err == (f"mtmoe convert: using {checkpoint}\n" if given_as == "run" else "")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == sorted(FILES)
    texts = [toy_sentence(seed) for seed in range(6)]
    found = Translator.load(tmp_path / "model")
    assert found.directions == DIRECTIONS
    assert found.translate(texts, "en", "de") == Translator.load(checkpoint).translate(texts, "en", "de")
    assert main(["convert", str(tmp_path / "model"), "--output", str(tmp_path / "again")]) == 1
    assert "is a model folder already" in capsys.readouterr().err


def test_mistakes(run_folder, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no.pt"), "--output", str(tmp_path / "model")]) == 1
    assert "no.pt does not exist" in capsys.readouterr().err
    arguments = ["convert", str(run_folder), "--output", str(run_folder / "data")]
    assert main(arguments) == 1
    assert "exists and is no model folder; it is left as it is" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "model"), "--data", str(tmp_path)]) == 1
    assert "needs its prepared data" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2)])
def test_usage(arguments, code):
    with pytest.raises(SystemExit) as exit_:
        main(["convert", *arguments])
    assert exit_.value.code == code
