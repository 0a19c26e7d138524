"""`mtmoe translate`: where text comes from and goes to, and what a mistake looks like."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference.fairseq_file import fairseq_state
from reference.models import toy_model, toy_sentence, write_toy_vocabulary

from mtmoe.checkpoint.folder import write_folder
from mtmoe.cli import main
from mtmoe.commands import translate
from mtmoe.inference import Translator

TEXTS = [toy_sentence(seed) for seed in range(5)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_toy_vocabulary(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="module")
def folder(vocabulary, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    write_folder(path, toy_model(vocabulary))
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return Translator.load(folder).translate(TEXTS, "en", "de")


class Input:
    """Standard input of some bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


def call(folder, *arguments) -> int:
    return main(["translate", "--model", str(folder), "--from", "en", "--to", "de", *map(str, arguments)])


def test_text_from_arguments(folder, expected, capsys):
    assert call(folder, *TEXTS) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == expected
    assert captured.err == ""


def test_flores_codes(folder, expected, capsys):
    main(["translate", TEXTS[0], "--model", str(folder), "--from", "eng_Latn", "--to", "deu_Latn"])
    assert capsys.readouterr().out == expected[0] + "\n"


def test_standard_input_to_file_in_chunks(folder, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(translate, "CHUNK", 2)
    monkeypatch.setattr(sys, "stdin", Input("\r\n".join([*TEXTS, "", "last"]).encode()))
    output = tmp_path / "new" / "out.txt"
    assert call(folder, "--output", output) == 0
    lines = output.read_text(encoding="utf-8").split("\n")
    assert lines[:5] == expected
    assert lines[5] == "" != lines[6]
    assert lines[7:] == [""]
    assert capsys.readouterr().out == ""


def test_file_in_file_out(folder, expected, tmp_path):
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    assert call(folder, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt") == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == expected


def test_checkpoint_and_run_folder(folder, vocabulary, expected, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint_last.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(fairseq_state(toy_model(vocabulary)), checkpoint)
    assert call(tmp_path / "run", "--data", vocabulary, *TEXTS) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == expected
    assert captured.err == f"mtmoe translate: using {checkpoint}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "fr"], "error: language 'fr' is not in this model; it knows: de, en, mk"),
        (["--to", "qq"], "this model knows: de, en, mk"),
        (["--model", "nowhere"], "error: nowhere does not exist; give a model folder, a checkpoint"),
        (["--beam", "0"], "error: beam=0 must be at least 1"),
        (["--device", "abacus"], "error: device='abacus' cannot be used"),
        (["--threads", "0"], "error: threads=0 must be at least 1"),
    ],
)
def test_mistakes(folder, capsys, arguments, text):
    assert call(folder, "hello", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mtmoe translate: error: ")
    assert text in captured.err
    assert captured.err.count("\n") == 1


def test_bad_input_keeps_an_old_output(folder, tmp_path, capsys):
    (tmp_path / "in.txt").write_bytes(b"good\nb\xffd\n")
    (tmp_path / "out.txt").write_text("old")
    assert call(folder, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt") == 1
    assert "in.txt, line 2: no valid UTF-8 at byte 2" in capsys.readouterr().err
    assert (tmp_path / "out.txt").read_text() == "old"
    assert call(folder, "--input", tmp_path / "no.txt") == 1
    assert "no.txt cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--model", "m", "--from", "en"], ["--dtype", "int3"]])
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["translate", *arguments])
    assert exit_.value.code == 2


def test_text_and_input_exclude_each_other(folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        call(folder, "text", "--input", "file")
    assert exit_.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["translate", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "--from LANG" in text
    assert 'mtmoe translate --model runs/demo --from en --to de "Open the file"' in text


def test_a_reader_that_leaves_early(folder):
    root = Path(__file__).parents[2]
    command = f"yes ka | {sys.executable} -m mtmoe translate --model {folder} --from en --to de --beam 1 | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
