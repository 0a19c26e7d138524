"""Real processes of a stand-in for fairseq-train, under `mtmoe.training.launcher` and torch's elastic launcher."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

from mtmoe.cli import main
from mtmoe.errors import ConfigError
from mtmoe.training import elastic, launcher, preset, time_budget
from mtmoe.training.elastic import RankLogs, explain, put_aside
from mtmoe.training.preset import TrainConfig, load_config
from mtmoe.training.process import ECHO_SECONDS, build_environment

ROOT = Path(__file__).parents[2]

FAKE = """
import json, os, pathlib, signal, sys, time
rank, words = os.environ.get("RANK", "0"), sys.argv[1:]
def told(name): return name in words and words[words.index(name) + 1] == rank
asked = []
def stop(number, _):
    asked.append(number)  # as the plugin does, it counts echoes as one
if "--save" in words:
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)
print("pid", os.getpid(), "words", words, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
print("an error of rank", rank, file=sys.stderr, flush=True)
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
if first and told("--fail"): raise SystemExit("the reason of rank " + rank)
if told("--kill"): os.kill(os.getpid(), signal.SIGKILL)
wait = "--wait" in words or (first and "--fail" in words) or "--kill" in words
update = 0
while update < 30 or wait:
    update += 10
    if update > 30: time.sleep(0.02)
    if asked:
        time.sleep(0.5)
        print("saved after", signal.Signals(asked[0]).name, flush=True)
        sys.exit(128 + asked[0])
    if update > 30 and "--silent" in words: continue  # as fairseq's logging, it survives that nobody reads
    metrics = {"loss": "2.5", "num_updates": str(update), "lr": "0.1", "ups": "3", "wps": "100"}
    print("2026-01-02 03:04:05 | INFO | train_inner |", json.dumps(metrics), flush=True)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes presets whose fairseq-train is the stand-in."""
    script = tmp_path / "fairseq-train"
    script.write_text(f"#!{sys.executable}\n{FAKE}")
    script.chmod(0o755)
    monkeypatch.setattr(preset, "_program", lambda name: script)
    data = tmp_path / "data"
    data.mkdir()
    (data / "languages.json").write_text("{}")
    (data / "dict.txt").write_text("")

    def config(**changes):
        return TrainConfig(data=str(data), output=str(tmp_path / "run"), **{"nproc": 2, "threads": 1, **changes})

    return config


@pytest.fixture
def start():
    """Starts `mtmoe train` as a process of its own."""
    begun = []

    def begin(config):
        code = (
            "from mtmoe.training import launcher, preset\n"
            "import pathlib, sys\n"
            f"preset._program = lambda name: pathlib.Path({str(Path(config.data).with_name('fairseq-train'))!r})\n"
            f"config = preset.TrainConfig(**{asdict(config)!r})\n"
            "sys.exit(launcher.train(config, report=lambda line: print(line, flush=True)))\n"
        )
        words, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()


def rank_log(config, rank):
    return (config.folder / "logs" / f"rank{rank}.log").read_text()


def pid(config, rank):
    found = re.search(r"pid (\d+)", rank_log(config, rank) if config.nproc > 1 else read(config.folder / "train.log"))
    return int(found[1])


def test_options_of_the_command_line_change_the_preset(make, monkeypatch):
    path = Path(make().data).with_name("c.yaml")
    path.write_text(f"data: {make().data}\noutput: o\nnproc: 3\nmax_restarts: 2\n")
    seen = []
    monkeypatch.setattr(launcher, "train", lambda config, **_: seen.append(config) or 0)
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path), "--nproc", "2", "--nnodes", "2", "--rdzv-endpoint", "a:1", "--rdzv-id", "x"]) == 0
    found = [(c.nproc, c.max_restarts, c.nnodes, c.rdzv_endpoint, c.rdzv_id, c.minutes) for c in seen]
    assert found == [(3, 2, 1, "", "mtmoe", 0.0), (2, 2, 2, "a:1", "x", 0.0)]


def read(path):
    return path.read_text()


def wait_for(condition, seconds=60):
    """Wait until it is true; a file that is not there yet counts as false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError, TypeError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError("that did not come true in time")


def ended(number):
    """Whether a process is gone, or dead and not yet fetched by the system's first process."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def children(number):
    return list(map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split()))


def test_two_processes_share_a_run_and_have_their_own_logs(make):
    config = make(options={"dollar": "$HOME $${x}"})
    lines = []
    assert launcher.train(config, report=lines.append) == 0, lines
    for rank in (0, 1):
        assert f"an error of rank {rank}\n" in rank_log(config, rank)
        assert "'--dollar', '$HOME $${x}'" in rank_log(config, rank)
        assert rank_log(config, rank).count("train_inner") == 3
    records = [json.loads(line) for line in (config.folder / "log.jsonl").read_text().splitlines()]
    assert [record["num_updates"] for record in records] == [10, 20, 30]
    assert read(config.folder / "train.log") == rank_log(config, 0)
    assert json.loads((config.folder / "run.json").read_text())["config"]["nproc"] == 2
    assert f"processes: 2; their logs are {config.folder}/logs/rank*.log" in lines


def test_cores_are_divided_between_processes(make, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    lines = []
    for nproc, threads in ((1, "7"), (2, "3"), (3, "2"), (8, "1")):
        assert build_environment(make(nproc=nproc, threads=0), lines.append)["OMP_NUM_THREADS"] == threads
    assert "threads: 3 for each of 2 processes" in lines
    assert build_environment(make(options={"cpu": True}), lines.append)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_the_others_and_is_named(make, rank):
    config, lines, begun = make(options={"fail": rank, "save": True}), [], time.monotonic()
    assert launcher.train(config, report=lines.append) == 1
    assert time.monotonic() - begun < 60
    text = "\n".join(lines)
    place = text.index(f"rank {rank} failed with status 1 ({config.folder}/logs/rank{rank}.log)\n")
    assert f"  the reason of rank {rank}" in text[place:]
    assert f"rank {1 - rank} failed with status 143" in text[place:]
    assert f"the reason of rank {rank}" in read(config.folder / "train.log")
    assert all(ended(pid(config, each)) for each in (0, 1))


def test_a_rank_that_is_killed_is_named_though_it_says_nothing(make):
    config, lines = make(options={"kill": 1}), []
    assert launcher.train(config, report=lines.append) == 137
    assert f"rank 1 was ended by SIGKILL, as the system does when memory runs out ({config.folder}" in "\n".join(lines)
    assert "  an error of rank 1" in lines
    assert not rank_log(config, 0) or ended(pid(config, 0))  # it may have been ended before it said anything


def test_all_start_again_as_often_as_allowed(make):
    config, lines = make(options={"fail": 1}, max_restarts=1), []
    assert launcher.train(config, report=lines.append) == 0
    assert "the reason of rank 1" in read(config.folder / "logs" / "rank1.log.1")
    assert "the reason" not in rank_log(config, 1)
    assert any(line.startswith("restart 1 of 1: a process failed; the logs until then are") for line in lines)


@pytest.mark.parametrize(("number", "everywhere"), [(15, False), (2, False), (15, True)])
def test_a_signal_reaches_every_rank(make, start, number, everywhere):
    number = signal.Signals(number)
    config = make(options={"wait": True, "save": True})
    process = start(config)
    wait_for(lambda: all("train_inner" in rank_log(config, rank) for rank in (0, 1)))
    if everywhere:  # as Slurm and systemd do
        os.kill(children(process.pid)[0], number)
        for rank in (0, 1):
            os.kill(pid(config, rank), number)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    for rank in (0, 1):
        assert rank_log(config, rank).count(f"saved after {number.name}") == 1
        assert ended(pid(config, rank))
    assert f"saved after {number.name}" in read(config.folder / "train.log")
    assert "training was stopped; the same command goes on with it" in output


def test_a_second_signal_does_not_wait(make, start):
    config = make(options={"wait": True, "save": True})
    process = start(config)
    wait_for(lambda: all("train_inner" in rank_log(config, rank) for rank in (0, 1)))
    os.kill(pid(config, 1), signal.SIGSTOP)  # it does not react to the first
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: "saved after SIGTERM" in rank_log(config, 0))
    process.send_signal(signal.SIGTERM)  # an echo of the first: nothing changes
    time.sleep(ECHO_SECONDS)
    assert not ended(pid(config, 1))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    wait_for(lambda: ended(pid(config, 1)), seconds=10)


@pytest.mark.parametrize("nproc", [1, 2])
def test_nothing_is_left_when_it_is_killed(make, start, nproc):
    config = make(options={"wait": True, "save": True, "silent": True}, nproc=nproc)
    process = start(config)
    wait_for(lambda: "train_inner" in read(config.folder / "train.log"))
    ranks = [pid(config, rank) for rank in range(nproc)]
    launched = [*ranks, *children(process.pid)]
    assert not any(map(ended, launched))
    process.kill()
    process.wait()
    try:
        wait_for(lambda: all(map(ended, launched)), seconds=10)
    finally:
        for number in launched:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def test_two_machines_meet_and_share_a_run_folder(make, start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    config = make(nproc=1, nnodes=2, rdzv_endpoint=endpoint)
    machines = [start(config) for _ in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert all(f"an error of rank {rank}\n" in rank_log(config, rank) for rank in (0, 1))
    assert len((config.folder / "log.jsonl").read_text().splitlines()) == 3  # of rank 0 alone
    assert all("processes: 1 on each of 2 machines" in output for output in outputs)


def test_a_time_budget_is_measured_with_all_processes(make, monkeypatch):
    monkeypatch.setattr(time_budget, "CALIBRATION_SECONDS", 0.5)
    config = make(minutes=10, options={"wait": True})  # the processes may take long to start
    changes = time_budget.time_budget(config, build_environment(config), print)
    assert 0.0005 < json.loads(read(config.folder / "calibration.json"))["update_seconds"] < 0.1
    assert changes["max_update"] > 100
    assert not (config.folder / "logs").exists()


def failure(logs, rank, exitcode, message=None, seconds=0.0):
    """What torch reports of a rank that ended `seconds` after 1000."""
    if message is not None:
        extra = {"py_callstack": f"Traceback of {rank}\n{message}", "timestamp": str(int(1000 + seconds))}
        logs.error(rank).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        os.utime(logs.error(rank), (1000 + seconds, 1000 + seconds))
    found = ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(logs.error(rank)))
    found.timestamp = int(1000 + seconds)
    return found


@pytest.mark.parametrize(
    ("endings", "first", "status"),
    [
        # (exit status, message, seconds) of rank 0, 1, 2: the peers of one that failed lose their connection.
        ([(1, "lost", 0.4), (1, "cause", 0.3), (1, "lost", 0.5)], 1, 1),
        ([(1, "lost", 0.9), (-15, None, 1.1), (1, "cause", 0.8)], 2, 1),
        ([(1, "lost", 0.4), (-9, None, 0.5), (143, None, 0.5)], 1, 137),
        ([(143, None, 0.0), (-9, None, 30.0), (1, "cause", 0.0)], 2, 1),  # killed by the launcher, after its patience
        ([(-15, "lost", 0.4), (-15, "cause", 0.3), (-6, "lost", 0.5)], 1, 1),  # told to end while they were failing
        ([(143, None, 0.0), (3, None, 0.0), (-15, None, 0.0)], 1, 3),
    ],
)
def test_the_first_failure_comes_first(tmp_path, endings, first, status):
    logs = RankLogs(tmp_path)
    for rank in range(3):
        logs.log(rank).write_text(f"log of {rank}\n")
    failures = {rank: failure(logs, rank, *ending) for rank, ending in enumerate(endings)}
    lines, found = explain(failures, logs)
    assert lines[0].startswith(f"rank {first} ")
    assert found == status
    assert lines[1] == f"  Traceback of {first}" if endings[first][1] else f"  log of {first}"
    assert sum(line.startswith("rank ") for line in lines) == 3


def test_a_rank_that_waited_in_vain_is_told_what_to_do(tmp_path):
    logs = RankLogs(tmp_path)
    lines, _ = explain({1: failure(logs, 1, 1, "RuntimeError: Timed out waiting 5000ms for recv")}, logs)
    assert "as long as --collective-timeout allows" in lines[-1]


def test_machines_that_do_not_meet_are_told_what_to_look_at(tmp_path, monkeypatch, capsys):
    def refuse(config, program):
        assert (config.max_nodes, config.rdzv_endpoint, config.run_id) == (2, "node1:29500", "mine")
        raise RendezvousTimeoutError("nobody came")

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "9")  # not to be set in the process of the tests
    monkeypatch.setattr(elastic, "elastic_launch", refuse)
    words = ["--logs", str(tmp_path), "--nproc", "2", "--nnodes", "2", "--rdzv-id", "mine"]
    assert elastic.main([*words, "--rdzv-endpoint", "node1:29500", "--", "program"]) == 1
    assert "2 machines did not meet at node1:29500: nobody came. Is that one of them" in capsys.readouterr().out


def test_a_machine_that_loses_the_others_tells_what_its_ranks_said(tmp_path, monkeypatch, capsys):
    def lose(config, program):
        variables = {"RANK": "3", "TORCHELASTIC_RESTART_COUNT": "0"}
        config.logs_specs.reify({0: variables})
        record = {"message": {"message": "RuntimeError: waited", "extraInfo": {"py_callstack": ""}}}
        config.logs_specs.error(3).write_text(json.dumps(record))
        raise RendezvousConnectionError("the store") from OSError("no route")

    limits = []
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "9")
    monkeypatch.setattr(elastic, "elastic_launch", lambda config, program: lambda *words: lose(config, program))
    monkeypatch.setattr(elastic, "give_up_after", lambda *limit: limits.append(limit))
    words = ["--logs", str(tmp_path), "--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", "node1:29500"]
    assert elastic.main([*words, "--timeout", "40", "--", "program"]) == 1
    printed = capsys.readouterr().out
    assert f"rank 3 failed: RuntimeError: waited ({tmp_path}/rank3.log)" in printed
    assert "lost the connection to node1:29500, where the machines of the run keep in touch: no route." in printed
    assert limits == [(50, 29500)]


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(elastic.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(elastic.torch.cuda, "device_count", lambda: 2)
    assert elastic.main(["--logs", str(tmp_path), "--nproc", "4", "--", "program"]) == 1
    assert "nproc=4 needs as many GPUs, and 2 can be seen; give --nproc 2, or --set cpu=true" in capsys.readouterr().out


def test_logs_of_earlier_starts_are_kept(tmp_path):
    log = tmp_path / "rank0.log"
    for text in "abcdef":
        put_aside(log)
        log.write_text(text)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "rank0.log": "f", "rank0.log.1": "e", "rank0.log.2": "d", "rank0.log.3": "c",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nproc: 0", "nproc=0 must be a whole number, 1 at least"),
        ("nproc: two", "nproc='two' must be a whole number"),
        ("max_restarts: -1", "max_restarts=-1 must be a whole number, 0 at least"),
        ("nnodes: 2", "nnodes=2 needs rdzv_endpoint: host:port"),
        ("rdzv_endpoint: node1", "rdzv_endpoint='node1' must be host:port, such as node1:29500"),
        ("nnodes: 2\nrdzv_endpoint: node1:29500\nminutes: 3", "minutes are measured on one machine"),
    ],
)
def test_wrong_presets_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(f"data: d\noutput: o\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")
