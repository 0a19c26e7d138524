"""Whole runs of fairseq-train: resume after kill and signal, numbers that are not finite, decoding of the result."""

import json
import multiprocessing
import random
import shlex
import signal
import time

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

import fairseq_plugins  # noqa: F401 - repairs loading and saving of checkpoints, which is under test

UPDATES = 150
OPTIONS = shlex.split(
    "--max-update 150 --update-freq 2 --autocast bfloat16 --identity-warmup 0.5 --identity-warmup-updates "
    "200 --identity-floor 0.05 --sampling-temperature 2 --save-interval-updates 20 "
    "--keep-interval-updates 1 --validate-interval-updates 60 --valid-limit 10 --max-tokens 200 "
    "--required-batch-size-multiple 1"
)


@pytest.fixture(scope="module")
def curriculum_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("curriculum") / "curriculum.yaml"
    path.write_text("- {start: 0.2, languages: [fr]}\n")
    return path


@pytest.fixture(scope="module")
def unbroken(fairseq, toy_data, curriculum_file, tmp_path_factory):
    save = tmp_path_factory.mktemp("unbroken")
    words = fairseq.train_command(toy_data, save, *OPTIONS, "--curriculum-file", curriculum_file)
    return save, fairseq.run(words).stdout


def test_a_broken_run_goes_on_as_if_nothing_had_happened(fairseq, toy_data, curriculum_file, unbroken, tmp_path):
    whole_folder, whole = unbroken
    words = fairseq.train_command(toy_data, tmp_path, *OPTIONS, "--curriculum-file", curriculum_file)
    seed = random.randrange(1000)
    kill_at = 25 + seed % 20
    status, first = fairseq.run_until(words, kill_at, signal.SIGKILL)
    assert status == -signal.SIGKILL
    status, second = fairseq.run_until(words, 70 + seed % 40, signal.SIGTERM)
    assert status == 143
    assert "run the same command again to go on" in second
    third = fairseq.run(words).stdout

    expected = fairseq.losses(whole)
    assert sorted(expected) == list(range(1, UPDATES + 1))
    parts = [fairseq.losses(text) for text in (first, second, third)]
    for part in parts:
        assert {update: expected[update] for update in part} == part, f"seed {seed}"
    assert set().union(*parts) == set(expected)
    # After SIGTERM nothing is done twice; after SIGKILL from the last checkpoint on.
    assert min(parts[2]) == max(parts[1]) + 1
    folders = (whole_folder, tmp_path)
    final = [torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"] for folder in folders]
    assert all(torch.equal(value, final[1][name]) for name, value in final[0].items())


def test_log_has_losses_by_direction_and_the_curriculum(unbroken):
    _, output = unbroken
    valid = [json.loads(line.split("| valid |")[1]) for line in output.splitlines() if "| valid |" in line]
    assert {f"valid_nll_loss_{d}" for d in ("de-en", "en-de", "en-fr", "fr-en")} <= set(valid[0])
    assert "from update 30 also en-fr, fr-en" in output
    assert "epoch 1 from update 0: " in output
    assert "from update 30: 720 sentences of 4 directions" in output


def test_generate_interactive_and_validate(fairseq, toy_data, unbroken):
    path = unbroken[0] / "checkpoint_last.pt"
    plugins = fairseq.root / "fairseq_plugins"
    common = [toy_data, "--user-dir", plugins, "--task", "mtmoe_translation", "--path", path, "--cpu"]
    words = fairseq.command(
        "fairseq-generate", *common, "-s", "en", "-t", "de", "--gen-subset", "test", "--beam", 2, "--max-len-b", 20
    )
    done = fairseq.run(words).stdout
    hypotheses = [line for line in done.splitlines() if line.startswith("H-")]
    assert len(hypotheses) == 6
    assert not any("__" in line for line in hypotheses)  # the tag is forced, never searched
    assert [line for line in done.splitlines() if line.startswith("S-0\t__en__ ")]
    reference = [line.split("\t") for line in done.splitlines() if line.startswith("T-")]
    assert all(" __" not in text for _, text in reference)

    words = fairseq.command("fairseq-interactive", *common, "-s", "fr", "-t", "en", "--beam", 1, "--max-len-b", 20)
    done = fairseq.run(words, input="▁w3 ▁w4\n▁w1 ▁w9 ▁w2\n").stdout
    assert [line[:11] for line in done.splitlines() if line.startswith("S-")] == ["S-0\t__fr__ ", "S-1\t__fr__ "]
    assert sum(line.startswith("H-") for line in done.splitlines()) == 2

    criterion = ["--criterion", "mtmoe_label_smoothed_cross_entropy"]
    words = fairseq.command("fairseq-validate", *common, *criterion, "--max-tokens", 400)
    assert "nll_loss_en-fr" in fairseq.run(words).stdout

    refused = fairseq.run(fairseq.command("fairseq-generate", *common, "--gen-subset", "test"), check=False)
    assert "give --source-lang and --target-lang" in refused.stderr


PLUGIN = """
import os

import fairseq_plugins.tasks.mtmoe_translation
from fairseq.criterions import register_criterion
from fairseq_plugins.criterions.label_smoothed_cross_entropy import (
    MtmoeCriterionConfig, MtmoeLabelSmoothedCrossEntropy,
)

BAD = {int(word) for word in os.environ["BAD_UPDATES"].split(",")}


@register_criterion("sometimes_nan", dataclass=MtmoeCriterionConfig)
class SometimesNan(MtmoeLabelSmoothedCrossEntropy):
    def forward(self, model, sample, reduce=True):
        loss, size, log = super().forward(model, sample)
        if model.training and self.task.num_updates in BAD:
            bad = float("inf") if self.task.num_updates % 2 else float("nan")
            loss = loss + bad  # an infinite loss has a finite gradient
            log["loss"] = loss.detach()
        return loss, size, log
"""


def test_numbers_that_are_not_finite_are_skipped_and_then_stop_training(fairseq, toy_data, tmp_path):
    plugin = tmp_path / "nan_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(PLUGIN)
    words = fairseq.train_command(toy_data, tmp_path / "run", "--disable-validation", "--max-nonfinite-updates", 3)
    words[words.index("--user-dir") + 1] = str(plugin)
    words[words.index("--criterion") + 1] = "sometimes_nan"
    done = fairseq.run([*words, "--max-update", "12"], env={"BAD_UPDATES": "3,4,7,11"}).stdout
    records = [json.loads(line.split("| train_inner |")[1]) for line in done.splitlines() if "| train_inner |" in line]
    assert [int(record["num_updates"]) for record in records] == list(range(1, 13))
    assert records[-1]["skipped_updates"] == "4"
    assert "skipped_updates" not in records[2]
    epoch = json.loads(next(line for line in done.splitlines() if "| train |" in line).split("| train |")[1])
    assert 5.0 < float(epoch["train_loss"]) < 7.0  # no NaN in the averages

    # A resumed run goes on counting: one was skipped before, so two more in a row are too many.
    words += ["--max-update", "30", "--rollbacks", "0"]
    failed = fairseq.run(words, check=False, env={"BAD_UPDATES": "12,13,14,15,16"})
    assert failed.returncode == 1
    assert "3 updates in a row had a loss or gradient that is not finite, or far too large, up to" in failed.stderr
    assert "up to update 14 (--max-nonfinite-updates sets this limit). --rollbacks is 0" in failed.stderr
    assert "Resume with a lower --lr" in failed.stderr


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """Checkpoints are written by a process that is killed at random moments; what is there always loads."""
    best, last = tmp_path / "checkpoint_best.pt", tmp_path / "checkpoint_last.pt"

    def save_for_ever():
        number = 0
        while True:
            number += 1
            checkpoint_utils.torch_persistent_save({"x": torch.full((300_000,), float(number))}, str(best))
            PathManager.copy(str(best), str(last), overwrite=True)

    generator = random.Random()
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        process.start()
        while not last.exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0.001, 0.06))
        process.kill()
        process.join()
        for path in (best, last):
            value = torch.load(path, weights_only=True)["x"]
            assert (value == value[0]).all()


@pytest.mark.slow
def test_torchrun_trains_one_model_with_two_processes(fairseq, toy_data, tmp_path):
    words = fairseq.train_command(toy_data, tmp_path, "--max-update", 6, "--disable-validation")
    done = fairseq.run([*fairseq.command("torchrun", "--nproc_per_node", 2, "--master_port", 29631), *words]).stdout
    updates = [line for line in done.splitlines() if "| train_inner |" in line]
    assert len(updates) == 6  # only the first process logs, and it logs the tokens of both
    assert float(json.loads(updates[0].split("| train_inner |")[1])["wpb"]) > 200


# 16 experts and few tokens, so that most updates leave some experts out.
SPARSE = shlex.split(
    "--arch mtmoe_transformer_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 16 "
    "--decoder-ffn-embed-dim 16 --moe-freq 1 --num-experts 16 --top-k 1 "
    "--normalize-weights none --max-tokens 24 --max-sentences 2 --required-batch-size-multiple 1 "
    "--weight-decay 0.01 --disable-validation"
)


@pytest.mark.slow
def test_experts_that_wait_for_their_updates_change_nothing(fairseq, toy_data, tmp_path):
    """Exact updates train as dense ones do, and go on bit by bit from a save that the unbroken run did not do."""

    def train(name, updates, *options):
        words = fairseq.train_command(toy_data, tmp_path / name, *SPARSE, "--max-update", updates, *options)
        return fairseq.losses(fairseq.run(words).stdout)

    exact = train("exact", 60, "--update-freq", 2)
    dense = train("dense", 60, "--update-freq", 2, "--expert-updates", "dense")
    first, second = (train("broken", updates, "--update-freq", 2) for updates in (33, 60))
    assert {**first, **second} == exact
    assert sorted(second) == list(range(34, 61))
    files = {name: tmp_path / name / "checkpoint_last.pt" for name in ("exact", "dense", "broken")}
    models = {name: torch.load(path, weights_only=True) for name, path in files.items()}
    for name, value in models["exact"]["model"].items():
        assert torch.equal(models["broken"]["model"][name], value)
        if value.is_floating_point():
            torch.testing.assert_close(models["dense"]["model"][name], value, rtol=0, atol=1e-3)
    losses = [[float(line.split()[0]) for line in run.values()] for run in (exact, dense)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    states = models["exact"]["last_optimizer_state"]["state"].values()
    touched = [state["touched"] for state in states if "touched" in state]
    assert len(touched) == 2 * 4
    assert any(min(each) < 60 for each in touched)  # the test is about something


@pytest.mark.slow
def test_two_processes_agree_on_the_experts_they_touched(fairseq, toy_data, tmp_path):
    models = []
    for updates in ("exact", "dense"):
        options = [*SPARSE, "--max-update", 30, "--expert-updates", updates]
        words = fairseq.train_command(toy_data, tmp_path / updates, *options)
        # fairseq itself stops when the processes' gradient norms differ.
        fairseq.run([*fairseq.command("torchrun", "--nproc_per_node", 2, "--master_port", 29632), *words])
        models.append(torch.load(tmp_path / updates / "checkpoint_last.pt", weights_only=True)["model"])
    for name, value in models[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(models[1][name], value, rtol=0, atol=1e-3)
