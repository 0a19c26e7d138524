"""The training process: its environment, its output, and the signals that are passed on to it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def build_environment(config: TrainConfig, report: Callable[[str], None] = logger.info) -> dict[str, str]:
    """The variables that the training process runs under; says on `report` what they set, and what is missing."""
    environment = dict(os.environ)
    threads = config.threads or len(os.sched_getaffinity(0))
    environment["OMP_NUM_THREADS"] = str(threads)
    report(f"threads: {threads}")
    if config.options.get("cpu"):
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


def run_process(command: Sequence[str], environment: Mapping[str, str], line: Callable[[str], Any]) -> int:
    """Run a command, give its output to `line`, and pass signals on to it.

    Args:
        command: words.
        environment: its variables.
        line: gets each line of output and errors; a true answer stops the command.

    Returns:
        Its exit status, 128 + the signal's number if a signal ended it.
    """
    process = subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C comes to us alone, and we pass it on once
    )  # fmt: skip
    assert process.stdout is not None
    with _forwarding(process):
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
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[str]) -> Iterator[None]:
    """Send SIGTERM and SIGINT of this process to `process` while the block runs."""

    def forward(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there has to stop the process
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
