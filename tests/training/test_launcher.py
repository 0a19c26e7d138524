import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtmoe.cli import main
from mtmoe.errors import ConfigError
from mtmoe.kernels import extension
from mtmoe.training import launcher, preset, process, run_log, time_budget
from mtmoe.training.preset import TrainConfig

PRESETS = sorted((Path(__file__).parents[2] / "scripts" / "train").glob("*.yaml"))
LINE = "2026-01-02 03:04:05 | INFO | {kind} | {metrics}"


def make_config(folder, **changes):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "languages.json").write_text("{}")
    (folder / "data" / "dict.txt").write_text("")
    (folder / "data" / "data.json").write_text('{"fingerprint": "abc"}')
    return TrainConfig(data=str(folder / "data"), output=str(folder / "run"), threads=1, **changes)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load(path):
    words = preset.build_command(preset.load_config(path))
    assert words[0].endswith("fairseq-train")
    assert "--total-num-update" in words or "polynomial_decay" not in words or "--max-update" not in words


def test_overrides_reach_fields_and_options(tmp_path):
    options = "{max-tokens: 1024, lr: 0.1, cpu: true, fp16: true}"
    (tmp_path / "c.yaml").write_text(f"data: d\noutput: o\noptions: {options}\n")
    words = ["output=elsewhere", "max_tokens=99", "options.lr=0.5", "fp16=false", "update-freq=[2, 1]"]
    config = preset.load_config(tmp_path / "c.yaml", words)
    assert config.output == "elsewhere"
    command = " ".join(preset.build_command(config))
    assert "--max-tokens 99 --lr 0.5 --cpu --update-freq 2,1" in command
    assert "fp16" not in command
    assert f"--user-dir {preset.plugin_folder()} --save-dir elsewhere/checkpoints" in command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: d", "output must be given"),
        ("data: d\noutput: o\nlr: 1", "unknown key lr; .* go under options"),
        ("data: d\noutput: o\nminutes: -1", "minutes=-1 must not be negative"),
        ("data: d\noutput: o\nallocator: je", "allocator='je' is unknown"),
        ("data: d\noutput: o\noptions: {save-dir: x}", "options must not set save-dir"),
        ("- 1", "must hold keys and values"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_presets_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        preset.load_config(tmp_path / "c.yaml")


def test_wrong_overrides_say_what_is_wrong(tmp_path):
    (tmp_path / "c.yaml").write_text("data: d\noutput: o")
    with pytest.raises(ConfigError, match="--set 'oops' must be key=value"):
        preset.load_config(tmp_path / "c.yaml", ["oops"])


def test_metrics_are_read_from_fairseqs_lines():
    metrics = json.dumps({"epoch": 2, "valid_loss": "5.30", "valid_nll_loss_en-de": "4", "valid_num_updates": "12"})
    record = run_log.parse_metrics(LINE.format(kind="valid", metrics=metrics))
    assert record == {
        "kind": "valid", "time": "2026-01-02 03:04:05", "epoch": 2, "loss": 5.3, "nll_loss_en-de": 4, "num_updates": 12,
    }  # fmt: skip
    nan = run_log.parse_metrics(LINE.format(kind="train", metrics='{"train_loss": "nan", "train_num_updates": "1"}'))
    assert nan["loss"] == "nan"
    assert run_log.parse_metrics("2026 | INFO | fairseq.trainer | begin training epoch 1") is None
    assert run_log.parse_metrics(LINE.format(kind="x", metrics="{")) is None


FAKE = """
import json, signal, sys, time
print("2026-01-02 03:04:05 | INFO | x | epoch 1 from update 0: 9 sentences of 2 directions, 50 batches", flush=True)
def line(kind, **metrics):
    print(f"2026-01-02 03:04:05 | INFO | {kind} | {json.dumps(metrics)}", flush=True)
if "--fail" in sys.argv: print("the reason"); sys.exit(3)
def stop(*_): line("train", train_loss="1", train_num_updates="7"); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
for update in range(10, 100_000_000, 10):
    if "--wait" not in sys.argv and update > int(sys.argv[sys.argv.index("--max-update") + 1]): break
    time.sleep(0.01)
    line("train_inner", loss="2.5", num_updates=str(update), lr="0.1", ups="3", wps="100")
    if update % 100 == 0:
        print("2026 | INFO | t | begin validation on", flush=True); time.sleep(0.02)
        line("valid", valid_loss="2.1", valid_num_updates=str(update))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A stand-in for fairseq-train that prints as it does."""
    script = tmp_path / "fairseq-train"
    script.write_text(f"#!{sys.executable}\n{FAKE}")
    script.chmod(0o755)
    monkeypatch.setattr(preset, "_program", lambda name: script)
    return tmp_path


def test_a_run_leaves_its_files(fake):
    config = make_config(fake, options={"max-update": 100, "seed": 7}, curriculum=[{"start": 0.5, "languages": ["mk"]}])
    lines = []
    assert launcher.train(config, report=lines.append) == 0
    folder = config.folder
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["num_updates"] for record in records] == [*range(10, 101, 10), 100]
    run = json.loads((folder / "run.json").read_text())
    assert (run["seed"], run["data_fingerprint"], run["environment"]["OMP_NUM_THREADS"]) == (7, "abc", "1")
    assert "--max-update 100" in (folder / "command.txt").read_text()
    assert "--curriculum-file" in (folder / "command.txt").read_text()
    assert "epoch 1 from update 0" in (folder / "train.log").read_text()
    assert any("allocator" in line for line in lines)
    assert any("valid loss 2.100" in line for line in lines)


def test_a_failure_is_passed_on_with_its_reason(fake):
    lines = []
    assert launcher.train(make_config(fake, options={"fail": True}), report=lines.append) == 3
    assert "  the reason" in lines


def test_existing_checkpoints_are_not_overwritten_unasked(fake):
    config = make_config(fake)
    (config.folder / "checkpoints").mkdir(parents=True)
    (config.folder / "checkpoints" / "checkpoint_last.pt").touch()
    with pytest.raises(ConfigError, match=r"checkpoint_last\.pt exists; go on with --resume auto"):
        launcher.train(config, resume=False, report=print)


def test_a_time_budget_is_measured_once(fake, monkeypatch):
    monkeypatch.setattr(time_budget, "CALIBRATION_SECONDS", 1.0)
    options = {"lr-scheduler": "polynomial_decay", "validate-interval-updates": 500}
    config = make_config(fake, minutes=0.5, options=options)
    environment = process.build_environment(config, print)
    lines = []
    changes = time_budget.time_budget(config, environment, lines.append)
    measured = json.loads((config.folder / "calibration.json").read_text()) if config.folder.exists() else {}
    assert 0.0009 < measured["update_seconds"] < 0.01
    assert 0.015 < measured["validation_seconds"] < 0.2
    assert measured["validations_per_update"] == pytest.approx(1 / 500 + 1 / 50)
    expected = 30 / (measured["update_seconds"] + 0.022 * measured["validation_seconds"])
    assert 0.7 * expected < changes["max_update"] < expected
    assert changes["total_num_update"] == changes["max_update"]
    assert time_budget.time_budget(config, environment, lines.append) == changes
    assert "as measured before" in lines[-1]
    assert not list(config.folder.glob(".calibration-*"))


def test_signals_are_passed_on(fake):
    code = (
        "from mtmoe.training import launcher, preset\n"
        f"import pathlib, sys; preset._program = lambda name: pathlib.Path({str(fake / 'fairseq-train')!r})\n"
        f"folder = pathlib.Path({str(fake)!r})\n"
        "config = preset.TrainConfig(data=str(folder / 'data'), output=str(folder / 'run'), options={'wait': True})\n"
        "sys.exit(launcher.train(config, report=lambda line: print(line, flush=True)))\n"
    )
    make_config(fake)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("update"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 143
    assert "the same command goes on with it" in rest


def test_tcmalloc_is_found_where_it_is(tmp_path):
    assert process.find_tcmalloc([str(tmp_path)]) is None
    library = tmp_path / "libtcmalloc_minimal.so.4"
    library.touch()
    assert process.find_tcmalloc([str(tmp_path)]) == library


def test_without_tcmalloc_glibc_is_tuned_and_the_user_told(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "find_tcmalloc", lambda: None)
    lines = []
    environment = process.build_environment(make_config(tmp_path), lines.append)
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert "apt install libtcmalloc-minimal4" in lines[-1]


@pytest.mark.parametrize(
    ("why_not", "expected"), [(None, "CPU kernels: compiled"), ("no compiler", "CPU kernels: plain torch, slower; no")]
)
def test_on_a_cpu_the_user_is_told_which_kernels_there_are(tmp_path, monkeypatch, why_not, expected):
    monkeypatch.setattr(extension, "why_not", lambda: why_not)
    lines = []
    config = make_config(tmp_path)
    process.build_environment(dataclasses.replace(config, options={**config.options, "cpu": True}), lines.append)
    assert lines[1].startswith(expected)


def test_commands(tmp_path, capsys):
    assert main(["plugin-dir"]) == 0
    assert capsys.readouterr().out.strip().endswith("fairseq_plugins")
    (tmp_path / "c.yaml").write_text(f"data: {tmp_path}/none\noutput: {tmp_path}/run\n")
    assert main(["train", str(tmp_path / "c.yaml"), "--dry-run", "--set", "lr=0.5"]) == 0
    assert "--lr 0.5" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    assert "is no prepared data: languages.json is missing; run `mtmoe prepare` first" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
