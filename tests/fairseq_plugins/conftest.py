"""A toy data folder in the layout of `mtmoe prepare`, and fairseq's commands as subprocesses."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reference.commands import ROOT, command, environment, run, torchrun

LANGUAGES = ("de", "en", "fr")
DIRECTIONS = ("de-en", "en-de", "en-fr", "fr-en")
WORDS = 40


def write_toy_data(folder: Path, sizes: dict[str, int] | None = None) -> Path:
    """Three languages that are shifts of each other's words: learnable, and tiny."""
    import torch
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    sizes = sizes or {"de-en": 300, "en-fr": 60}
    (folder / "bin").mkdir(parents=True)
    pieces = [f"▁w{i}" for i in range(WORDS)] + [f"__{code}__" for code in LANGUAGES]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")
    (folder / "languages.json").write_text(json.dumps({"languages": LANGUAGES, "directions": DIRECTIONS}))
    generator = np.random.default_rng(1)
    for pair, train in sizes.items():
        a, b = pair.split("-")
        for split, count in (("train", train), ("valid", 24), ("test", 6)):
            lengths = generator.integers(2, 14, count)
            words = [generator.integers(0, WORDS, n) for n in lengths]
            for code in (a, b):
                shift = LANGUAGES.index(code)
                prefix = folder / "bin" / f"{split}.{pair}.{code}"
                builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
                for sentence in words:
                    extra = sentence[: len(sentence) // 4] if code == "de" else sentence[:0]  # German is longer
                    ids = (np.concatenate([sentence, extra]) + shift) % WORDS + 4
                    builder.add_item(torch.tensor([*ids.tolist(), 2]))
                builder.finalize(f"{prefix}.idx")
    return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("toy") / "data")


MODEL = shlex.split(
    "--arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim "
    "16 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --share-all-embeddings --encoder-normalize-before "
    "--decoder-normalize-before --dropout 0.1"
)
TRAIN = shlex.split(
    "--task mtmoe_translation --criterion mtmoe_label_smoothed_cross_entropy --label-smoothing 0.1 "
    "--optimizer mtmoe_adamw --lr 0.003 --lr-scheduler polynomial_decay --total-num-update 100 "
    "--clip-norm 1.0 --max-tokens 256 --log-format json --log-interval 1 --seed 3 --cpu --num-workers 0 "
    "--no-epoch-checkpoints"
)


def train_command(data: Path, save: Path, *arguments: object) -> list[str]:
    words = [data, "--user-dir", ROOT / "fairseq_plugins", "--save-dir", save, *TRAIN, *MODEL, *arguments]
    return command("fairseq-train", *words)


def run_until(words: list[str], update: int = 0, number: int = 0) -> tuple[int, str]:
    """Start training, and send it a signal once it has printed that update; 0 = none.

    Returns:
        Its exit status, and what it printed.
    """
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        found = losses(line)
        if number and found and max(found) >= update:
            process.send_signal(number)
            number = 0
    return process.wait(), "".join(lines)


def losses(output: str) -> dict[int, str]:
    """Update -> the loss that fairseq printed for it, digit by digit."""
    found = {}
    for line in output.splitlines():
        if "| train_inner |" in line:
            record = json.loads(line.split("| train_inner |")[1])
            found[int(record["num_updates"])] = f"{record['loss']} {record['nll_loss']} {record.get('gnorm')}"
    return found


@pytest.fixture(scope="session")
def fairseq():
    """The helpers above, for test modules that cannot import this file."""
    return SimpleNamespace(
        root=ROOT,
        run=run,
        run_until=run_until,
        environment=environment,
        command=command,
        torchrun=torchrun,
        train_command=train_command,
        losses=losses,
        write_toy_data=write_toy_data,
    )
