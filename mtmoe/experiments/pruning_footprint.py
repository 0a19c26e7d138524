"""Memory and time that a model folder takes when it is loaded, each time in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mtmoe.checkpoint import StoredModel
from mtmoe.checkpoint.folder import write_folder

MEASURE = """
import json, resource, sys, time
from mtmoe.inference import Translator

def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

first = Translator.load(sys.argv[1], threads=1)
before, start = used(), time.perf_counter()
second = Translator.load(sys.argv[1], threads=1)
seconds, after = time.perf_counter() - start, used()
print(json.dumps({"seconds": seconds, "bytes": after - before}))
"""
"""What the process runs. The first loading brings in libraries too, some of them late (160 MB that have nothing to do
with the model); the second, beside it, takes what a model takes."""


def measure_footprint(model: StoredModel, repeats: int = 3) -> dict[str, float]:
    """Write a folder of a model, load it and remove it again.

    Args:
        model: to measure.
        repeats: processes, of which the medians are given.

    Returns:
        ``folder_mb``, ``memory_mb`` (millions of bytes) and ``load_seconds``.
    """
    with tempfile.TemporaryDirectory(prefix="mtmoe-prune-") as scratch:
        folder = Path(scratch) / "model"
        write_folder(folder, model)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        command = [sys.executable, "-c", MEASURE, str(folder)]
        outputs = [
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
            for _ in range(repeats)
        ]
    found = [json.loads(output) for output in outputs]
    return {
        "folder_mb": size / 1e6,
        "memory_mb": statistics.median(one["bytes"] for one in found) / 1e6,
        "load_seconds": statistics.median(one["seconds"] for one in found),
    }
