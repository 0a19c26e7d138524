"""Whole trainings with two processes: `mtmoe train --nproc 2`, what fails in them, and fairseq's own flags."""

import json
import signal
import socket
import subprocess
import sys

import pytest
import yaml

pytestmark = pytest.mark.timeout(600)  # a busy machine: each test starts up to nine processes

OPTIONS = {
    "encoder-layers": 1, "decoder-layers": 1, "encoder-embed-dim": 16, "decoder-embed-dim": 16,
    "encoder-ffn-embed-dim": 32, "decoder-ffn-embed-dim": 32, "encoder-attention-heads": 2,
    "decoder-attention-heads": 2, "share-all-embeddings": True, "dropout": 0.1, "lr": 0.003, "clip-norm": 1.0,
    "max-tokens": 256, "log-interval": 1, "seed": 3, "cpu": True, "max-update": 16, "disable-validation": True,
    "no-epoch-checkpoints": True, "save-interval-updates": 5, "keep-interval-updates": 1,
}  # fmt: skip

# Rank 1 does what FAULT says at update 8, in its first life.
PLUGIN = """
import os, signal, time

import fairseq_plugins.tasks.mtmoe_translation
from fairseq.criterions import register_criterion
from fairseq_plugins.criterions.label_smoothed_cross_entropy import (
    MtmoeCriterionConfig, MtmoeLabelSmoothedCrossEntropy,
)


@register_criterion("faulty", dataclass=MtmoeCriterionConfig)
class Faulty(MtmoeLabelSmoothedCrossEntropy):
    def forward(self, model, sample, reduce=True):
        first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if self.task.num_updates == 8 and os.environ["RANK"] == "1" and first_life:
            fault = os.environ["FAULT"]
            if fault == "raise":
                raise ValueError("broken on purpose")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(600)
        return super().forward(model, sample)
"""

# `mtmoe train`, with another folder of plugins where one is given.
MTMOE = """
import pathlib, sys
from mtmoe.cli import main
from mtmoe.training import preset

plugin = sys.argv.pop(1)
if plugin:
    preset.plugin_folder = lambda: pathlib.Path(plugin)
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture
def train(fairseq, toy_data, tmp_path):
    """Runs a preset with two processes and returns its status and output."""
    plugin = tmp_path / "faulty_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(PLUGIN)

    def run(output, *words, fault="", stop_at=0, **options):
        document = {
            "data": str(toy_data), "output": str(output), "arch": "transformer", "options": {**OPTIONS, **options},
            "criterion": "faulty" if fault else "mtmoe_label_smoothed_cross_entropy",
        }  # fmt: skip
        path = tmp_path / "preset.yaml"
        path.write_text(yaml.safe_dump(document))
        words = [sys.executable, "-c", MTMOE, str(plugin) if fault else "", path, "--nproc", "2", *words]
        lines = []
        process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=fairseq.environment(FAULT=fault),
        )  # fmt: skip
        try:
            for line in process.stdout:
                lines.append(line)
                if stop_at and line.startswith(f"update {stop_at:>6}"):
                    process.send_signal(signal.SIGTERM)
            return process.wait(), "".join(lines)
        finally:
            process.kill()  # whatever it has started ends with it

    return run


def updates(folder):
    """Update -> its loss, of each line of metrics in a run folder, in their order."""
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(record["num_updates"], record["loss"]) for record in records if record["kind"] == "train_inner"]


@pytest.mark.slow
def test_two_processes_train_one_model_and_go_on_with_it(train, tmp_path):
    folder = tmp_path / "run"
    status, output = train(folder, stop_at=7)
    assert status == 143, output
    stopped = len(updates(folder))
    assert 7 <= stopped < 16
    assert "begin training epoch" in (folder / "logs" / "rank0.log").read_text()
    assert "begin training epoch" not in (folder / "logs" / "rank1.log").read_text()
    assert "stopped by SIGTERM after update" in (folder / "logs" / "rank1.log").read_text()
    status, output = train(folder)
    assert status == 0, output
    assert [update for update, _ in updates(folder)] == list(range(1, 17))  # nothing is done twice


@pytest.mark.slow
def test_the_error_of_a_rank_is_shown(train, tmp_path):
    status, output = train(tmp_path / "run", fault="raise")
    assert status == 1
    first = output[output.index("rank 1 failed: ValueError: broken on purpose (") :]
    assert first.index('  raise ValueError("broken on purpose")') < first.index("rank 0 failed: RuntimeError: ")
    assert "broken on purpose" in (tmp_path / "run" / "logs" / "rank1.log").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_in_an_error(train, tmp_path):
    status, output = train(tmp_path / "run", fault="hang", **{"collective-timeout": 30})
    assert status == 1
    assert "Timed out waiting 30000ms" in output
    assert "as long as --collective-timeout allows" in output
    assert updates(tmp_path / "run")[-1][0] == 8


@pytest.mark.slow
def test_a_killed_rank_costs_what_was_not_saved(train, tmp_path):
    status, output = train(tmp_path / "run", "--max-restarts", 1, fault="kill")
    assert status == 0, output
    assert "restart 1 of 1" in output
    found = updates(tmp_path / "run")
    assert [update for update, _ in found] == [*range(1, 9), *range(6, 17)]
    assert found[5:8] == found[8:11]  # updates 6 to 8 twice, alike


@pytest.mark.slow
def test_fairseqs_own_flags_start_processes_on_cpus(fairseq, toy_data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    flags = ["--distributed-world-size", 2, "--distributed-init-method", address, "--max-update", 2]
    processes = []
    for rank in range(2):
        words = fairseq.train_command(
            toy_data, tmp_path, *flags, "--distributed-rank", rank, "--disable-validation", "--no-save"
        )
        env = fairseq.environment(GLOO_SOCKET_IFNAME="lo")
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(fairseq.losses(outputs[0])) == 2
    assert not fairseq.losses(outputs[1])

    alone = fairseq.run(fairseq.train_command(toy_data, tmp_path, "--distributed-world-size", 2), check=False)
    assert "nobody starts the other processes; use `mtmoe train --nproc 2`" in alone.stderr


def test_an_impossible_limit_is_refused(fairseq, toy_data, tmp_path):
    done = fairseq.run(fairseq.train_command(toy_data, tmp_path, "--collective-timeout", 0), check=False)
    assert "collective-timeout=0 must be above 0 seconds" in done.stderr
