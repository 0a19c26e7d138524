import json
import signal
import sys
import threading
from pathlib import Path

import pytest
import yaml

from mtmoe.errors import ConfigError
from mtmoe.experiments.plan import load_experiment
from mtmoe.experiments.schedule import Pool, minutes_of, plan_lines

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "scripts" / "experiments").glob("*.yaml"))


def document(folder, **changes):
    return {
        "name": "tiny",
        "recipe": "data/sample.yaml",
        "output": str(folder / "runs"),
        "results": str(folder / "results"),
        "baseline": "moe",
        "seeds": [1, 2],
        "minutes": 30,
        "base": {"arch": "mtmoe_transformer_tiny", "options": {"max-update": 100, "dropout": 0.1, "lr": 0.1}},
        "configurations": {
            "moe": {"title": "MoE"},
            "late": {"title": "late", "derived": {"source": "moe", "shares": [1.0, 0.5]}},
            "eom": {"title": "EOM", "options": {"eom": 0.2, "dropout": 0.3, "lr": None}, "seeds": [1, 2, 3]},
        },
        **changes,
    }


def write(folder, **changes):
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(document(folder, **changes), sort_keys=False))
    return path


def load(folder, **changes):
    return load_experiment(write(folder, **changes))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_experiments_load_and_name_recipes_of_data(path):
    experiment = load_experiment(path)
    assert (ROOT / experiment.recipe).is_file()
    for run in experiment.runs():
        assert run.preset(None).options["seed"] == run.seed


def test_each_configuration_has_one_run_before_any_has_two(tmp_path):
    experiment = load(tmp_path)
    wanted = ["moe.seed1", "late.seed1", "eom.seed1", "moe.seed2", "late.seed2", "eom.seed2", "eom.seed3"]
    assert [run.name for run in experiment.runs()] == wanted
    assert [run.name for run in experiment.runs(["eom", "moe"], [7])] == ["eom.seed7", "moe.seed7"]


def test_options_of_a_configuration_change_those_of_the_base(tmp_path):
    preset = load(tmp_path).runs(["eom"], [5])[0].preset(None)
    assert preset.options == {"max-update": 100, "dropout": 0.3, "eom": 0.2, "seed": 5}
    assert (preset.threads, preset.output) == (1, str(tmp_path / "runs" / "eom" / "seed5"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "unknown key speed; choose from: name, recipe"),
        ({"checkpoint": "first"}, "checkpoint='first' must be one of: best, last"),
        ({"baseline": "mo"}, "configuration 'mo' is unknown; tiny has: moe, late, eom"),
        ({"configurations": {}}, "configurations must map names"),
        ({"configurations": {"moe": {"options": {}}}}, "configuration moe: title must be given"),
        ({"configurations": {"moe": {"title": "a", "option": {}}}}, "configuration moe: unknown key option"),
        ({"base": {"options": {"save-dir": "x"}}}, "options must not set save-dir"),
        (
            {"configurations": {"moe": {"title": "a", "derived": {"source": "moe"}}}},
            "configuration moe, derived: shares must be given",
        ),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)


def test_a_missing_key_is_named(tmp_path):
    path = write(tmp_path)
    values = yaml.safe_load(path.read_text())
    del values["seeds"]
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError, match="seeds must be given"):
        load_experiment(path)


def finish(run, seconds=600.0):
    run.result.parent.mkdir(parents=True, exist_ok=True)
    run.result.write_text(json.dumps({"total_seconds": seconds}))


def test_the_plan_tells_state_and_time(tmp_path):
    experiment = load(tmp_path)
    runs = experiment.runs(seeds=[1])
    assert minutes_of(experiment) == 30
    assert plan_lines(experiment, runs, 2)[-1].startswith("0 of 3 runs are done; the rest takes about 0.8 hours")
    finish(runs[0])
    runs[2].folder.mkdir(parents=True)
    records = [{"kind": "train_inner", "num_updates": 50}, {"kind": "valid", "num_updates": 70}]
    (runs[2].folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = plan_lines(experiment, runs, 1)
    assert minutes_of(experiment) == 10
    assert lines[0].split() == ["moe.seed1", "done", "(MoE)"]
    assert "to do, 10 min" in lines[1]
    assert "after" not in lines[1]
    assert "50 of 100 updates" in lines[2]
    assert lines[3].startswith("1 of 3 runs are done; the rest takes about 0.2 hours, 1 at a time")


FAKE = """
import json, pathlib, signal, sys, time
result, seconds, status = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pathlib.Path(str(result) + ".started").touch()
time.sleep(seconds)
if status == 0:
    result.write_text(json.dumps({"total_seconds": 1}))
sys.exit(status)
"""


def fake(seconds=0.1, failing=()):
    def command(run):
        run.result.parent.mkdir(parents=True, exist_ok=True)
        return [sys.executable, "-c", FAKE, str(run.result), str(seconds), str(3 * (run.name in failing))]

    return command


@pytest.fixture(autouse=True)
def quick_poll(monkeypatch):
    monkeypatch.setattr("mtmoe.experiments.schedule.POLL", 0.02)


def test_a_pool_works_off_runs_in_the_order_of_their_needs(tmp_path):
    experiment = load(tmp_path)
    runs = experiment.runs(["late", "moe", "eom"], [1, 2])
    lines = []
    assert Pool(fake(), 2, report=lines.append).work(runs) == {}
    assert all(run.result.is_file() for run in runs)
    text = "\n".join(lines)
    assert text.index("moe.seed1: done") < text.index("late.seed1: started")
    assert Pool(fake(), 2, report=lines.append).work(runs) == {}  # nothing is left to do
    assert "\n".join(lines) == text


def test_a_failed_run_stops_only_those_that_need_it(tmp_path):
    runs = load(tmp_path).runs(seeds=[1])
    failed = Pool(fake(failing=("moe.seed1",)), 2, report=lambda line: None).work(runs)
    assert failed == {"moe.seed1": 3, "late.seed1": 1}
    assert runs[2].result.is_file()


def test_a_signal_reaches_the_runs_and_starts_no_more(tmp_path):
    runs = load(tmp_path).runs(["moe", "eom"], [1, 2])

    def interrupt():
        started = Path(f"{runs[0].result}.started")
        while not started.is_file():
            threading.Event().wait(0.02)
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    failed = Pool(fake(seconds=60), 1, report=lambda line: None).work(runs)
    assert failed == {run.name: 143 for run in runs}
    assert signal.getsignal(signal.SIGTERM) is before
