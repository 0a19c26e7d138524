"""Whole runs of two processes: the same decisions in both, and going on with another number of them."""

import json
import os
import shlex
import signal
import subprocess
from collections import Counter

import pytest

from mtmoe.training.run_log import parse_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Each process writes down what it decides and what it trains on. MARGIN as in test_curriculum_runs.py.
PLUGIN = """
import json, os
import fairseq_plugins.tasks.mtmoe_translation
from fairseq_plugins.tasks.mtmoe_translation import MtmoeTranslationTask
from mtmoe.training import auto_curriculum

auto_curriculum.MARGIN = -0.5


def note(name, value):
    with open(f"{os.environ['NOTES']}/{name}.{os.environ.get('RANK', 0)}", "a") as file:
        file.write(json.dumps(value) + "\\n")


validated = auto_curriculum.AutoCurriculum.validated
train_step = MtmoeTranslationTask.train_step


def noting_decisions(self, update, losses, epochs):
    decisions = validated(self, update, losses, epochs)
    note("decisions", [update, losses, epochs, [(each.direction, each.action, each.starts) for each in decisions]])
    return decisions


def noting_sentences(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
    if not ignore_grad:  # else there is no batch left for this process, and it takes an old one
        note("sentences", [self.epochs.epoch, update_num, sample["id"].tolist(), self.epochs.passes])
    return train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad)


auto_curriculum.AutoCurriculum.validated = noting_decisions
MtmoeTranslationTask.train_step = noting_sentences
"""


@pytest.fixture
def train(fairseq, toy_data, tmp_path):
    """Train with so many processes; gives what was printed."""
    plugin = tmp_path / "noting_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(PLUGIN)

    def run(processes, *options):
        words = fairseq.train_command(toy_data, tmp_path / "run", *options)
        words[words.index("--user-dir") + 1] = str(plugin)
        if processes > 1:
            words = fairseq.torchrun(processes, *words)
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=(tmp_path / "stderr").open("w"), text=True, start_new_session=True,
            env=fairseq.environment(NOTES=str(tmp_path)),
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=400)
        finally:  # torchrun ends its children when it is asked to, not when it is killed
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, (tmp_path / "stderr").read_text()[-6000:]
        return output

    return run


def notes(folder, name, processes):
    return [
        [json.loads(line) for line in (folder / f"{name}.{rank}").read_text().splitlines()]
        for rank in range(processes)
    ]


def records(output, kind):
    parsed = [parse_metrics(line) for line in output.splitlines()]
    return [record for record in parsed if record is not None and record["kind"] == kind]


def test_both_processes_decide_alike(train, tmp_path):
    options = shlex.split(
        "--max-update 44 --validate-interval-updates 4 --valid-limit 8 --max-tokens 100 --curriculum-file auto "
        "--required-batch-size-multiple 1 --sampling-temperature 3 --no-save"
    )
    output = train(2, *options)
    first, second = notes(tmp_path, "decisions", 2)
    assert first == second  # losses and effective epochs too, digit by digit
    actions = [action for _, _, _, decisions in first for _, action, _ in decisions]
    assert {"wait", "return"} <= set(actions)
    assert [record["action"] for record in records(output, "curriculum")] == actions
    passes = [[(epoch, update, each) for epoch, update, _, each in part] for part in notes(tmp_path, "sentences", 2)]
    assert passes[0] == passes[1]
    assert max(update for _, update, _ in passes[0]) == 43


def test_phases_restart_together_and_go_on_with_one_process(train, tmp_path):
    """Stopped in the phase with two processes, then with one: the learning rate is that of one run."""
    phases = tmp_path / "curriculum.yaml"
    phases.write_text("- {start: 6, languages: [fr]}\n")
    options = shlex.split(
        "--total-num-update 18 --warmup-updates 2 --max-tokens 100 --required-batch-size-multiple 1 "
        "--disable-validation --save-interval-updates 8 --keep-interval-updates 1 --curriculum-restart warmup"
    )
    parts = [
        train(processes, *options, "--curriculum-file", phases, "--max-update", updates)
        for processes, updates in ((2, 7), (1, 9), (2, 18))
    ]
    rates = {record["num_updates"]: record["lr"] for part in parts for record in records(part, "train_inner")}
    assert sorted(rates) == list(range(1, 19))
    # fairseq logs the rate of the next update: n after the start of n that warm up.
    expected = {1: 1 / 2, 2: 1, 5: 1 - 3 / 16, 6: 0, 7: 1 / 2, 8: 1, 12: 1 - 4 / 10, 17: 1 - 9 / 10}
    assert {update: rates[update] for update in expected} == pytest.approx(
        {update: 0.003 * share for update, share in expected.items()}, rel=1e-3, abs=1e-9
    )
    assert "optimiser and learning rate begin anew" in parts[0]


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_an_epoch_goes_on_with_another_number_of_processes(train, tmp_path, first, second):
    options = shlex.split("--max-tokens 100 --required-batch-size-multiple 1 --disable-validation --max-epoch 1")
    train(first, *options, "--max-update", 7)
    train(second, *options)
    trained = [note for part in notes(tmp_path, "sentences", 2) for note in part]
    counts = Counter(number for epoch, _, sentences, _ in trained for number in sentences if epoch == 1)
    assert counts == dict.fromkeys(range(720), 1)
    assert {epoch for epoch, *_ in trained} == {1}
