"""The training process: its environment, its output, and the signals that are passed on to it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtmoe.training.bound_process import bound
from mtmoe.training.preset import TrainConfig

logger = logging.getLogger(__name__)


TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")

LIBRARY_FOLDERS = tuple(f"/usr/{name}" for name in ("lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu", "lib64", "lib"))

MALLOC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Keeps glibc from giving memory back between updates: 1.06 x in training where tcmalloc gives 1.4 x."""

ONEDNN_KERNELS = "10240"
"""Compiled CPU kernels that oneDNN keeps. It compiles one for each shape of a bf16 product (0.4 ms, as long as the
product of 1000 x 256 x 256 itself), and the demo's batches come in 172 numbers of rows; its default of 1,024 would
forget many before they come round again. A kernel takes some 0.1 MB."""

RANK_0 = "\x1e"
"""Stands before each line of rank 0 in the output of `mtmoe.training.elastic`; no text has that character."""

ECHO_SECONDS = 3.0
"""For which a second signal counts as the first once more. Slurm and systemd send theirs to each process of a run, so
that training gets it from them and from the one that has started it."""


def build_environment(config: TrainConfig, report: Callable[[str], None] = logger.info) -> dict[str, str]:
    """The variables that the training process runs under; says on `report` what they set, and what is missing."""
    environment = dict(os.environ)
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // config.nproc)
    environment["OMP_NUM_THREADS"] = str(threads)
    report(f"threads: {threads}" + (f" for each of {config.nproc} processes" if config.nproc > 1 else ""))
    if config.options.get("cpu"):
        if config.distributed:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # fairseq's processes would still meet over the GPUs
        from mtmoe.kernels import extension  # torch takes a second to load

        missing = extension.why_not()
        report("CPU kernels: compiled" if missing is None else f"CPU kernels: plain torch, slower; {missing}")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_KERNELS)
    if config.allocator == "auto":
        library = find_tcmalloc()
        if library is not None:
            already = environment.get("LD_PRELOAD", "")
            if "tcmalloc" not in already:
                environment["LD_PRELOAD"] = f"{library}:{already}".rstrip(":")
            report(f"memory allocator: tcmalloc ({library})")
        else:
            for name, value in MALLOC_SETTINGS.items():
                environment.setdefault(name, value)
            report(
                "memory allocator: glibc; training on CPUs is about 1.3 x faster with tcmalloc "
                "(Debian and Ubuntu: apt install libtcmalloc-minimal4)"
            )
    return environment


def find_tcmalloc(folders: Sequence[str] = LIBRARY_FOLDERS) -> Path | None:
    """The tcmalloc library, if it is installed."""
    candidates = (Path(folder) / name for name in TCMALLOC for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


def run_training(
    config: TrainConfig,
    command: Sequence[str],
    environment: Mapping[str, str],
    line: Callable[[str], Any],
    note: Callable[[str], Any],
    logs: Path | None = None,
) -> int:
    """Run the command of a preset in as many processes as it says; as `run_process` otherwise.

    Args:
        config: the preset.
        command: words; each process runs them.
        environment: their variables.
        line: gets each line of rank 0; a true answer stops training.
        note: gets each line of the launcher: restarts, and which rank failed.
        logs: folder of a log of each rank, where there are several; by default ``logs`` in the run folder.

    Returns:
        The exit status: that of the rank that failed first, 128 + the signal's number if a signal ended training.
    """
    if not config.distributed:
        return run_process(command, environment, line)

    def sort(text: str) -> Any:
        if text.startswith(RANK_0):
            # Also inside the line: the launcher marks the parts of one that it had read while it was being written.
            return line(text.replace(RANK_0, ""))
        note(text)
        return False

    return run_process(elastic_command(config, command, logs or config.folder / "logs"), environment, sort)


def elastic_command(config: TrainConfig, command: Sequence[str], logs: Path) -> list[str]:
    """The words that run `command` in the processes that a preset has on this machine; their logs go into `logs`."""
    words = [sys.executable, "-m", "mtmoe.training.elastic", "--logs", str(logs), "--nproc", str(config.nproc)]
    words += ["--nnodes", str(config.nnodes), "--max-restarts", str(config.max_restarts)]
    if config.rdzv_endpoint:
        words += ["--rdzv-endpoint", config.rdzv_endpoint, "--rdzv-id", config.rdzv_id]
    if "collective-timeout" in config.options:
        words += ["--timeout", str(config.options["collective-timeout"])]
    return [*words, "--", *command]


def run_process(command: Sequence[str], environment: Mapping[str, str], line: Callable[[str], Any]) -> int:
    """Run a command, give its output to `line`, and pass signals on to it. It ends when this process does.

    Args:
        command: words.
        environment: its variables.
        line: gets each line of output and errors; a true answer stops the command.

    Returns:
        Its exit status, 128 + the signal's number if a signal ended it.
    """
    process = subprocess.Popen(
        bound(command), env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,  # the terminal's Ctrl-C comes to us alone, and we pass it on once
    )  # fmt: skip
    assert process.stdout is not None
    with _forwarding(process) as seen:
        stopped = False
        try:
            for text in process.stdout:
                if line(text.rstrip("\n")) and not stopped:
                    stopped = True
                    os.killpg(process.pid, signal.SIGKILL)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            process.stdout.close()
            status = process.wait()
    if len(seen) > 1:
        return 128 + seen[-1]
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Send SIGTERM and SIGINT of this process to `process` while the block runs; a second one, later, ends it at once.

    Yields:
        The signals that have come so far.
    """
    seen: list[int] = []
    since = 0.0

    def forward(number: int, _: Any) -> None:
        nonlocal since
        if seen and time.monotonic() - since < ECHO_SECONDS:
            return
        since = time.monotonic()
        seen.append(number)
        with contextlib.suppress(ProcessLookupError):
            # Not the second one itself: torch's launcher would go on waiting for its ranks.
            process.send_signal(number if len(seen) == 1 else signal.SIGKILL)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there has to stop the process
            before[number] = signal.signal(number, forward)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
