"""Whole runs of fairseq-train with a curriculum that training decides on."""

import shlex
import signal

import pytest
import torch

import fairseq_plugins  # noqa: F401 - checkpoints could not be read without its repairs
from mtmoe.training.run_log import parse_metrics

OPTIONS = shlex.split(
    "--max-update 60 --update-freq 2 --validate-interval-updates 4 --valid-limit 8 --max-tokens 100 "
    "--required-batch-size-multiple 1 --sampling-temperature 3 --save-interval-updates 20 --keep-interval-updates 1 "
    "--curriculum-file auto"
)

# 60 updates of a model of 16 units over-fit nothing: here a loss counts as risen once it is above half of the best.
PLUGIN = """
import fairseq_plugins.tasks.mtmoe_translation
from mtmoe.training import auto_curriculum

auto_curriculum.MARGIN = -0.5
"""


def records(output, kind):
    parsed = [parse_metrics(line) for line in output.splitlines()]
    return [record for record in parsed if record is not None and record["kind"] == kind]


def without_time(output, kind):
    return [{key: value for key, value in record.items() if key != "time"} for record in records(output, kind)]


@pytest.fixture(scope="module")
def words(fairseq, toy_data, tmp_path_factory):
    plugin = tmp_path_factory.mktemp("plugin") / "eager_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(PLUGIN)

    def command(save, *options):
        found = fairseq.train_command(toy_data, save, *OPTIONS, *options)
        found[found.index("--user-dir") + 1] = str(plugin)
        return found

    return command


@pytest.fixture(scope="module")
def unbroken(fairseq, words, tmp_path_factory):
    save = tmp_path_factory.mktemp("unbroken")
    return save, fairseq.run(words(save)).stdout


def test_directions_wait_and_return_as_decided(unbroken):
    _, output = unbroken
    decisions = records(output, "curriculum")
    french = [record for record in decisions if record["direction"] == "en-fr"]
    assert {record["direction"] for record in decisions} <= {"en-fr", "fr-en"}  # German has five times as many pairs
    assert [record["action"] for record in french][:2] == ["wait", "return"]
    wait, back = french[:2]
    assert wait["num_updates"] == 16  # the first validation that can tell
    assert wait["num_updates"] < back["num_updates"] <= wait["starts"] + 2
    epochs = {record["num_updates"]: record["epochs_en-fr"] for record in records(output, "valid")}
    waited = [value for update, value in epochs.items() if wait["num_updates"] <= update <= back["num_updates"]]
    assert len(waited) > 1
    assert len(set(waited)) == 1
    assert epochs[60] > waited[0] > 0
    german = [record["epochs_de-en"] for record in records(output, "valid")]
    assert german == sorted(german)
    assert len(set(german)) == len(german)


def test_a_broken_run_decides_and_trains_as_an_unbroken_one(fairseq, words, unbroken, tmp_path):
    whole_folder, whole = unbroken
    parts = []
    # Killed after a checkpoint, then stopped at an update at which a validation is due.
    for update, number in ((25, signal.SIGKILL), (32, signal.SIGTERM), (0, 0)):
        parts.append(fairseq.run_until(words(tmp_path), update, number)[1])
    expected = fairseq.losses(whole)
    for part in parts:
        losses = fairseq.losses(part)
        assert losses
        assert {update: expected[update] for update in losses} == losses
    assert max(fairseq.losses(parts[2])) == 60
    for kind in ("valid", "curriculum"):
        whole_records = without_time(whole, kind)
        for record in (record for part in parts for record in without_time(part, kind)):
            timeless = {key: value for key, value in record.items() if key not in ("wall", "wps", "train_wall")}
            assert any(timeless.items() <= other.items() for other in whole_records), record
    folders = (whole_folder, tmp_path)
    final = [torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"] for folder in folders]
    assert all(torch.equal(value, final[1][name]) for name, value in final[0].items())


RESTART = shlex.split(
    "--max-update 30 --total-num-update 30 --warmup-updates 4 --max-tokens 100 --required-batch-size-multiple 1 "
    "--disable-validation --save-interval-updates 8 --keep-interval-updates 1 --curriculum-restart warmup"
)


def test_a_phase_may_begin_with_a_new_warmup(fairseq, toy_data, tmp_path):
    phases = tmp_path / "curriculum.yaml"
    phases.write_text("- {start: 12, languages: [fr]}\n")
    command = fairseq.train_command(toy_data, tmp_path / "whole", *RESTART, "--curriculum-file", phases)
    whole = fairseq.run(command).stdout
    rates = {record["num_updates"]: record["lr"] for record in records(whole, "train_inner")}
    peak = 0.003
    # fairseq logs the rate of the next update: n after the start of n that warm up.
    expected = {2: 2 / 4, 4: 1, 11: 1 - 7 / 26, 12: 0, 13: 1 / 4, 16: 1, 17: 1 - 1 / 14, 29: 1 - 13 / 14, 30: 0}
    assert {update: rates[update] for update in expected} == pytest.approx(
        {update: peak * share for update, share in expected.items()}, rel=1e-3, abs=1e-9
    )
    assert whole.count("optimiser and learning rate begin anew") == 1
    ends = []
    for stop in (["--max-epoch", "1"], ["--max-update", "19"], []):  # where the phase begins, and inside it
        part = fairseq.run([*command, "--save-dir", str(tmp_path / "parts"), *stop]).stdout
        losses = fairseq.losses(part)
        ends.append(max(losses))
        assert {update: fairseq.losses(whole)[update] for update in losses} == losses
    assert ends == [12, 19, 30]
    refused = [*command, "--save-dir", str(tmp_path / "auto"), "--curriculum-file", "auto"]
    assert "the curriculum auto has none" in fairseq.run(refused, check=False).stderr


def test_it_needs_an_end(fairseq, words, tmp_path):
    failed = fairseq.run([*words(tmp_path), "--max-update", "0", "--max-epoch", "1"], check=False)
    assert "the curriculum auto plans for the end of training; give --max-update" in failed.stderr
