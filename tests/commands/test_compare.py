import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtmoe.cli import main
from mtmoe.evaluation.test_sets import TestSet

REFERENCES = [f"This is line number {number} of the small test set." for number in range(40)]


def write_run(folder: Path, outputs: list[str], references: list[str] = REFERENCES) -> Path:
    row = {"sentences": len(outputs), "test_set": TestSet("de-en", references, references).fingerprint, "bucket": "low"}
    for name, lines in (("hypotheses", outputs), ("references", references)):
        (folder / name).mkdir(parents=True)
        (folder / name / "de-en.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "evaluation.json").write_text(json.dumps({"format": 1, "directions": {"de-en": row}}))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "worse", [line.replace("small", "xx").replace("line", "yy") for line in REFERENCES]),
        write_run(tmp_path / "better", [line.replace("small", "xx") for line in REFERENCES]),
    ]


def test_table_and_json(runs, tmp_path, capsys):
    output = tmp_path / "comparison.json"
    assert main(["compare", *map(str, runs), "--samples", "200", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| de-en"))
    found = json.loads(output.read_text())
    assert f"{found['directions']['de-en']['difference']:+.2f}" in row
    assert found["directions"]["de-en"]["stars"] in row
    assert found["directions"]["de-en"]["stars"]
    assert found["samples"] == 200
    assert "Wilcoxon" in printed


def test_errors_are_a_line_and_status_1(runs, tmp_path, capsys):
    other = write_run(tmp_path / "other", REFERENCES[:5], REFERENCES[:5])
    assert main(["compare", str(runs[0]), str(other)]) == 1
    assert "mtmoe compare: error: " in (error := capsys.readouterr().err)
    assert "de-en (40 and 5 segments)" in error
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 1
    assert "evaluation.json does not exist" in capsys.readouterr().err
    assert main(["compare", *map(str, runs), "--seed", "0"]) == 1
    assert "seed=0 must be at least 1" in capsys.readouterr().err


def test_wrong_usage_is_status_2(runs, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(runs[0])])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, runs), "--metric", "ter"])
    assert stop.value.code == 2


@pytest.mark.parametrize("name", ["compare", "evaluate"])
def test_script_is_the_command(name):
    script = Path(__file__).parents[2] / "eval" / f"{name}.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert f"usage: mtmoe {name}" in done.stdout
    assert "Examples:" in done.stdout
