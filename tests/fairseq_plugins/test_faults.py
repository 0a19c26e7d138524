"""Trainings whose processes are killed, cut off from each other, or write on a full disk."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks stand beside the package, not in it
from benchmarks import faults, namespaces
from mtmoe.checkpoint import sharded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # a busy machine: they take up to a minute on an idle core

TIMEOUT = 30
"""Seconds for which processes wait for each other; longer than the slowest of them takes to start."""

ENOUGH = 120
"""More seconds for them to end, on a busy machine."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    faults.write_corpus(folder, 300, words=40)
    return folder


def test_killed_processes_cost_no_batch_and_repeat_none_that_was_saved(data, tmp_path):
    """`python -m benchmarks.faults` does it ten times in a row."""
    kills, updates = 3, 45
    unbroken = faults.train(tmp_path / "unbroken", data, updates)
    assert unbroken.status == 0, unbroken.output
    broken = faults.train(tmp_path / "broken", data, updates, kills, seed=2)
    assert broken.status == 0, broken.output
    assert len(broken.kills) == kills
    assert {kill.moment for kill in broken.kills} == {"save", "updates"}
    assert f"restart {kills} of {kills}" in broken.output
    assert faults.problems(tmp_path / "unbroken", tmp_path / "broken", broken.kills, updates) == []
    # What would be noticed.
    log = (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    changed = [line.replace('"wpb": ', '"wpb": 1') if '"num_updates": 7,' in line else line for line in log]
    changed = [line for line in changed if '"num_updates": 9,' not in line]
    (tmp_path / "broken" / "log.jsonl").write_text("\n".join(changed))
    found = "\n".join(faults.problems(tmp_path / "unbroken", tmp_path / "broken", broken.kills, updates))
    assert "updates [9] are not in the log" in found and "update 7: wpb is" in found
    assert "update 8 is followed by 10" in found


@pytest.fixture
def train(data, tmp_path):
    """Starts `mtmoe train`; ends it with the test."""
    started = []

    def start(*words, enter=list, environment=None, **options):
        preset = faults.write_preset(tmp_path / "run", data, 100_000)
        document = yaml.safe_load(preset.read_text())
        document["options"] |= options
        preset.write_text(yaml.safe_dump(document))
        command = enter([sys.executable, "-m", "mtmoe", "train", preset, *words])
        output = tmp_path / f"{len(started)}.out"
        with output.open("w") as file:
            variables = (environment or dict(os.environ)) | {"PYTHONPATH": str(faults.ROOT), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=variables)
        started.append((process, output))
        return process, output

    yield start
    for process, _ in started:
        process.kill()
        process.wait()


def wait_for(condition, processes, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def updates(folder):
    """Of the log, so far."""
    return [record["num_updates"] for record in faults.records(folder)] if (folder / "log.jsonl").exists() else []


def processes_in(host):
    """Their numbers."""
    found = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True)
    return found.stdout.split()


@pytest.fixture
def hosts():
    """Two."""
    reason = namespaces.why_not()
    if reason:
        pytest.skip(reason)
    with namespaces.hosts(2) as made:
        yield made


def test_hosts_that_lose_each_other_end_with_an_error(hosts, train, tmp_path):
    words = ["--nnodes", 2, "--nproc", 1, "--rdzv-endpoint", f"{hosts[0].address}:29500"]
    started = [
        train(*words, enter=host.command, environment=host.environment(), **{"collective-timeout": TIMEOUT})
        for host in hosts
    ]
    processes = [process for process, _ in started]
    wait_for(lambda: 7 in updates(tmp_path / "run"), processes)
    hosts[1].take_down()
    cut = time.monotonic()
    statuses = [process.wait(timeout=TIMEOUT + ENOUGH) for process in processes]
    assert time.monotonic() - cut > TIMEOUT / 2
    outputs = [output.read_text() for _, output in started]
    assert statuses == [1, 1], outputs
    assert [processes_in(host) for host in hosts] == [[], []]
    for output in outputs:
        assert re.search(rf"rank \d failed: RuntimeError: .*Timed out waiting {TIMEOUT}000ms", output)
    assert "as long as --collective-timeout allows" in outputs[0]
    assert f"this machine has lost the connection to {hosts[0].address}:29500" in outputs[1]
    # What was saved is there to go on from; the save that came next may have been cut off too.
    last = (tmp_path / "run" / "checkpoints" / "checkpoint_last.pt").resolve()
    sharded.read_state(last)
    assert 0 <= updates(tmp_path / "run")[-1] - int(last.name.rpartition("_")[2]) <= 2 * faults.SAVE_EVERY


@pytest.fixture
def small_disk(tmp_path):
    """The folder of the checkpoints, on a file system of its own."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file systems can be mounted here (it takes root): {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path):
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_training_outlives_a_full_disk_but_does_not_end_on_it(train, small_disk, tmp_path):
    process, output = train("--nproc", 2)
    filler, last = small_disk / "filler", small_disk / "checkpoint_last.pt"
    log = tmp_path / "run" / "logs" / "rank0.log"

    def failures():
        return log.read_text().count("could not be written: No space left on device")

    def fill_until_saves_fail(times):
        already = failures()
        wait_for(lambda: fill(filler) or failures() >= already + times, [process])  # a save under way makes room again

    for _ in range(2):
        wait_for(last.exists, [process])
        fill_until_saves_fail(2)
        kept = last.readlink()
        assert (small_disk / kept / "manifest.json").exists()
        sharded.read_state(small_disk / kept)
        reached = updates(tmp_path / "run")[-1]
        wait_for(lambda reached=reached: updates(tmp_path / "run")[-1] > reached + 5, [process])  # it goes on
        assert last.readlink() == kept
        filler.unlink()
        wait_for(lambda kept=kept: last.readlink() != kept, [process])
    fill_until_saves_fail(2)
    kept = last.readlink()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=TIMEOUT + ENOUGH) == 1
    text = output.read_text()
    assert re.search(r"rank \d failed while it was stopping: NotWritten: training ends without .*No space", text)
    assert "The checkpoint before is whole; make room, and run the same command again" in text
    assert last.readlink() == kept
    sharded.read_state(small_disk / kept)
    assert not list(small_disk.glob(".*"))
