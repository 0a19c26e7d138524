import json

import pytest
import yaml

from mtmoe.cli import main
from mtmoe.errors import ConfigError
from mtmoe.training import curriculum, preset, run_curves

PAIRS = {"de-en": {"train": 40_000}, "en-mk": {"train": 900}, "en-ro": {"train": 4_000}}
RESOURCE = {"de": "high", "ro": "low", "mk": "very_low"}
BEST = {"de-en": 1000, "en-de": 1000, "en-ro": 500, "ro-en": 1000, "en-mk": 200, "mk-en": 150}


@pytest.fixture
def finished(tmp_path):
    """A run of 1,000 updates whose directions are best where `BEST` says."""
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    folder.mkdir()
    (data / "data.json").write_text(json.dumps({"pairs": PAIRS, "resource": RESOURCE}))
    (data / "languages.json").write_text(json.dumps({"directions": list(BEST)}))
    described = {"command": ["fairseq-train", "d", "--max-update", "1000"], "config": {"data": str(data)}}
    (folder / "run.json").write_text(json.dumps(described))
    with (folder / "log.jsonl").open("w") as log:
        for update in range(50, 1001, 50):
            losses = {f"nll_loss_{name}": 4 + abs(update - best) / 500 for name, best in BEST.items()}
            seen = {f"epochs_{name}": update / 100 for name in BEST}
            log.write(json.dumps({"kind": "valid", "num_updates": update, **losses, **seen}) + "\n")
            halved = {name: loss / 2 for name, loss in losses.items()}
            log.write(json.dumps({"kind": "train_sample", "num_updates": update, **halved}) + "\n")
    return folder


def test_the_report_tells_what_each_direction_lost(finished, capsys):
    assert main(["curves", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert printed == (finished / "validation.md").read_text()
    assert "better before than at the last validation: en-ro, en-mk, mk-en" in printed
    report = json.loads((finished / "validation.json").read_text())
    rows = {row["direction"]: row for row in report["directions"]}
    assert list(rows)[:2] == ["de-en", "en-de"]  # from the largest bucket to the smallest
    mk = rows["en-mk"]
    assert (mk["bucket"], mk["best_update"], mk["best_epochs"], mk["epochs"]) == ("very_low", 200, 2.0, 10.0)
    assert mk["lost"] == pytest.approx(1.6, abs=0.11)
    assert mk["train_loss"] == pytest.approx(2.8)
    assert rows["de-en"]["lost"] == 0
    svg = (finished / "validation.svg").read_text()
    assert svg.startswith("<svg")
    run_curves.write_report(finished)
    assert (finished / "validation.svg").read_text() == svg


def test_a_run_without_validation_has_no_report(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"kind": "train_inner", "num_updates": 10}\n')
    run_curves.try_report(tmp_path)
    assert not (tmp_path / "validation.json").exists()
    assert main(["curves", str(tmp_path)]) == 1
    assert "no validation losses of any direction; validate more often" in capsys.readouterr().err


def test_a_curriculum_from_a_run_goes_straight_into_training(finished, tmp_path, capsys):
    output = tmp_path / "curriculum.yaml"
    assert main(["curriculum", str(finished), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "| en-mk     | very low |" in printed
    assert f"train with --set curriculum={output}" in printed
    expected = {"de-en": 0, "en-de": 0, "ro-en": 0, "en-ro": 4000, "en-mk": 8000, "mk-en": 8000}
    assert curriculum.resolve(curriculum.load(output), list(BEST), 10_000).starts == expected
    (tmp_path / "c.yaml").write_text("data: d\noutput: o\n")
    config = preset.load_config(tmp_path / "c.yaml", [f"curriculum={output}"])
    assert config.curriculum == yaml.safe_load(output.read_text())
    assert "--curriculum-file o/curriculum.yaml" in " ".join(preset.build_command(config))


def test_options_of_the_curriculum_command(finished, capsys):
    assert main(["curriculum", str(finished), "--fit", "median", "--max-update", "2000"]) == 0
    document = capsys.readouterr().out.split("\n\n")[-1]
    starts = {name: phase["start"] for phase in yaml.safe_load(document) for name in phase["directions"]}
    assert starts == {"de-en": 0, "en-de": 0, "ro-en": 0, "en-ro": 1500, "en-mk": 1825, "mk-en": 1825}
    for folder in (finished, finished.parent / "data"):
        assert main(["curriculum", str(folder), "--by", "count"]) == 0
        document = capsys.readouterr().out.split("\n\n")[-1]
        starts = {name: phase["start"] for phase in yaml.safe_load(document) for name in phase["directions"]}
        assert starts == {"de-en": 0, "en-de": 0, "ro-en": 0.4, "en-ro": 0.4, "en-mk": 0.6, "mk-en": 0.6}
    assert main(["curriculum", str(finished.parent), "--by", "count"]) == 1
    assert "data.json is missing; give prepared data or a run" in capsys.readouterr().err


def test_late_directions_count_from_when_they_joined(finished):
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "valid":
            line["epochs_en-ro"] = max(0, line["num_updates"] - 400) / 100
    (finished / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from mtmoe.training.planning import plan_from_run

    plan = plan_from_run(finished)
    assert plan.schedule.starts["en-ro"] == 800  # best at 500, after 100 updates of training
    assert "has trained en-ro only from a later update on" in plan.explanation


def test_a_preset_may_leave_the_curriculum_to_training(tmp_path):
    (tmp_path / "c.yaml").write_text("data: d\noutput: o\n")
    config = preset.load_config(tmp_path / "c.yaml", ["curriculum=auto"])
    assert "--curriculum-file auto" in " ".join(preset.build_command(config))
    with pytest.raises(ConfigError, match=r"curriculum none\.yaml cannot be read"):
        preset.load_config(tmp_path / "c.yaml", ["curriculum=none.yaml"])
