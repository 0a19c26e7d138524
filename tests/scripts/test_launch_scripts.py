"""The scripts that start training on several machines: for real with two processes, and under a stand-in for Slurm."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TORCHRUN, SLURM = SCRIPTS / "train_torchrun.sh", SCRIPTS / "train_slurm.sbatch"

# Each stand-in writes down its words.
STUBS = {
    "mtmoe": """
printf '%s\\n' "$*" >> "$LOG/mtmoe"
if [[ ${WAIT:-} ]]; then
    trap 'exit 143' TERM
    echo $$ > "$LOG/pid"
    while true; do sleep 0.02; done
fi
exit "${STATUS:-0}"
""",
    "srun": """
printf '%s\\n' "$*" >> "$LOG/srun"
trap 'touch "$LOG/srun-was-signalled"' TERM
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
    "scontrol": """
printf '%s\\n' "$*" >> "$LOG/scontrol"
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; fi
""",
    "scancel": """
printf '%s\\n' "$*" >> "$LOG/scancel"
kill -TERM "$(cat "$LOG/pid")"
""",
    "nvidia-smi": """
for ((i = 0; i < ${GPUS:-0}; i++)); do echo "GPU $i: some model (UUID: x)"; done
""",
}
JOB = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def stubs(tmp_path):
    """The folder in which stand-ins write, and the environment in which scripts find them."""
    found, log = tmp_path / "bin", tmp_path / "log"
    found.mkdir()
    log.mkdir()
    for name, text in STUBS.items():
        (found / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (found / name).chmod(0o755)
    names = ("NPROC", "NNODES", "MASTER_ADDR", "MASTER_PORT", "RUN_ID", "MAX_RESTARTS", "SLURM_GPUS_ON_NODE")
    env = {key: value for key, value in os.environ.items() if key not in names}
    return log, {**env, "PATH": f"{found}:{env['PATH']}", "LOG": str(log)}


def run(script, env, *words):
    return subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", [TORCHRUN, SLURM, SCRIPTS / "demo.sh"])
def test_they_are_whole(script):
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck")
    if checker:
        done = subprocess.run([checker, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "--nproc 1 --nnodes 1 --max-restarts 0"),
        ({"GPUS": "4"}, "--nproc 4 --nnodes 1 --max-restarts 0"),
        ({"GPUS": "4", "NPROC": "2", "MAX_RESTARTS": "3"}, "--nproc 2 --nnodes 1 --max-restarts 3"),
        (
            {"NNODES": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "3", "RUN_ID": "r"},
            "--nproc 1 --nnodes 2 --max-restarts 0 --rdzv-endpoint node1:3 --rdzv-id r",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "node1"},
            "--nproc 1 --nnodes 2 --max-restarts 0 --rdzv-endpoint node1:29500 --rdzv-id mtmoe",
        ),
    ],
)
def test_torchrun_passes_on_where_to_meet(stubs, variables, expected):
    folder, env = stubs
    assert run(TORCHRUN, {**env, **variables, "STATUS": "9"}, "c.yaml", "--set", "a b=1").returncode == 9
    assert (folder / "mtmoe").read_text() == f"train c.yaml --set a b=1 {expected}\n"


@pytest.mark.parametrize(
    ("variables", "words", "status", "text"),
    [
        ({}, ["--help"], 0, "usage: scripts/train_torchrun.sh CONFIG.yaml"),
        ({}, [], 2, "usage: scripts/train_torchrun.sh CONFIG.yaml"),
        ({"NNODES": "2"}, ["c.yaml"], 2, "NNODES=2 needs MASTER_ADDR: the name or address of one of the machines"),
    ],
)
def test_torchrun_says_how_it_is_used(stubs, variables, words, status, text):
    folder, env = stubs
    done = run(TORCHRUN, {**env, **variables}, *words)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert not (folder / "mtmoe").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_a_slurm_job_ends_with_training(stubs, status):
    folder, env = stubs
    done = run(SLURM, {**env, **JOB, "SLURM_GPUS_ON_NODE": "8", "STATUS": str(status)}, "c.yaml", "--set", "a=1")
    assert done.returncode == status, done.stderr
    meets = "--rdzv-endpoint node7:24567 --rdzv-id slurm-1234567-0"
    train = f"train c.yaml --set a=1 --nproc 8 --nnodes 2 --max-restarts 0 {meets}\n"
    assert (folder / "mtmoe").read_text() == train
    assert (folder / "srun").read_text() == f"--ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 mtmoe {train}"
    assert (folder / "scontrol").read_text() == "show hostnames node[7-8]\n"


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_job_is_queued_again_before_its_time_limit(stubs, number, again):
    folder, env = stubs
    job = subprocess.Popen(["bash", SLURM, "c.yaml"], env={**env, **JOB, "WAIT": "1", "SLURM_RESTART_COUNT": "2"})
    end = time.monotonic() + 30
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(30) == 143
    assert "--rdzv-id slurm-1234567-2" in (folder / "mtmoe").read_text()
    assert (folder / "scancel").read_text() == "--signal=TERM 1234567\n"
    assert not (folder / "srun-was-signalled").exists()
    assert ("requeue 1234567" in (folder / "scontrol").read_text()) == again


def test_a_slurm_job_without_a_preset_says_how_it_is_used(stubs):
    folder, env = stubs
    done = run(SLURM, {**env, **JOB})
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
    assert not (folder / "srun").exists()


PRESET = """
data: {data}
output: {run}
arch: mtmoe_transformer_tiny
options:
  directions: de-en,en-de
  encoder-layers: 1
  decoder-layers: 1
  encoder-embed-dim: 32
  encoder-ffn-embed-dim: 32
  num-experts: 2
  max-tokens: 512
  max-update: 3
  lr: 0.001
  log-interval: 1
  disable-validation: true
  cpu: true
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_trains_with_two_processes(tmp_path):
    bin_folder, root = Path(sys.executable).parent, SCRIPTS.parent
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(root), "NPROC": "2"}
    data, run_folder = tmp_path / "data", tmp_path / "run"
    words = [sys.executable, "-m", "mtmoe", "prepare", "data/sample.yaml", "--output", data]
    subprocess.run(words, cwd=root, env=env, check=True, timeout=300, stdout=subprocess.DEVNULL)
    (tmp_path / "preset.yaml").write_text(PRESET.format(data=data, run=run_folder))
    done = subprocess.run(
        [TORCHRUN, tmp_path / "preset.yaml", "--set", "threads=1"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run_folder / "checkpoints" / "checkpoint_last.pt").exists()
    assert {path.name for path in (run_folder / "logs").iterdir()} == {"rank0.log", "rank1.log"}
