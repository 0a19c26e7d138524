"""The processes of one training on this machine, under torch's elastic launcher, which is what torchrun runs.

`mtmoe train` starts it as ``python -m mtmoe.training.elastic`` where a run has more than one process
(`mtmoe.training.process.elastic_command`). What it adds to torchrun: a log of each rank by its number, the error of the
rank that failed first, the exit status of a signal, and ranks that end with the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mtmoe.training.bound_process import bound
from mtmoe.training.connections import give_up_after
from mtmoe.training.process import RANK_0

LOGS_KEPT = 3
"""Logs of earlier starts that are kept, as ``rank0.log.1`` (the newest of them) and so on."""

STOP_SECONDS = "900"
"""For the ranks to finish an update and save a checkpoint after a signal; torch's own default is 30."""

LATER = 10.0
"""Seconds for which the launcher waits longer than the ranks for a machine that is out of reach: they say more."""

LINES = 12
"""Of a failed rank's traceback, or of its log where there is none."""

TIMED_OUT = ("Timed out waiting", "collective operation timeout")
"""What gloo and NCCL say when another rank did not come in time."""

LOCAL = ("127.0.0.1", "localhost", "::1")


class RankLogs(LogsSpecs):
    """Output and errors of each rank in ``rank<number>.log``; those of rank 0 on our output as well, after `RANK_0`.

    Args:
        folder: where the logs go, and ``rank<number>.error.json`` of each rank that failed.
        begin: is called when ranks are about to start.
    """

    def __init__(self, folder: Path, begin: Callable[[], object] = lambda: None) -> None:
        super().__init__(log_dir=str(folder))
        self.folder = folder
        self.begin = begin
        self.ranks: list[str] = []
        """Those of this machine."""

    @property
    def root_log_dir(self) -> str:
        """The folder of the logs."""
        return str(self.folder)

    def log(self, rank: int | str) -> Path:
        """The log of a rank."""
        return self.folder / f"rank{rank}.log"

    def error(self, rank: int | str) -> Path:
        """Where a rank says why it failed, in torch's format."""
        return self.folder / f"rank{rank}.error.json"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Make room for the logs of ranks that are about to start.

        Args:
            envs: local rank -> its variables, which get the file for its error.
        """
        self.begin()
        self.folder.mkdir(parents=True, exist_ok=True)
        logs, errors, shown = {}, {}, {}
        self.ranks = [variables["RANK"] for variables in envs.values()]
        for local_rank, variables in envs.items():
            rank = variables["RANK"]
            put_aside(self.log(rank))
            self.error(rank).unlink(missing_ok=True)
            logs[local_rank] = str(self.log(rank))
            errors[local_rank] = variables["TORCHELASTIC_ERROR_FILE"] = str(self.error(rank))
            if rank == "0":
                shown[local_rank] = str(self.log(rank))
        restart = next(iter(envs.values())).get("TORCHELASTIC_RESTART_COUNT", "0")
        if restart != "0":
            limit = next(iter(envs.values()))["TORCHELASTIC_MAX_RESTARTS"]
            print(f"restart {restart} of {limit}: a process failed; the logs until then are {self.folder}/rank*.log.1")
        nothing = dict.fromkeys(envs, "")  # errors go where output goes: `bound` sees to it
        return LogsDest(logs, nothing, shown, {}, errors, os.devnull, os.devnull)


def put_aside(log: Path) -> None:
    """Rename a log of an earlier start to ``<name>.1``, that one to ``<name>.2`` and so on; the oldest is replaced."""
    names = [log, *(log.with_name(f"{log.name}.{number}") for number in range(1, LOGS_KEPT + 1))]
    for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
        if newer.exists():
            newer.replace(older)


def in_order(failures: dict[int, ProcessFailure], logs: RankLogs) -> list[int]:
    """Ranks that failed, the one whose failure the others most likely follow from first.

    Exceptions go by the time at which they were written down, which is before the others can notice. A rank that was
    killed before it could write comes before the exceptions that this caused in the others, unless the launcher killed
    it, which it does half a minute after the first failure. What is left ended because it was told to.
    """
    first = min(failure.timestamp for failure in failures.values())

    def key(rank: int) -> tuple[int, float, int]:
        failure = failures[rank]
        if logs.error(rank).is_file():
            return 1, logs.error(rank).stat().st_mtime_ns, rank
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and failure.timestamp <= first + 1:
            return 0, 0, rank
        return 2 + (failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)), failure.timestamp, rank

    return sorted(failures, key=key)


def explain(failures: dict[int, ProcessFailure], logs: RankLogs) -> tuple[list[str], int]:
    """What failed in which rank, and where its log is.

    Returns:
        Lines for the user, and the exit status of the rank that failed first.
    """
    ranks = in_order(failures, logs)
    lines = []
    for place, rank in enumerate(ranks):
        failure = failures[rank]
        message, trace = _recorded(failure)
        # What follows an error, such as being told to end, does not matter.
        ending = f"failed: {message.partition(chr(10))[0]}" if message else _ending(failure.exitcode)
        lines.append(f"rank {rank} {ending} ({logs.log(rank)})")
        if place == 0:
            shown = trace or _tail(logs.log(rank))
            lines += [f"  {line}" for line in shown]
            if any(text in line for text in TIMED_OUT for line in shown):
                lines.append(
                    "  It has waited for another rank for as long as --collective-timeout allows. That one hangs, or "
                    "needs more time: its log tells how far it came"
                )
    code = failures[ranks[0]].exitcode
    if _recorded(failures[ranks[0]])[0]:
        code = 1
    return lines, code if code > 0 else 128 - code


def _ending(code: int) -> str:
    if code >= 0:
        return f"failed with status {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def _recorded(failure: ProcessFailure) -> tuple[str, list[str]]:
    message: Any = failure.error_file_data.get("message")
    if not isinstance(message, dict):
        return "", []
    return str(message["message"]), str(message["extraInfo"]["py_callstack"]).rstrip().splitlines()[-LINES:]


def _tail(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 100_000))
        return file.read().decode(errors="replace").splitlines()[-LINES:]


def launch(args: argparse.Namespace) -> int:
    """Start the ranks and wait for them.

    Returns:
        0; the status of the rank that failed first; 128 + the number of the signal that stopped all.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else args.nproc
    if args.nproc > gpus:
        print(f"nproc={args.nproc} needs as many GPUs, and {gpus} can be seen; give --nproc {gpus}, or --set cpu=true")
        return 1
    host = args.rdzv_endpoint.rpartition(":")[0]
    if host in LOCAL:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not have an address
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_SECONDS)
    if args.max_restarts:
        # A new store for each start: torch would keep the old one, and gloo find the addresses of the dead ranks in it.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    port = args.rdzv_endpoint.rpartition(":")[2]
    # Where machines meet they also keep in touch, over a connection that there is as soon as they have met.
    begin = (lambda: give_up_after(args.timeout + LATER, int(port))) if args.nnodes > 1 else (lambda: 0)
    logs = RankLogs(args.logs, begin)
    config = LaunchConfig(
        min_nodes=args.nnodes, max_nodes=args.nnodes, nproc_per_node=args.nproc, max_restarts=args.max_restarts,
        run_id=args.rdzv_id, rdzv_backend="c10d", rdzv_endpoint=args.rdzv_endpoint, role="train",
        local_addr=host if host in LOCAL else None, logs_specs=logs, log_line_prefix_template=RANK_0,
    )  # fmt: skip
    program, *words = bound(args.command)
    try:
        elastic_launch(config, program)(*(word.replace("$", "$$") for word in words))  # torch fills in ${local_rank}
    except SignalException as stop:
        return _stopped(stop.sigval, logs)
    except ChildFailedError as failed:
        lines, status = explain(failed.failures, logs)
        print("\n".join(lines))
        return status
    except RendezvousError as error:
        if logs.ranks:
            print("\n".join(_lost(error, args.rdzv_endpoint, logs)))
            return 1
        print(
            f"{args.nnodes} machines did not meet at {args.rdzv_endpoint}: {error}. Is that one of them, can the "
            "others reach this port of it, and were all started with the same --nnodes and --rdzv-id?"
        )
        return 1
    return 0


def _lost(error: RendezvousError, endpoint: str, logs: RankLogs) -> list[str]:
    """What to say when this machine has lost the others while its ranks were running."""
    return [
        *(f"rank {rank} failed: {message} ({logs.log(rank)})" for rank, message in _messages(logs).items()),
        f"this machine has lost the connection to {endpoint}, where the machines of the run keep in touch: "
        f"{error.__cause__ or error}. Is that machine down, or the network between them?",
    ]


def _messages(logs: RankLogs) -> dict[str, str]:
    """Rank -> its error, of those of this machine that have failed."""
    failed = [rank for rank in logs.ranks if logs.error(rank).is_file()]
    records = {rank: json.loads(logs.error(rank).read_text(encoding="utf-8")) for rank in failed}
    return {rank: record["message"]["message"] for rank, record in records.items()}


def _stopped(number: int, logs: RankLogs) -> int:
    """The status of a run that a signal stopped; 1 where a rank could not save its checkpoint, which is shown."""
    failed = _messages(logs)
    for rank, message in failed.items():
        print(f"rank {rank} failed while it was stopping: {message} ({logs.log(rank)})")
    return 1 if failed else 128 + number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `elastic_command`."""
    parser = argparse.ArgumentParser(prog="python -m mtmoe.training.elastic", description=__doc__)
    parser.add_argument("--logs", type=Path, required=True, help="folder of the ranks' logs")
    parser.add_argument("--nproc", type=int, required=True, help="processes on this machine")
    parser.add_argument("--nnodes", type=int, default=1, help="machines")
    parser.add_argument("--max-restarts", type=int, default=0, help="times that all start again after a failure")
    parser.add_argument("--rdzv-endpoint", default="127.0.0.1:0", help="host:port at which the machines meet")
    parser.add_argument("--rdzv-id", default="mtmoe", help="name of the run, the same on all machines")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that the ranks wait for each other")
    parser.add_argument("command", nargs="+", help="command of each process")
    return launch(parser.parse_args(arguments))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torch catches it: no traceback
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a second signal the thread that shows the log of rank 0 still runs, and would be waited for.
    os._exit(status)
