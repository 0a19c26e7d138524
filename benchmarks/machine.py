"""What the figures were taken on and with: processor, threads, allocator, versions, code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mtmoe.training.process import ONEDNN_KERNELS, find_tcmalloc

ROOT = Path(__file__).resolve().parents[1]


def describe(device: str = "cpu") -> dict[str, Any]:
    """Everything that a figure depends on, by name."""
    versions = {}
    for package in ("torch", "deepspeed", "transformers", "ve-fairseq", "megablocks", "tutel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": torch.cuda.get_device_name() if device != "cpu" else _processor(),
        "instructions": _instructions(),
        "threads": torch.get_num_threads(),
        "allocator": "tcmalloc" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else "the system's",
        "python": platform.python_version(),
        "versions": versions,
        "code": code_fingerprint(),
    }


def code_fingerprint(folders: tuple[str, ...] = ("mtmoe/moe", "mtmoe/kernels")) -> str:
    """A digest of the layer's sources: a result of other code does not count as done."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def quick_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment that ``mtmoe train`` also sets, for all peers alike: tcmalloc where it is, oneDNN's cache."""
    changed = dict(environment)
    changed.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_KERNELS)
    library = find_tcmalloc()
    if library is not None and "tcmalloc" not in changed.get("LD_PRELOAD", ""):
        changed["LD_PRELOAD"] = f"{library}:{changed.get('LD_PRELOAD', '')}".rstrip(":")
    return changed


def restart_with_quick_environment(module: str) -> None:
    """Start this script again under `quick_environment`, unless it already runs under it."""
    wanted = quick_environment()
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], wanted)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """The instruction sets that matter for matrix products."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
