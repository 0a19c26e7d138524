"""Figures of an experiment against what its run files say, and what happens when some are missing."""

import json
import statistics

import pytest

from mtmoe.errors import DataError
from mtmoe.evaluation.experiment import Experiment, summarise
from mtmoe.evaluation.experiment.results import _loss
from mtmoe.evaluation.experiment.runs import ExperimentRun


@pytest.fixture
def results(finished, references):
    return summarise(Experiment.load(finished), references, samples=200)


def runs_of(folder, config):
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob(f"{config}.seed*.json"))]


def test_means_and_spread_are_over_seeds_of_means_over_directions(finished, results):
    runs = runs_of(finished, "moe_eom")
    for family, bucket, directions in (
        ("all", "very_low", ["de-mk", "mk-de"]),
        ("into_english", "low", ["mk-en"]),
        ("non_english", "all", ["de-mk", "mk-de"]),
        ("all", "all", ["de-en", "en-de", "en-mk", "mk-en", "de-mk", "mk-de"]),
    ):
        for metric in ("chrf++", "bleu"):
            by_seed = [statistics.mean(run["test_scores"][one][metric] for one in directions) for run in runs]
            group = results["configurations"]["moe_eom"]["scores"][metric][family][bucket]
            assert group["mean"] == pytest.approx(statistics.mean(by_seed))
            assert group["spread"] == pytest.approx(statistics.stdev(by_seed))
            assert list(group["by_seed"].values()) == pytest.approx(by_seed)
    # Disjoint: nothing very low is in low.
    assert "low" not in results["configurations"]["moe"]["scores"]["chrf++"]["non_english"]
    assert results["split"] == "test"
    assert results["buckets"]["low"] == {"directions": 2, "fewest_pairs": 1500, "most_pairs": 1500}


def test_differences_are_over_common_seeds_and_corrected(finished, results):
    assert results["baselines"] == ["moe", "dense"]
    group = results["differences"]["moe"]["moe_eom"]["all"]["very_low"]
    own = results["configurations"]["moe_eom"]["scores"]["chrf++"]["all"]["very_low"]
    base = results["configurations"]["moe"]["scores"]["chrf++"]["all"]["very_low"]
    assert group["difference"] == pytest.approx(own["mean"] - base["mean"], abs=1e-3)
    apart = [own["by_seed"][seed] - base["by_seed"][seed] for seed in own["by_seed"]]
    assert group["spread"] == pytest.approx(statistics.stdev(apart), abs=1e-3)
    assert group["p_value"] <= group["p_holm"] <= 1
    assert group["stars"]
    # 30 % of the words wrong instead of 50 %: the smallest p, times the three configurations that are compared.
    assert group["p_holm"] == pytest.approx(min(1, 3 * group["p_value"]))
    assert "moe" not in results["differences"]["moe"]
    assert set(results["differences"]["dense"]) == {"moe", "moe_eom", "moe_cmr"}


def test_loss_by_bucket(results):
    moe = results["configurations"]["moe"]["loss"]
    # 3 + 3000 / update + 0.8 (update - 1500) / 1500 of very low directions: lowest at 2500 or sooner, not at the end
    assert moe["high"]["best_update"]["mean"] == 3000
    assert moe["high"]["rise"]["mean"] == pytest.approx(0)
    assert moe["very_low"]["best_update"]["mean"] == 2500
    at = {update: 3.02 + 3000 / update + 0.8 * max(0, update - 1500) / 1500 for update in (2500, 3000)}
    assert moe["very_low"]["rise"]["mean"] == pytest.approx(at[3000] - at[2500], abs=1e-3)
    assert moe["very_low"]["gap_at_end"]["mean"] == pytest.approx(0.5 + 0.8, abs=1e-3)
    assert moe["very_low"]["gap_at_best"]["mean"] == pytest.approx(0.5 + 0.8 * 1000 / 1500, abs=1e-3)


def test_equal_losses_take_the_later_update():
    points = [{"update": update, "nll_loss": {"a-b": loss}} for update, loss in ((3, 5.0), (1, 4.0), (2, 4.0))]
    record = {"valid": points, "train_sample": [{"update": 2, "nll_loss": {"a-b": 3.5, "b-a": None}}]}
    found = _loss([ExperimentRun(None, "x", 1, record)], ["a-b", "b-a"])
    assert {name: figure["mean"] for name, figure in found.items()} == {
        "best_update": 2,
        "best": 4.0,
        "end": 5.0,
        "rise": 1.0,
        "gap_at_best": 0.5,
    }
    assert found["best"]["spread"] is None


def test_what_is_missing_is_left_out(tmp_path, make_run, references):
    folder = tmp_path / "toy"
    make_run(folder, "moe", 1)
    make_run(folder, "moe", 2)
    make_run(folder, "moe_eom", 2, outputs=False)
    make_run(folder, "moe_cmr", 3)
    make_run(folder, "dense", 1, test=False, valid_scores=None, valid=[], words_per_second=None, routing=None)
    results = summarise(Experiment.load(folder), references, samples=50)
    assert results["split"] == "valid"  # one run has no test scores yet
    configurations, differences = results["configurations"], results["differences"]["moe"]
    assert configurations["moe"]["scored_seeds"] == [1, 2]
    assert configurations["dense"]["scored_seeds"] == []
    assert configurations["dense"]["scores"]["chrf++"]["all"]["all"] is None
    assert configurations["dense"]["loss"]["low"] == {}
    assert configurations["dense"]["words_per_second"] is None
    assert differences["dense"] == {}  # nothing to compare
    assert differences["moe_cmr"] == {}  # no seed in common
    eom = differences["moe_eom"]["all"]["low"]  # its outputs are not kept: a difference without significance
    assert set(eom["by_seed"]) == {"2"}
    assert "p_value" not in eom
    only = summarise(Experiment.load(folder), None, split="test", baselines=["nothing"])
    assert only["differences"] == {}
    json.dumps(results, allow_nan=False)


def test_damaged_experiments(tmp_path, make_run):
    folder = tmp_path / "toy"
    with pytest.raises(DataError, match="has no finished run"):
        Experiment.load(folder)
    make_run(folder, "moe", 1)
    make_run(folder, "moe", 2, data_fingerprint="0" * 64)
    with pytest.raises(DataError, match=r"trained on other data: moe.seed1.json, moe.seed2.json"):
        Experiment.load(folder)
    (folder / "runs" / "moe.seed2.json").write_text("{}")
    with pytest.raises(DataError, match=r"moe.seed2.json is no run of an experiment: KeyError\('config'\)"):
        Experiment.load(folder)
    (folder / "outputs" / "moe.seed1.test.jsonl.xz").write_bytes(b"no xz")
    run = ExperimentRun.load(folder / "runs" / "moe.seed1.json")
    with pytest.raises(DataError, match=r"moe.seed1.test.jsonl.xz is damaged"):
        run.hypotheses("test")


def test_references_of_another_preparation_are_refused(tmp_path, make_run, references):
    make_run(tmp_path / "toy", "moe", 1)
    experiment = Experiment.load(tmp_path / "toy")
    changed = references | {"en-mk": list(reversed(references["en-mk"]))}
    with pytest.raises(DataError, match=r"moe.seed1.json was scored on other test text than the data has for en-mk;"):
        summarise(experiment, changed, samples=20)
    del changed["en-mk"]
    with pytest.raises(DataError, match="than the data has for en-mk;"):
        summarise(experiment, changed, samples=20)
