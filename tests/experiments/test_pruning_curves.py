"""The pruning experiment on a toy model: its plan, that it goes on where it stopped, and its figures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from reference.models import DIRECTIONS, toy_model, toy_sentence, toy_translation, write_toy_vocabulary
from reference.routing import table_for

from mtmoe.checkpoint.folder import write_folder
from mtmoe.checkpoint.pruning import experts_of
from mtmoe.errors import ConfigError
from mtmoe.evaluation.test_sets import TestSet
from mtmoe.experiments import pruning_curves
from mtmoe.experiments.pruning_curves import FULL, Curve, CurveSettings, PruningCurves
from mtmoe.experiments.pruning_report import markdown_report, plot_losses
from mtmoe.moe import MoEConfig

ROOT = Path(__file__).parents[2]
EXPERTS = MoEConfig(d_model=16, d_ffn=24, num_experts=8, top_k=2)
DATA = {
    one: TestSet(one, [toy_sentence(seed) for seed in range(5)], [toy_translation(toy_sentence(s)) for s in range(5)])
    for one in DIRECTIONS
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_toy_vocabulary(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def translated(monkeypatch):
    """In the place of translation: as many first words of the reference as experts are left; counts the calls."""
    calls = []

    def stub(model, test_sets, **options):
        left = sum(experts_of(model.config).values())
        calls.append((left, [one.direction for one in test_sets]))
        return {
            one.direction: [" ".join(text.split()[: left - 3]) or "-" for text in one.references] for one in test_sets
        }

    monkeypatch.setattr(pruning_curves, "translate_sets", stub)
    return calls


def curves_of(vocabulary, folder, **changes):
    model = toy_model(vocabulary, moe=True, encoder_moe=EXPERTS, decoder_moe=EXPERTS)
    options = {"directions": ("de-en", "en-de"), "removed": (50.0, 75.0, 90.0), "metrics": ("importance", "top1"),
               "scopes": ("language", "global"), "seeds": (1, 2), "samples": 50}  # fmt: skip
    settings = CurveSettings(**(options | changes))
    return PruningCurves(model, "f", table_for(model.config, DIRECTIONS), DATA, settings, folder)


def test_the_plan(vocabulary, tmp_path):
    curves = curves_of(vocabulary, tmp_path)
    assert [curve.name for curve in curves.settings.curves()] == [
        "language importance", "language top1", "global importance", "global top1", "random"
    ]  # fmt: skip
    assert curves.shares() == [50.0, 75.0]  # of 16 experts 4 must stay
    points = list(curves.points())
    assert len(points) == 4 * 2 * 2 + 2 * 2 * 2
    jobs = curves.jobs()
    assert next(iter(jobs)) == FULL
    for point in points:  # each point finds the outputs of exactly its own experts
        name, job = curves.job_of(point)
        assert jobs[name].selection == job.selection
        assert point.direction in jobs[name].directions
        assert job.selection.total == curves.keep(point.removed)
    assert Curve("set", "top1", "threshold", "merge").name == "set top1 threshold merge"


def test_merging_is_kept_apart_from_dropping(vocabulary, tmp_path):
    curves = curves_of(vocabulary, tmp_path, methods=("drop", "merge"), metrics=("top1",), scopes=("global",), seeds=())
    names = {curve.method: curves.job_of(pruning_curves.Point(curve, 50.0, 0, "de-en"))[0]
             for curve in curves.settings.curves() if curve.metric == "top1"}  # fmt: skip
    assert names["drop"] != names["merge"]


def test_goes_on_where_it_stopped(vocabulary, tmp_path, translated):
    lines = []
    small = curves_of(vocabulary, tmp_path, metrics=("top1",), scopes=("global",))
    with pytest.raises(ConfigError, match="are missing; run the experiment to its end"):
        small.results()
    small.run(lines.append)
    assert translated[0] == (16, ["de-en", "en-de"])
    assert len(translated) == len(lines) == len(small.jobs())
    done = len(translated)
    curves_of(vocabulary, tmp_path, metrics=("top1",), scopes=("global",)).run(lines.append)
    assert len(translated) == done
    assert lines[-1].endswith("done before")
    more = curves_of(vocabulary, tmp_path)
    more.run(lines.append)
    assert len(translated) == len(more.jobs()) > done


def test_figures(vocabulary, tmp_path, translated):
    curves = curves_of(vocabulary, tmp_path, directions=DIRECTIONS)
    curves.run(lambda line: None)
    results = json.loads(json.dumps(curves.results()))
    assert results["mean"] == pytest.approx(100.0)  # the full model gives thirteen words, and no sentence has more
    for curve in results["curves"]:
        assert [point["kept"] for point in curve["points"]] == [8, 4]
        half, most = curve["points"]
        assert 0 < half["mean_lost"] < most["mean_lost"]
        assert most["mean_lost"] == pytest.approx(sum(most["lost"].values()) / 4)
        assert most["worst_lost"] == max(most["lost"].values())
        assert most["above_1"] == 4
        assert most["mean_lost_into_english"] == pytest.approx((most["lost"]["de-en"] + most["lost"]["mk-en"]) / 2)
        if curve["metric"] != "random":  # as many experts left, as many words
            assert most["against_random"]["gain"] == pytest.approx(0, abs=1e-6)
            assert most["against_random"]["p"] == 1.0
    text = markdown_report(results | {"footprints": [
        {"removed": 0.0, "folder_mb": 1.5, "memory_mb": 2.0, "load_seconds": 0.1}]})  # fmt: skip
    assert "| language importance |" in text
    assert "50 % (8 stay)" in text
    assert "Into English alone" in text
    assert "|     0 % |        1.5 |" in text
    pytest.importorskip("matplotlib")
    assert plot_losses(results).png().startswith(b"\x89PNG")


def test_settings_are_checked():
    for wrong, message in (
        ({"directions": ()}, "at least one direction"),
        ({"removed": (100.0,)}, "removed=100 must be above 0 and below 100"),
        ({"scopes": ("all",)}, "scope='all' is unknown"),
        ({"metrics": ("random",)}, "metric='random' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            CurveSettings(**({"directions": ("de-en",)} | wrong))


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("pruning_script", ROOT / "scripts/experiments/pruning.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pruning_script", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_script_from_a_model_folder_to_its_report(script, vocabulary, tmp_path, capsys):
    write_folder(tmp_path / "model", toy_model(vocabulary, moe=True, encoder_moe=EXPERTS, decoder_moe=EXPERTS))
    data = tmp_path / "data"
    (data / "text").mkdir(parents=True)
    (data / "data.json").write_text(json.dumps({"format": 1, "pairs": {}}))
    (data / "languages.json").write_text((vocabulary / "languages.json").read_text())
    for pair in ("de-en", "en-mk"):
        for language, lines in zip(pair.split("-"), (DATA["de-en"].sources, DATA["de-en"].references), strict=True):
            (data / "text" / f"valid.{pair}.{language}").write_text("".join(f"{line}\n" for line in lines))
    words = [str(tmp_path / "model"), str(data), "--output", str(tmp_path / "out"), "--directions", "de-en,en-de",
             "--removed", "50,95", "--metrics", "importance", "--scopes", "language", "--seeds", "1", "--beam", "1",
             "--samples", "20", "--repeats", "1"]  # fmt: skip
    assert script.main([*words, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "language importance: 50 %" in captured.out
    assert "95 % cannot go" in captured.err
    assert not (tmp_path / "out" / "outputs").exists()
    assert script.main(words) == 0
    assert "| language importance |" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["removed"] for one in results["footprints"]] == [0.0, 50.0]
    assert results["footprints"][1]["folder_mb"] < results["footprints"][0]["folder_mb"]
    assert (tmp_path / "out" / "pruning.png").stat().st_size > 1000
    assert script.main([*words, "--metrics", "best"]) == 2
    assert "metric='best' is unknown" in capsys.readouterr().err
