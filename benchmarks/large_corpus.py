"""Memory and time of the training data path on a made-up corpus of any size: start, first epoch or part of it, batches.

    python -m benchmarks.large_corpus --folder /scratch/corpus --pairs 10000000

makes the binarised files of a pair of languages (random words, lengths from a geometric distribution), unless they are
there, and prints one JSON object. A fresh process measures: ``anonymous`` is memory that the process has for itself,
``mapped`` are pages of the files, which all processes of a machine share and the system takes back when it needs room.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 30_000
"""Of the made-up vocabulary; below 65,500, so that a word takes two bytes."""

_BLOCK = 1_000_000


def write_corpus(folder: Path, pairs: int, mean_length: float = 12.0, words: int = WORDS) -> None:
    """Write ``dict.txt``, ``languages.json`` and the train files of en-de, block by block."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    pieces = [*(f"w{i}" for i in range(words)), "__de__", "__en__"]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    listed = {"languages": ["de", "en"], "directions": ["de-en", "en-de"]}
    (folder / "languages.json").write_text(json.dumps(listed), encoding="utf-8")
    for number, code in enumerate(("de", "en")):
        generator = np.random.default_rng([1, number])
        prefix = folder / "bin" / f"train.de-en.{code}"
        sizes = np.lib.format.open_memmap(folder / "sizes.npy", mode="w+", dtype=np.int32, shape=(pairs,))
        with Path(f"{prefix}.bin").open("wb") as data:
            for start in range(0, pairs, _BLOCK):
                block = sizes[start : start + _BLOCK]
                # Both sides are drawn from the same stream first, so that the lengths of a pair are alike.
                common = np.random.default_rng([2, start]).geometric(1 / mean_length, len(block))
                block[:] = (common + generator.integers(0, 4, len(block))).clip(1, 120)
                ids = generator.integers(4, words, int(block.sum()), dtype=np.uint16)
                ids[np.cumsum(block) - 1] = 2
                data.write(ids.tobytes())
        with Path(f"{prefix}.idx").open("wb") as index:
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, pairs))
            index.write(memoryview(sizes))
            place = 0
            for start in range(0, pairs, _BLOCK):
                ends = place + np.cumsum(sizes[start : start + _BLOCK], dtype=np.int64) * 2
                index.write(np.concatenate([[place], ends[:-1]]).astype(np.int64).tobytes())
                place = int(ends[-1])
        (folder / "sizes.npy").unlink()


def memory() -> dict[str, int]:
    """Bytes of this process now, and the most of them so far (``peak``, of both kinds together)."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return {"anonymous": found["RssAnon"], "mapped": found["RssFile"], "peak": found["VmHWM"]}


class PeakWatch:
    """Samples anonymous memory in a thread, since the kernel keeps the peak of the sum only."""

    def __init__(self) -> None:
        import threading

        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, memory()["anonymous"])

    def stop(self) -> int:
        """Bytes of anonymous memory at the worst moment."""
        self._stop.set()
        self._thread.join()
        return self.peak


def measure(folder: Path, max_tokens: int, batches: int) -> dict[str, Any]:
    """Load the corpus as training does, begin an epoch, and gather some batches."""
    from fairseq.tasks import setup_task
    from omegaconf import OmegaConf

    import fairseq_plugins  # noqa: F401
    from fairseq_plugins.tasks.options import MtmoeTranslationConfig

    fixed = {"seed": 1, "log_interval": 1, "max_update": 10**6, "update_freq": [1], "train_subset": "train",
             "best_checkpoint_metric": "loss"}  # fmt: skip
    config = OmegaConf.structured(MtmoeTranslationConfig(data=str(folder)))
    OmegaConf.set_struct(config, False)
    task = setup_task(OmegaConf.merge(config, {"_name": "mtmoe_translation", **fixed}))
    before, watch, begun = memory(), PeakWatch(), time.process_time()
    task.load_dataset("train")
    loaded, at_load = memory(), time.process_time()
    epochs = task.get_batch_iterator(task.dataset("train"), max_tokens=max_tokens, max_positions=(1024, 1024))
    iterator = epochs.next_epoch_itr()
    started, at_start = memory(), time.process_time()
    for _ in range(batches):
        next(iterator)
    peak, ended = watch.stop(), time.process_time()
    sentences = len(task.dataset("train"))
    return {
        "sentences": sentences,
        "cpu_seconds_to_load": round(at_load - begun, 2),
        "cpu_seconds_to_first_batch": round(at_start - begun, 2),
        "cpu_milliseconds_a_batch": round(1000 * (ended - at_start) / batches, 3),
        "batches": len(iterator),
        "bytes_a_sentence_loaded": round((loaded["anonymous"] - before["anonymous"]) / sentences, 2),
        "bytes_a_sentence_training": round((started["anonymous"] - before["anonymous"]) / sentences, 2),
        "bytes_a_sentence_peak": round((peak - before["anonymous"]) / sentences, 2),
        "megabytes": {
            "before": before["anonymous"] >> 20, "loaded": loaded["anonymous"] >> 20,
            "training": started["anonymous"] >> 20, "peak": peak >> 20, "mapped": memory()["mapped"] >> 20,
        },
    }  # fmt: skip


def main() -> None:
    """Make the corpus if it is missing, then measure in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the corpus is or belongs")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="sentence pairs; each trains in both directions")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--batches", type=int, default=200, help="batches to gather")
    args = parser.parse_args()
    if not (args.folder / "bin" / "train.de-en.en.idx").exists():
        needed = args.pairs * 2 * (12 + 2 * 14)
        free = os.statvfs(args.folder.parent).f_bavail * os.statvfs(args.folder.parent).f_frsize
        if needed > free:
            parser.error(f"{args.pairs} pairs take {needed / 1e9:.1f} GB, {args.folder.parent} has {free / 1e9:.1f}")
        write_corpus(args.folder, args.pairs)
    print(json.dumps(measure(args.folder, args.max_tokens, args.batches), indent=2))


if __name__ == "__main__":
    main()
