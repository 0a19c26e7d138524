"""The same model in fairseq-generate and here: the same texts and scores."""

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.commands import command, run
from reference.models import toy_sentence, toy_translation

from mtmoe.inference import SearchOptions, Translator, search
from mtmoe.inference.translator import pad
from mtmoe.inference.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
SENTENCES = 100
SEARCH = ("--beam", "3", "--nbest", "3", "--lenpen", "0.8", "--max-len-a", "0", "--max-len-b", "30", "--unkpen", "0.5")
MODEL = (
    "--arch mtmoe_transformer --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 32 --decoder-embed-dim 32 "
    "--encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 4 --decoder-attention-heads 4 "
    "--moe-freq 2 --num-experts 4 --dropout 0.1"
)
METHODS = {
    "CMR and EOM": "--cmr --eom 0.2",
    "MoEC": "--gate moec --top-k 1 --normalize-weights none --expert-clusters 2 --cluster-expert-dropout 0.5 "
    "--cluster-expert-dropout-interval 10 --cluster-variance-loss-weight 0.01",
    "SMILE": "--gate bilevel --expert-nodes 2 --top-k 2 --normalize-weights none",
}
TRAINING = (
    "--task mtmoe_translation --criterion mtmoe_label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam "
    "--lr 0.005 --max-tokens 800 --max-update 150 --seed 3 --cpu --num-workers 0 --no-epoch-checkpoints "
    "--disable-validation"
)


def fairseq(name: str, *arguments: object) -> str:
    done = run(command(name, *arguments), timeout=120)
    return done.stdout


@pytest.fixture(scope="module", params=METHODS)
def run_folder(request, vocabulary, tmp_path_factory):
    """A small MoE model after some updates, and the data it learnt from."""
    indexed = pytest.importorskip("fairseq.data.indexed_dataset")
    folder = tmp_path_factory.mktemp("run")
    data = folder / "data"
    (data / "bin").mkdir(parents=True)
    for name in ("dict.txt", "spm.model", "languages.json"):
        (data / name).write_bytes((vocabulary / name).read_bytes())
    words = Vocabulary.load(data / "dict.txt", data / "spm.model", ("de", "en"))
    generator = random.Random(1)
    for split, count in (("train", 400), ("valid", 10), ("test", SENTENCES)):
        texts = [toy_sentence(generator.randrange(10**9)) for _ in range(count)]
        for language, lines in (("en", texts), ("de", [toy_translation(text) for text in texts])):
            prefix = data / "bin" / f"{split}.de-en.{language}"
            builder = indexed.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for line in lines:
                builder.add_item(torch.tensor([*words.encode(line), 2]))
            builder.finalize(f"{prefix}.idx")
    fairseq(
        "fairseq-train",
        *(
            data,
            "--user-dir",
            ROOT / "fairseq_plugins",
            "--save-dir",
            folder / "checkpoints",
            "--directions",
            "de-en,en-de",
        ),
        *MODEL.split(),
        *METHODS[request.param].split(),
        *TRAINING.split(),
    )
    return folder


@pytest.mark.slow
def test_agrees_with_fairseq_generate(run_folder):
    checkpoint = run_folder / "checkpoints" / "checkpoint_last.pt"
    output = fairseq(
        "fairseq-generate",
        *(
            run_folder / "data",
            "--user-dir",
            ROOT / "fairseq_plugins",
            "--task",
            "mtmoe_translation",
            "--path",
            checkpoint,
        ),
        *("-s", "en", "-t", "de", "--cpu", "--batch-size", "16", "--num-workers", "0", *SEARCH),
    )
    sources = {int(number): text for number, text in re.findall(r"^S-(\d+)\t(.*)$", output, re.MULTILINE)}
    expected: dict[int, list[tuple[float, str]]] = {}
    for number, score, text in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", output, re.MULTILINE):
        expected.setdefault(int(number), []).append((float(score) * math.log(2), text))
    assert len(sources) == SENTENCES

    translator = Translator.load(run_folder / "checkpoints" / "checkpoint_last.pt")
    words = translator.vocabulary
    numbers = sorted(sources)
    # fairseq prints what its encoder got, with the tag or without; the tag goes before it in either case.
    pieces = [[piece for piece in sources[number].split() if piece != "__en__"] for number in numbers]
    batch = pad([words.frame([words.ids[piece] for piece in line], "en") for line in pieces])
    options = SearchOptions(beam=3, length_penalty=0.8, max_length_b=30, unknown_penalty=0.5)
    start = torch.full((SENTENCES,), words.tags["de"])
    forbidden = torch.tensor([0, *words.tags.values()])
    found = search(translator.model, batch, start, options, max_positions=1024, forbidden=forbidden)

    same = 0
    for number, hypotheses in zip(numbers, found, strict=True):
        ours = [
            (hypothesis.score, " ".join(words.pieces[index] for index in hypothesis.tokens))
            for hypothesis in hypotheses
        ]
        same += [text for _, text in ours] == [text for _, text in expected[number]]
        for (score, _), (theirs, _) in zip(ours, expected[number], strict=True):
            assert score == pytest.approx(theirs, abs=1e-3)
    assert same >= 0.99 * SENTENCES
    assert len({hypotheses[0].tokens for hypotheses in found}) > SENTENCES / 5  # it has learnt to look at the source
