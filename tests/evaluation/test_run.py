import json

import pytest

from mtmoe.errors import DataError
from mtmoe.evaluation import EvaluationSettings, evaluate, report, score_hypotheses
from mtmoe.evaluation.test_sets import PreparedData

SETTINGS = EvaluationSettings()


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes most of an evaluation this small; test_report.py draws."""
    monkeypatch.setattr(report, "plot_directions", lambda directions: None)


def run(model, data, output, settings=SETTINGS, fingerprint="m", beam=4, advance=None):
    return evaluate(
        model,
        PreparedData(data),
        output,
        settings=settings,
        model={"path": "model.pt", "fingerprint": fingerprint},
        decoding={"beam": beam},
        advance=advance,
    )


def test_a_perfect_model(data, tmp_path, fake_model):
    told = []
    result = run(fake_model(), data, tmp_path / "out", advance=told.append).result
    assert sum(told) == 36
    assert result == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["mean_chrf++"] == pytest.approx(100)
    assert list(result["directions"]) == ["de-en", "de-mk", "en-de", "en-mk", "mk-de", "mk-en"]
    row = result["directions"]["en-mk"]
    assert row["chrf++"] == pytest.approx(100)
    assert row["bleu"] == pytest.approx(100)
    assert (row["length_ratio"], row["sentences"], row["untranslated"]) == (1.0, 6, 0.0)
    assert row["copy_chrf++"] < 20
    assert (row["off_target"], row["off_target_judged"], row["off_target_unsure"]) == (0.0, 5, 1)
    assert (row["bucket"], row["training_pairs"]) == ("very_low", 300)
    assert result["buckets"]["rule"] == "data"
    assert result["groups"]["non_english"]["all"]["directions"] == 2
    assert result["groups"]["all"]["low"]["directions"] == 4
    assert "nw:2" in result["signatures"]["chrf++"]
    assert [set(names) for names in result["signatures"]["bleu"].values()] == [set(result["directions"])]
    assert result["data"]["fingerprint"] == "f" * 64
    assert result["model"]["fingerprint"] == "m"
    assert result["decoding"] == {"beam": 4}


def test_writes_everything(data, tmp_path, fake_model):
    run(fake_model(wrong=2), data, tmp_path / "out")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"evaluation.json", "evaluation.md", "evaluation.html", "samples.md"} < written
    assert {"hypotheses/en-mk.txt", "hypotheses/en-mk.json", "references/en-mk.txt"} < written
    assert not [name for name in written if ".tmp" in name]


def test_a_model_that_copies(data, tmp_path):
    result = run(lambda texts, *_: list(texts), data, tmp_path / "out").result
    for row in result["directions"].values():
        assert row["chrf++"] == row["copy_chrf++"]
        assert row["untranslated"] == pytest.approx(5 / 6)  # "OK" is right as it is
        assert row["off_target"] == 1.0


def test_goes_on_where_it_was_interrupted(data, tmp_path, fake_model):
    broken = fake_model(fail_at="en-mk")
    with pytest.raises(KeyboardInterrupt):
        run(broken, data, tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation.json").exists()
    second = fake_model()
    told = []
    result = run(second, data, tmp_path / "out", advance=told.append).result
    assert broken.asked == ["de-en", "de-mk", "en-de"]
    assert second.asked == ["en-mk", "mk-de", "mk-en"]
    assert sum(told) == 36
    whole = run(fake_model(), data, tmp_path / "whole").result
    for row in (*result["directions"].values(), *whole["directions"].values()):
        row.pop("seconds")
    assert result["directions"] == whole["directions"]


def test_another_model_beam_or_limit_decodes_again(data, tmp_path, fake_model):
    run(fake_model(), data, tmp_path / "out")
    for change in ({"fingerprint": "n"}, {"beam": 1}, {"settings": EvaluationSettings(limit=3)}):
        model = fake_model()
        run(model, data, tmp_path / "out", **change)
        assert len(model.asked) == 6
    unchanged = fake_model()
    run(unchanged, data, tmp_path / "out", settings=EvaluationSettings(limit=3))
    assert unchanged.asked == []


def test_chosen_directions_and_split(data, tmp_path, fake_model):
    settings = EvaluationSettings(split="valid", directions=("mk-de", "en-de"), samples=3)
    found = run(fake_model(), data, tmp_path / "out", settings)
    assert list(found.result["directions"]) == ["mk-de", "en-de"]
    assert found.result["directions"]["mk-de"]["sentences"] == 2
    assert found.result["data"]["split"] == "valid"
    assert len(found.samples) == 3


def test_given_outputs_score_as_decoded_ones(data, tmp_path, fake_model):
    decoded = run(fake_model(wrong=2), data, tmp_path / "out").result
    given = score_hypotheses(
        tmp_path / "out" / "hypotheses", PreparedData(data), tmp_path / "given", settings=SETTINGS, name="other"
    ).result
    for rows in (decoded, given):
        for row in rows["directions"].values():
            row.pop("seconds")
    assert given["directions"] == decoded["directions"]
    assert given["model"] == {"name": "other"}
    assert (tmp_path / "given" / "hypotheses" / "en-mk.txt").is_file()


def test_given_outputs_may_cover_some_directions(data, tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    with pytest.raises(DataError, match=r"no file for any direction .* names such as de-en\.txt"):
        score_hypotheses(folder, PreparedData(data), tmp_path / "given", settings=SETTINGS)
    (folder / "en-de.txt").write_text("x\n" * 6)
    result = score_hypotheses(folder, PreparedData(data), tmp_path / "given", settings=SETTINGS).result
    assert list(result["directions"]) == ["en-de"]
    (folder / "en-de.txt").write_text("x\n" * 5)
    with pytest.raises(DataError, match=r"en-de\.txt has 5 lines, the test set of en-de has 6"):
        score_hypotheses(folder, PreparedData(data), tmp_path / "given", settings=SETTINGS)
    with pytest.raises(DataError, match=r"mk-en\.txt does not exist"):
        settings = EvaluationSettings(directions=("mk-en",))
        score_hypotheses(folder, PreparedData(data), tmp_path / "given", settings=settings)
    with pytest.raises(DataError, match="is not a folder of hypotheses"):
        score_hypotheses(folder / "en-de.txt", PreparedData(data), tmp_path / "given", settings=SETTINGS)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"limit=-1 must be 0 \(all segments\) or more"):
        EvaluationSettings(limit=-1)
    with pytest.raises(ValueError, match="samples=-2 must be 0 or more"):
        EvaluationSettings(samples=-2)
