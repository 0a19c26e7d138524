import json

import pytest

from mtmoe.errors import DataError
from mtmoe.evaluation import EvaluationSettings, compare, evaluate, report
from mtmoe.evaluation.report import comparison_markdown
from mtmoe.evaluation.test_sets import PreparedData


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes most of an evaluation this small; test_report.py draws."""
    monkeypatch.setattr(report, "plot_directions", lambda directions: None)


@pytest.fixture
def make_run(tmp_path, make_data):
    data = make_data(tmp_path / "data", repeat=5)

    def make(name, model, **settings):
        chosen = EvaluationSettings(**settings)
        evaluate(model, PreparedData(data), tmp_path / name, settings=chosen, model={"path": name}, decoding={})
        return tmp_path / name

    return make


def test_a_real_difference_is_found(make_run, fake_model):
    worse, better = make_run("a", fake_model(wrong=2)), make_run("b", fake_model())
    found = compare(worse, better, samples=300)
    one = found.directions["en-mk"]
    assert one.b == pytest.approx(100)
    assert one.difference == pytest.approx(one.b - one.a)
    assert one.difference > 5
    assert one.p_value < one.p_holm < 0.05
    assert one.stars
    assert found.over_directions["better"] == found.over_directions["significantly_better"] == 6
    assert found.over_directions["wilcoxon_p"] == pytest.approx(2 / 2**6)
    assert found.over_directions["interval_low"] > 0
    assert found.groups["all"]["all"]["difference"] == pytest.approx(found.over_directions["mean_difference"])
    assert found.groups["into_english"]["low"]["directions"] == 1
    back = compare(better, worse, samples=300)
    assert back.directions["en-mk"].difference == pytest.approx(-one.difference)
    assert back.over_directions["significantly_worse"] == 6


def test_no_difference_is_not_found(make_run, fake_model):
    found = compare(make_run("a", fake_model(wrong=3)), make_run("b", fake_model(wrong=3)))
    assert {one.p_value for one in found.directions.values()} == {1.0}
    assert not any(one.stars for one in found.directions.values())
    assert found.over_directions["wilcoxon_p"] == 1.0
    assert "is noise" in comparison_markdown(found)


def test_bleu_by_randomisation(make_run, fake_model):
    runs = make_run("a", fake_model(wrong=2)), make_run("b", fake_model())
    found = compare(*runs, metric="bleu", method="randomisation", samples=300)
    assert (found.metric, found.method, found.samples) == ("bleu", "randomisation", 300)
    assert any("tok:13a" in signature for signature in found.signatures)
    assert found.directions["en-mk"].stars
    scores = json.loads((runs[0] / "evaluation.json").read_text())["directions"]["en-mk"]
    assert found.directions["en-mk"].a == pytest.approx(scores["bleu"])


def test_scores_are_those_of_the_evaluation(make_run, fake_model):
    runs = make_run("a", fake_model(wrong=2)), make_run("b", fake_model(wrong=3))
    found = compare(runs[0] / "evaluation.json", runs[1], samples=20)
    for run, side in zip(runs, ("a", "b"), strict=True):
        for direction, row in json.loads((run / "evaluation.json").read_text())["directions"].items():
            assert getattr(found.directions[direction], side) == pytest.approx(row["chrf++"])


def test_markdown_and_json(make_run, fake_model):
    runs = make_run("a", fake_model(wrong=2)), make_run("b", fake_model(), directions=("en-de", "de-en"))
    found = compare(*runs, samples=50)
    text = comparison_markdown(found)
    assert "| en-de " in text
    assert "Only in A, not compared: de-mk, en-mk, mk-de, mk-en." in text
    assert "Wilcoxon p = 0.5000" in text
    assert json.loads(json.dumps(found.to_json()))["directions"]["en-de"]["difference"] > 0


def test_other_test_sets_are_refused(make_run, fake_model):
    whole, part = make_run("a", fake_model()), make_run("b", fake_model(), limit=4, directions=("en-de",))
    with pytest.raises(DataError, match=r"other test sets: en-de \(30 and 4 segments\)"):
        compare(whole, part)
    valid = make_run("c", fake_model(), split="valid", directions=("en-mk",))
    with pytest.raises(DataError, match=r"no direction is in both runs: .*c has en-mk"):
        compare(valid, part)


def test_missing_and_damaged_runs(make_run, fake_model, tmp_path):
    run = make_run("a", fake_model())
    with pytest.raises(DataError, match=r"evaluation\.json does not exist; it is what `mtmoe evaluate` writes"):
        compare(run, tmp_path)
    other = make_run("b", fake_model())
    path = other / "hypotheses" / "de-mk.txt"
    path.write_text("x\n")
    with pytest.raises(DataError, match=r"de-mk\.txt has 1 lines where evaluation\.json says 30"):
        compare(run, other, samples=10)
    path.unlink()
    with pytest.raises(DataError, match=r"de-mk\.txt does not exist, so significance cannot be tested"):
        compare(run, other, samples=10)
    (other / "evaluation.json").write_text('{"format": 2, "directions": {}}')
    with pytest.raises(DataError, match=r"not an evaluation of a format that this version reads"):
        compare(run, other)
    with pytest.raises(ValueError, match="metric='ter' is unknown"):
        compare(run, run, metric="ter")
