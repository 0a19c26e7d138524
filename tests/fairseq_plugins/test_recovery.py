"""Whole runs of fairseq-train in which something goes wrong: spikes, divergence, broken weights, a full disk."""

import json
import os
import re
import shlex

import pytest
import torch

import fairseq_plugins  # noqa: F401 - lets torch read checkpoints
from mtmoe.training.checkpoint_files import read_header

PLUGIN = """
import json
import os
import resource

import mtmoe.training.spikes

mtmoe.training.spikes.WINDOW = 16

import fairseq_plugins.models.mtmoe_transformer
import fairseq_plugins.tasks.mtmoe_translation
import torch
from fairseq.criterions import register_criterion
from fairseq_plugins.criterions.label_smoothed_cross_entropy import (
    MtmoeCriterionConfig, MtmoeLabelSmoothedCrossEntropy,
)

EVENTS = json.loads(os.environ["EVENTS"])


@register_criterion("eventful", dataclass=MtmoeCriterionConfig)
class Eventful(MtmoeLabelSmoothedCrossEntropy):
    def forward(self, model, sample, reduce=True):
        update, at_first = self.task.num_updates + 1, self.task.guard.lr_scale == 1.0
        if model.training and update in EVENTS.get("break", ()) and at_first:
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("nan")
        if model.training and str(update) in EVENTS.get("room", {}):
            resource.setrlimit(resource.RLIMIT_FSIZE, (EVENTS["room"][str(update)], -1))
        loss, size, log = super().forward(model, sample)
        if model.training and update in EVENTS.get("spike", ()):
            loss = loss * 1e4
        if model.training and (update in EVENTS.get("nan", ()) and at_first or update in EVENTS.get("always", ())):
            loss = loss * float("nan")
        return loss, size, log
"""
OPTIONS = shlex.split(
    "--disable-validation --max-nonfinite-updates 3 --save-interval-updates 10 --keep-interval-updates 2 "
    "--save-interval 100 --required-batch-size-multiple 1 --autocast bfloat16"
)
# Experts that many updates leave out: what their optimiser owes them must not reach the weights of a checkpoint.
SPARSE = shlex.split(
    "--arch mtmoe_transformer_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 16 "
    "--decoder-ffn-embed-dim 16 --moe-freq 1 --num-experts 16 --top-k 1 --normalize-weights none --max-tokens 48"
)


@pytest.fixture
def train(fairseq, toy_data, tmp_path):
    """Run fairseq-train with events; returns its losses and all of its output."""
    plugin = tmp_path / "eventful_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(PLUGIN)

    def run(name, updates, *options, status=0, launcher=(), **events):
        words = fairseq.train_command(toy_data, tmp_path / name, *OPTIONS, *options, "--max-update", updates)
        words[words.index("--user-dir") + 1] = str(plugin)
        words[words.index("--criterion") + 1] = "eventful"
        done = fairseq.run([*launcher, *words], check=False, env={"EVENTS": json.dumps(events)})
        assert done.returncode == status, done.stdout[-4000:] + done.stderr[-4000:]
        return fairseq.losses(done.stdout), done.stdout + done.stderr

    return run


def weights(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]


def same(folder, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(folder).items())


@pytest.mark.slow
def test_the_spike_guard_changes_nothing_where_there_is_no_spike(train, tmp_path):
    guarded, output = train("guarded", 40)
    plain, _ = train("plain", 40, "--spike-factor", 0)
    assert "skipped" not in output
    assert sorted(plain) == list(range(1, 41))
    assert guarded == plain
    assert same(tmp_path / "guarded", tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("model", [[], SPARSE], ids=["dense", "experts"])
def test_an_eventful_run_that_is_broken_off_goes_on_as_an_unbroken_one(train, tmp_path, model):
    """A spike is skipped; after three bad updates training goes back and on with half the learning rate."""
    events = {"spike": [28], "nan": [34, 35, 36]}
    whole, output = train("whole", 45, *model, **events)
    assert len(re.findall(r"update 28 skipped: its gradient norm \S+ is more than 10 times the median", output)) == 1
    assert (
        "Going back to checkpoint_1_30.pt (update 30), with the learning rate times 0.5 from there on; rollback 1 of 2"
        in output
    )
    assert output.count("Going back") == 1
    records = [json.loads(line.split("| train_inner |")[1]) for line in output.splitlines() if "train_inner |" in line]
    assert [int(record["num_updates"]) for record in records] == [*range(1, 36), *range(31, 46)]
    assert {record.get("skipped_spikes") for record in records[28:]} == {"1"}
    assert records[-1]["rollbacks"] == "1"
    assert records[-1]["lr_scale"] == "0.5"
    # The same batches again, from the same weights: the first loss is the same, those after smaller steps are not.
    twice = [[record["loss"] for record in records if record["num_updates"] == number] for number in ("31", "32", "33")]
    assert [len(set(each)) for each in twice] == [1, 2, 2]

    # Broken off at once after the spike, at a checkpoint, and after the rollback.
    parts = [train("broken", updates, *model, **events) for updates in (29, 30, 38, 45)]
    assert ["Going back" in text for _, text in parts] == [False, False, True, False]
    assert {update: loss for losses, _ in parts for update, loss in losses.items()} == whole
    assert same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_divergence_that_comes_back_ends_training_after_some_rollbacks(train, tmp_path):
    _, output = train("run", 45, always=list(range(34, 45)), status=1)
    targets = re.findall(r"Going back to \S+ \(update (\d+)\).* times (\S+) from there on; rollback (\d) of 2", output)
    assert targets == [("30", "0.5", "1"), ("20", "0.25", "2")]
    assert "training went back to a checkpoint 2 times already; the last checkpoint is good. Resume with" in output
    assert read_header(tmp_path / "run" / "checkpoint_last.pt").num_updates == 30
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.slow
def test_two_processes_go_back_together(fairseq, train, tmp_path):
    launcher = fairseq.command("torchrun", "--nproc_per_node", 2, "--master_port", 29633)
    losses, output = train("run", 18, launcher=launcher, nan=[14, 15, 16])
    assert sorted(losses) == list(range(1, 19))
    assert output.count("Going back to checkpoint_1_10.pt (update 10)") == 2  # both processes say so
    last = tmp_path / "run" / "checkpoint_last.pt"
    os.truncate(last, last.stat().st_size // 2)
    losses, _ = train("run", 20, launcher=launcher)
    assert sorted(losses) == list(range(11, 21))


@pytest.mark.slow
def test_broken_weights_are_noticed_at_once_and_taken_from_the_checkpoint(train, tmp_path):
    losses, output = train("run", 25, **{"break": [17]})
    assert "is not finite any more after update 16. Going back to checkpoint_1_10.pt" in output
    assert output.count("skipped:") == 1
    assert max(losses) == 25
    _, output = train("early", 25, status=1, **{"break": [5]})
    assert "There is no good checkpoint in" in output


@pytest.mark.slow
def test_training_outlives_a_full_disk_but_does_not_end_on_it(train, tmp_path):
    losses, output = train("run", 40, status=1, room={"15": 20_000, "25": -1, "35": 20_000})
    assert max(losses) == 40
    failures = re.findall(r"checkpoint_1_20.pt could not be written: File too large \(it needs about \d+ MB", output)
    assert failures
    assert "Training goes on, and tries again at the next checkpoint" in output
    assert "training ends without its last checkpoint" in output
    folder = tmp_path / "run"
    found = {path.name: read_header(path).num_updates for path in folder.glob("*.pt")}
    assert found == {"checkpoint_1_10.pt": 10, "checkpoint_1_30.pt": 30, "checkpoint_last.pt": 30}
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_a_run_with_a_damaged_last_checkpoint_goes_on_from_the_one_before(train, tmp_path):
    whole, _ = train("whole", 30)
    train("broken", 20)
    last = tmp_path / "broken" / "checkpoint_last.pt"
    os.truncate(last, last.stat().st_size // 2)
    losses, output = train("broken", 30)
    assert f"{last} is cut short" in output
    assert f"resuming from {last.with_name('checkpoint_1_10.pt')} (update 10) instead of {last}" in output
    assert losses == {update: loss for update, loss in whole.items() if update > 10}
    assert same(tmp_path / "whole", tmp_path / "broken")
