"""Kill processes of one training, again and again, and compare what comes of it with an unbroken run.

    python -m benchmarks.faults --kills 10

trains a small model on made-up data: two processes that share out the experts, with a checkpoint every few updates.
Each time that the processes have come up, one of them is killed with SIGKILL: while they start, after some updates, or
while a checkpoint is being written. Which one, and when, follows from ``--seed``. Then every update must be in the
log, each with the figures of the unbroken run, whenever and however often it was made; each start must go on from the
newest checkpoint that was complete; and the last checkpoints of both runs must be equal bit by bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.large_corpus import write_corpus
from benchmarks.machine import ROOT
from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint

PROCESSES = 2

SAVE_EVERY = 5
"""Updates."""

FIGURES = ("loss", "nll_loss", "gnorm", "wpb", "bsz")
"""Of each update, in which both runs must agree: with them goes what was trained on."""

OPTIONS = {
    "encoder-layers": 2, "decoder-layers": 2, "encoder-embed-dim": 16, "decoder-embed-dim": 16,
    "encoder-ffn-embed-dim": 32, "decoder-ffn-embed-dim": 32, "encoder-attention-heads": 2,
    "decoder-attention-heads": 2, "share-all-embeddings": True, "dropout": 0.1, "moe-freq": 2, "num-experts": 4,
    "eom": 0.2, "cmr": True, "cmr-gate-drop": 0.2, "gating-dropout": 0.1, "expert-parallel-size": PROCESSES,
    "lr": 0.003, "clip-norm": 1.0, "max-tokens": 128, "log-interval": 1, "seed": 3, "cpu": True,
    "disable-validation": True, "no-epoch-checkpoints": True, "save-interval-updates": SAVE_EVERY,
    "keep-interval-updates": 2,
}  # fmt: skip

MOMENTS = ("save", "updates", "save", "updates", "start")
"""When processes are killed, in turn: in a save, after some updates, soon after they have started."""

POLL_SECONDS = 0.0005
"""Between looks for a save; one takes some ten milliseconds."""

LIFE_SECONDS = 600.0
"""For the processes to come up, or to reach the next moment, on a busy machine."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One that has been done."""

    rank: int
    moment: str
    saving: bool
    """Whether files of a checkpoint were being written."""
    resumable: int
    """Update of the newest checkpoint that was complete when all processes had ended; 0 = none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    status: int
    kills: Sequence[Kill]
    output: str


def write_preset(folder: Path, data: Path, updates: int) -> Path:
    """The preset of the run in `folder`."""
    preset = folder.with_suffix(".yaml")
    document = {
        "data": str(data), "output": str(folder), "arch": "mtmoe_transformer_tiny", "threads": 1,
        "criterion": "mtmoe_label_smoothed_cross_entropy", "allocator": "system",
        "options": OPTIONS | {"max-update": updates},
    }  # fmt: skip
    preset.write_text(yaml.safe_dump(document), encoding="utf-8")
    return preset


def train(folder: Path, data: Path, updates: int, kills: int = 0, seed: int = 1) -> Outcome:
    """Train, and kill a process so many times.

    Args:
        folder: of the run; a log and a preset are put beside it.
        data: prepared.
        updates: until training ends; fewer than some ten for each kill, and it may end before the last one.
        kills: of processes; the launcher may start them again as often.
        seed: of the choice of processes and moments.
    """
    words = [sys.executable, "-m", "mtmoe", "train", write_preset(folder, data, updates), "--nproc", PROCESSES]
    words += ["--max-restarts", kills]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = folder.with_suffix(".out")
    with printed.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(list(map(str, words)), stdout=output, stderr=output, env=environment)
        try:
            done = Killer(process, folder, random.Random(seed)).run(kills)
            status = process.wait(timeout=LIFE_SECONDS)
        finally:
            process.kill()  # whatever it has started ends with it
    return Outcome(status, done, printed.read_text(encoding="utf-8", errors="replace"))


class Killer:
    """Kills processes of a training.

    Args:
        process: `mtmoe train`.
        folder: of the run.
        choice: of processes and moments.
    """

    def __init__(self, process: subprocess.Popen[Any], folder: Path, choice: random.Random) -> None:
        self.process, self.folder, self.choice = process, folder, choice
        self.dead: set[int] = set()
        """Processes of earlier lives."""

    def run(self, kills: int) -> list[Kill]:
        """Kill so many processes, one in each life; fewer if training ends before."""
        moments = [MOMENTS[number % len(MOMENTS)] for number in range(kills)]
        self.choice.shuffle(moments)
        done = []
        for moment in moments:
            life = self._until(lambda: self._life())
            if not life:
                break
            rank = self.choice.randrange(PROCESSES)
            if not self._wait_for(moment):
                break
            saving = bool(self._saves())
            os.kill(life[rank], signal.SIGKILL)
            self.dead |= set(life.values())
            self._until(lambda life=life: not any(map(_alive, life.values())), also_at_end=True)
            done.append(Kill(rank, moment, saving, self._complete()))
        return done

    def _wait_for(self, moment: str) -> bool:
        """False if training ended meanwhile."""
        if moment == "start":
            time.sleep(self.choice.uniform(0, 8))
        elif moment == "save":
            skipped = self.choice.randrange(3)
            for _ in range(skipped):
                if not self._until(self._saves) or not self._until(lambda: not self._saves()):
                    return False
            if not self._until(self._saves):
                return False
            time.sleep(self.choice.uniform(0, 0.01))
        else:
            wanted = self.choice.randint(1, 3 * SAVE_EVERY)
            if not self._until(lambda: self._updates() >= wanted):
                return False
            time.sleep(self.choice.uniform(0, 0.1))
        return self.process.poll() is None

    def _until(self, condition: Callable[[], Any], also_at_end: bool = False) -> Any:
        """Its first value that is true; a false one if training ended meanwhile."""
        end = time.monotonic() + LIFE_SECONDS
        while not (value := condition()):
            if self.process.poll() is not None and not also_at_end:
                return None
            if time.monotonic() > end:
                raise TimeoutError(f"nothing has happened for {LIFE_SECONDS:.0f} s; see {self.folder}/logs")
            time.sleep(POLL_SECONDS)
        return value

    def _life(self) -> dict[int, int]:
        """Rank -> process, once all of a new life are there; empty before that."""
        found = ranks(self.process.pid)
        return found if len(found) == PROCESSES and not self.dead & set(found.values()) else {}

    def _saves(self) -> list[str]:
        try:
            names = os.listdir(self.folder / "checkpoints")  # noqa: PTH208 - in a tight loop
        except FileNotFoundError:
            return []
        return [name for name in names if name.endswith(".saving")]

    def _updates(self) -> int:
        """That the first process has made in this life."""
        log = self.folder / "logs" / "rank0.log"
        return log.read_bytes().count(b"| train_inner |") if log.exists() else 0

    def _complete(self) -> int:
        manifests = (self.folder / "checkpoints").glob("checkpoint_*/manifest.json")
        found = [re.fullmatch(r"checkpoint_\d+_(\d+)", manifest.parent.name) for manifest in manifests]
        return max((int(match[1]) for match in found if match), default=0)


def ranks(ancestor: int) -> dict[int, int]:
    """Rank -> process id, of the processes under the launcher under a process."""
    found = {}
    for launcher in _children(ancestor):
        for child in _children(launcher):
            try:
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = next((each.partition(b"=")[2] for each in variables if each.startswith(b"RANK=")), None)
            if rank is not None and _alive(child):
                found[int(rank)] = child
    return found


def _children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, task.read_text(encoding="ascii").split())
        except OSError:
            continue
    return found


def _alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each update of a run, in the order in which they were written."""
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [record for record in lines if record["kind"] == "train_inner"]


def problems(unbroken: Path, broken: Path, kills: Sequence[Kill], updates: int) -> list[str]:
    """What is wrong with a run whose processes were killed; empty if nothing is.

    Args:
        unbroken: folder of the run to compare with.
        broken: of the other.
        kills: that it went through.
        updates: of either.
    """
    expected = {record["num_updates"]: record for record in records(unbroken)}
    found, texts = records(broken), []
    if set(expected) != set(range(1, updates + 1)):
        return [f"the unbroken run has {len(expected)} of {updates} updates"]
    missing = set(expected) - {record["num_updates"] for record in found}
    if missing:
        texts.append(f"updates {sorted(missing)} are not in the log")
    for record in found:
        wanted = expected[record["num_updates"]]
        texts += [
            f"update {record['num_updates']}: {name} is {record[name]}, and {wanted[name]} in the unbroken run"
            for name in FIGURES
            if record[name] != wanted[name]
        ]
    resumable = [kill.resumable for kill in kills]
    for before, after in itertools.pairwise(found):
        last, first = before["num_updates"], after["num_updates"]
        if first == last + 1:
            continue
        if first - 1 not in resumable:
            texts.append(f"update {last} is followed by {first}; complete were the checkpoints of {resumable}")
            continue
        del resumable[: resumable.index(first - 1) + 1]
        if last + 1 - first > 2 * SAVE_EVERY:  # one save may be under way when the next is due
            texts.append(f"updates {first} to {last} were made again")
    return texts + _differences(unbroken, broken)


def _differences(unbroken: Path, broken: Path) -> list[str]:
    names = "checkpoints/checkpoint_last.pt"
    expected, actual = (read_fairseq_checkpoint(folder / names).tensors for folder in (unbroken, broken))
    differ = [name for name in expected if name not in actual or not torch.equal(actual[name], expected[name])]
    return [f"the last checkpoints differ in {', '.join(differ)}"] if differ else []


def describe(outcome: Outcome, found: Sequence[Mapping[str, Any]], updates: int) -> str:
    """What was done, in a few lines."""
    again = len(found) - updates
    lines = [
        f"kill {number}: rank {kill.rank}, moment: {kill.moment}"
        + (", while a checkpoint was being written" if kill.saving else "")
        + f"; goes on after update {kill.resumable}"
        for number, kill in enumerate(outcome.kills, start=1)
    ]
    writing = sum(kill.saving for kill in outcome.kills)
    return "\n".join([
        *lines,
        f"{len(outcome.kills)} kills, {writing} of them while a checkpoint was being written; {updates} updates, of "
        f"which {again} were made again",
    ])  # fmt: skip


def main() -> int:
    """Parse, train twice, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of processes, in one run (default: %(default)s)")
    parser.add_argument("--updates", type=int, help="until training ends (default: 15 for each kill, and 15 more)")
    parser.add_argument("--seed", type=int, default=1, help="of processes and moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary one)")
    args = parser.parse_args()
    updates = args.updates or 15 * (args.kills + 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_corpus(folder / "data", 300, words=40)
        unbroken = train(folder / "unbroken", folder / "data", updates)
        if unbroken.status:
            print(unbroken.output, f"the unbroken run ended with status {unbroken.status}", sep="\n")
            return 1
        outcome = train(folder / "broken", folder / "data", updates, args.kills, args.seed)
        if outcome.status:
            print(outcome.output, f"the run ended with status {outcome.status}", sep="\n")
            return 1
        print(describe(outcome, records(folder / "broken"), updates))
        wrong = problems(folder / "unbroken", folder / "broken", outcome.kills, updates)
        if len(outcome.kills) < args.kills:
            wrong.append(f"training ended after {len(outcome.kills)} of {args.kills} kills; give more --updates")
        print("\n".join(wrong) if wrong else "each update as in the unbroken run, and the same weights")
        return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
