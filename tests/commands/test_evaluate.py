import json
from pathlib import Path

import pytest

from mtmoe.cli import main
from mtmoe.commands import evaluate

TEXT = {
    "en": ["Open the file", "Save all the changes", "The window is closed", "Please try again later"],
    "de": ["Öffne die Datei", "Speichere alle Änderungen", "Das Fenster ist zu", "Bitte später noch einmal versuchen"],
}


class FakeTranslator:
    """Stands in for the model: translates by table, and remembers how it was loaded and asked."""

    loaded: list = []
    asked: list = []

    @classmethod
    def load(cls, path, *, data=None, device="cpu", dtype="float32", threads=None):
        cls.loaded.append((Path(path), Path(data), device, dtype, threads))
        return cls()

    def translate(self, texts, source, target, *, beam, max_tokens, length_penalty, progress):
        self.asked.append((source, target, beam, max_tokens, length_penalty))
        if beam < 1:
            raise ValueError(f"beam={beam} must be at least 1")
        table = dict(zip(TEXT[source], TEXT[target], strict=True))
        for done in range(1, len(texts) + 1):
            progress(done, len(texts))
        return [table[text] for text in texts]


@pytest.fixture
def run_folder(tmp_path):
    """A training run with a checkpoint that only the fake can load."""
    data = tmp_path / "run" / "data"
    (data / "text").mkdir(parents=True)
    (data / "languages.json").write_text(json.dumps({"languages": ["de", "en"], "directions": ["de-en", "en-de"]}))
    description = {"recipe": "tiny", "fingerprint": "f", "pairs": {"de-en": {"train": 100_000}}}
    (data / "data.json").write_text(json.dumps(description))
    for language, lines in TEXT.items():
        (data / "text" / f"test.de-en.{language}").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "checkpoint_best.pt").write_bytes(b"weights")
    return tmp_path / "run"


@pytest.fixture
def fake_translator(monkeypatch):
    monkeypatch.setattr("mtmoe.inference.Translator", FakeTranslator)
    monkeypatch.setattr("mtmoe.evaluation.report.plot_directions", lambda directions: None)  # it takes most of the time
    monkeypatch.setattr(FakeTranslator, "loaded", [])
    monkeypatch.setattr(FakeTranslator, "asked", [])
    return FakeTranslator


def test_a_run_is_evaluated_in_its_own_folder(run_folder, fake_translator, capsys):
    assert main(["evaluate", str(run_folder), "--beam", "2", "--samples", "2"]) == 0
    checkpoint = run_folder / "checkpoints" / "checkpoint_best.pt"
    assert fake_translator.loaded == [(checkpoint, run_folder / "data", "cpu", "float32", None)]
    assert fake_translator.asked == [("de", "en", 2, 2048, 1.0), ("en", "de", 2, 2048, 1.0)]
    result = json.loads((run_folder / "evaluation.json").read_text())
    assert result["mean_chrf++"] == pytest.approx(100)
    assert result["model"]["fingerprint"] == evaluate.fingerprint(checkpoint)
    assert result["decoding"]["beam"] == 2
    assert "length_limit" in result["decoding"]
    captured = capsys.readouterr()
    assert "| de-en " in captured.out
    assert "| into English" in captured.out
    assert captured.out.count("  reference  ") == 2
    assert "8/8" in captured.err


def test_started_again_it_decodes_what_is_missing(run_folder, fake_translator):
    assert main(["evaluate", str(run_folder)]) == 0
    (run_folder / "hypotheses" / "en-de.txt").unlink()
    fake_translator.asked.clear()
    assert main(["evaluate", str(run_folder)]) == 0
    assert [one[:2] for one in fake_translator.asked] == [("en", "de")]
    (run_folder / "checkpoints" / "checkpoint_best.pt").write_bytes(b"other weights")
    fake_translator.asked.clear()
    assert main(["evaluate", str(run_folder)]) == 0
    assert len(fake_translator.asked) == 2


def test_directions_by_any_code(run_folder, fake_translator, tmp_path):
    arguments = ["--directions", "eng_Latn-deu_Latn", "--limit", "3", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(run_folder), *arguments]) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(result["directions"]) == ["en-de"]
    assert result["directions"]["en-de"]["sentences"] == 3
    assert not (run_folder / "evaluation.json").exists()


def test_thresholds(run_folder, fake_translator):
    assert main(["evaluate", str(run_folder), "--thresholds", "1000,100000"]) == 0
    result = json.loads((run_folder / "evaluation.json").read_text())
    assert result["directions"]["en-de"]["bucket"] == "high"
    assert result["buckets"]["rule"] == "absolute"


def test_given_hypotheses_need_no_model(run_folder, tmp_path, capsys):
    folder = tmp_path / "google"
    folder.mkdir()
    (folder / "en-de.txt").write_text("".join(f"{line}\n" for line in TEXT["de"]))
    assert main(["evaluate", "--hypotheses", str(folder), "--data", str(run_folder / "data")]) == 0
    result = json.loads((tmp_path / "google-evaluation" / "evaluation.json").read_text())
    assert list(result["directions"]) == ["en-de"]
    assert result["mean_chrf++"] == pytest.approx(100)
    assert [path.name for path in folder.iterdir()] == ["en-de.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a MODEL to decode with or --hypotheses DIR"),
        (["{run}", "--hypotheses", "{run}"], "give either a MODEL"),
        (["--hypotheses", "{run}"], "--hypotheses needs --data"),
        (["{run}/nothing"], "nothing does not exist"),
        (["{run}", "--data", "{run}/nothing"], "name the folder with --data"),
        (["{run}", "--directions", "en-fr"], "no test text for en-fr; it has: de-en, en-de"),
        (["{run}", "--directions", "en-xxx"], "language 'xxx' is unknown"),
        (["{run}", "--directions", ","], "no direction was named"),
        (["{run}", "--split", "valid"], "no valid text for any direction"),
        (["{run}", "--limit", "-3"], "limit=-3 must be 0 (all segments) or more"),
        (["{run}", "--thresholds", "many"], "--thresholds many is not LOW,HIGH"),
        (["{run}", "--thresholds", "5,2"], "must satisfy 0 < low <= high"),
        (["{run}", "--beam", "0"], "beam=0 must be at least 1"),
    ],
)
def test_errors_are_a_line_and_status_1(run_folder, fake_translator, capsys, arguments, message):
    assert main(["evaluate", *(word.format(run=run_folder) for word in arguments)]) == 1
    error = capsys.readouterr().err
    assert "mtmoe evaluate: error: " in error
    assert message in error
    assert not (run_folder / "evaluation.json").exists()


def test_fingerprint_sees_names_and_content(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = evaluate.fingerprint(folder)
    (folder / "config.json").rename(folder / "other.json")
    second = evaluate.fingerprint(folder)
    (folder / "other.json").write_text("[]")
    assert len({first, second, evaluate.fingerprint(folder)}) == 3


def test_fingerprint_of_a_large_file_reads_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "WHOLE_FILE", 8)
    monkeypatch.setattr(evaluate, "END", 2)
    path = tmp_path / "model.pt"
    path.write_bytes(b"0123456789")
    first = evaluate.fingerprint(path)
    assert first == evaluate.fingerprint(path)
    path.write_bytes(b"0123456780")
    assert first != evaluate.fingerprint(path)
