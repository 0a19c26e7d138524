"""What is read from the logs of training, and what is run with which options."""

import json
import os
from types import SimpleNamespace

import pytest

from benchmarks import training


def interval(update, wps, nll):
    return {"kind": "train_inner", "num_updates": update, "wps": wps, "nll_loss": nll}


RECORDS = [interval(210, 50.0, 5.0), interval(250, 100.0, 4.0), interval(260, 120.0, 3.0),
           {"kind": "valid", "num_updates": 260, "wps": 900.0, "nll_loss": 3.5}]  # fmt: skip
ARGS = SimpleNamespace(log_interval=10, slice=200, threads=1)


def test_speeds_leave_out_warm_up_and_validation():
    assert training.speeds(RECORDS, start=200, warm=40) == [100.0, 120.0]


def test_slices_are_joined():
    part = {"words_per_second": [100.0, 120.0], "curves": training.curves(RECORDS)}
    later = {"words_per_second": [200.0], "curves": {"train": [(400, 2.0)], "valid": []}}
    found = training.summarise({"dense": [part, later], "failed": [{"words_per_second": [], "curves": {}}]})
    assert list(found) == ["dense"]
    assert found["dense"]["words_per_second"] == 120.0
    assert found["dense"]["slices"] == [110.0, 200.0]
    joined = found["dense"]["curves"]
    assert joined == {"train": [(210, 5.0), (250, 4.0), (260, 3.0), (400, 2.0)], "valid": [(260, 3.5)]}


def test_all_systems_see_the_same_batches_and_have_the_same_active_flops(tmp_path):
    systems = {name: system for name, system in training.SYSTEMS.items() if not system.own_task}
    options = {name: training.config_of(system, tmp_path, tmp_path, ARGS).options for name, system in systems.items()}
    for name in ("seed", "max-tokens", "sampling-temperature", "lr", "encoder-layers", "encoder-ffn-embed-dim"):
        assert len({json.dumps(each[name]) for each in options.values()}) == 1, name
    for name in ("moe8", "moe32"):
        assert options[name]["top-k"] * options[name]["moe-ffn-embed-dim"] == options[name]["encoder-ffn-embed-dim"]
    assert "autocast" not in options["fairseq"]
    assert training.config_of(systems["fairseq"], tmp_path, tmp_path, ARGS).allocator == "system"


def test_a_finished_slice_is_not_trained_again(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.json").write_text('{"recipe": "toy"}')
    args = SimpleNamespace(**vars(ARGS), slices=2, warm=10, output=tmp_path)
    trained = []

    def train_slice(name, config, until):
        trained.append((name, until))
        return [interval(until, 100.0 if name == "dense" else 80.0, 3.0)]

    monkeypatch.setattr(training, "train_slice", train_slice)
    monkeypatch.setattr(training, "others_seconds", lambda: 0.0)  # whatever else runs beside the tests
    found = training.run_data(data, ["dense", "moe8"], args, say=lambda _: None)
    assert trained == [("dense", 200), ("moe8", 200), ("dense", 400), ("moe8", 400)]
    assert found["moe8"]["words_per_second"] == 80.0
    assert training.run_data(data, ["dense", "moe8"], args, say=lambda _: None) == found
    assert len(trained) == 4
    args.slices = 3
    training.run_data(data, ["dense", "moe8"], args, say=lambda _: None)
    assert trained[4:] == [("dense", 600), ("moe8", 600)]
    text = training.report(
        {"processor": "P", "instructions": [], "threads": 1, "allocator": "a", "versions": {}}, args, {"toy": found}
    )
    assert "| moe8   |         – |    0.80 |" in text


def test_a_disturbed_slice_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_slice", lambda *_: [interval(200, 100.0, 3.0)])
    busy = iter([0.0, 100.0])
    monkeypatch.setattr(training, "others_seconds", lambda: next(busy))
    said = []
    args = SimpleNamespace(**vars(ARGS), slices=1, warm=10, output=tmp_path)
    assert training.run_data(tmp_path / "toy", ["dense"], args, say=said.append) == {}
    assert "does not count" in said[0]


def test_disturbed_slices_do_not_count_and_ratios_are_of_one_turn():
    def part(rate, others):
        return {"words_per_second": [rate], "curves": {"train": [], "valid": [(1, 2.0)]}, "others": others}

    found = training.summarise({
        "fairseq": [part(10.0, 0.0), part(20.0, 0.01), part(10.0, 0.0)],
        "dense": [part(20.0, 0.0), part(20.0, 0.5), part(30.0, 0.0)],
    })  # fmt: skip
    assert found["dense"]["slices"] == [20.0, None, 30.0]
    assert len(found["dense"]["curves"]["valid"]) == 3
    assert training.ratios(found["dense"], found["fairseq"]) == [2.0, 3.0]
    assert training.ratios(found["dense"], None) == []
    assert training.spread([2.0, 3.0]) == "2.50 (2.00 to 3.00)"
    assert training.spread([2.0]) == "2.00"


def test_time_of_others_is_what_the_machine_was_busy_without_our_own(tmp_path):
    tick = os.sysconf("SC_CLK_TCK")
    counts = [9000 * tick, 500 * tick, 300 * tick, 70_000 * tick, 1000 * tick, 20 * tick, 10 * tick, 5 * tick, 0, 0]
    (tmp_path / "stat").write_text("cpu  " + " ".join(map(str, counts)) + "\ncpu0 1 2 3\n", encoding="ascii")
    own = sum(os.times()[:4])
    assert training.others_seconds(tmp_path / "stat") == pytest.approx(9830 - own, abs=1.0)
    assert training.others_seconds(tmp_path / "none") == 0.0


def test_a_failed_system_leaves_the_others_working(tmp_path, monkeypatch):
    args = SimpleNamespace(**vars(ARGS), slices=2, warm=10, output=tmp_path)

    def train_slice(name, config, until):
        if name == "moe8":
            raise RuntimeError("moe8 ended with status 1")
        return [interval(until, 100.0, 3.0)]

    monkeypatch.setattr(training, "train_slice", train_slice)
    monkeypatch.setattr(training, "others_seconds", lambda: 0.0)  # whatever else runs beside the tests
    said = []
    assert list(training.run_data(tmp_path / "toy", ["moe8", "dense"], args, say=said.append)) == ["dense"]
    assert "status 1" in said[0]


@pytest.mark.parametrize("name", list(training.SYSTEMS))
def test_each_system_has_a_command(name, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "languages.json").write_text('{"languages": ["de", "en"], "directions": ["de-en"]}')
    (tmp_path / "dict.txt").write_text("a 1\n")
    config = training.config_of(training.SYSTEMS[name], tmp_path, tmp_path / "run", ARGS)
    words = training.build_command(config, max_update=5)
    assert words[words.index("--arch") + 1] == ("transformer" if "fairseq" in name else "mtmoe_transformer")
    if name == "fairseq-own-task":
        assert (tmp_path / "run/data/dict.en.txt").read_text() == "a 1\n"
