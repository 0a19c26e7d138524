"""Small runs that could have been, with outputs and references."""

import json
import lzma
import random

import numpy as np
import pytest

from mtmoe.routing_table import LayerRouting, RoutingTable

PAIRS = {"de-en": 9000, "en-mk": 1500, "de-mk": 200}
BUCKET = {"de-en": "high", "en-mk": "low", "de-mk": "very_low"}
WORDS = ("the", "a", "house", "tree", "river", "walks", "sings", "slowly", "quickly", "under", "over", "red", "green")
SPOILED = {"dense": 0.4, "moe": 0.5, "moe_eom": 0.3, "moe_cmr": 0.35}
"""Configuration -> share of its words that are wrong."""


def both(values):
    """A figure of each pair, for both of its directions."""
    return {name: value for pair, value in values.items() for name in (pair, "-".join(reversed(pair.split("-"))))}


def sentences(direction, count=40):
    rng = random.Random("".join(sorted(direction)))
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 9))) for _ in range(count)]


def spoil(lines, share, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) if rng.random() < share else word for word in line.split()) for line in lines]


def routing(seed, cmr):
    rng = np.random.default_rng(seed)
    rows, layers = list(both(PAIRS)), []
    for side in ("encoder", "decoder"):
        tokens = rng.integers(200, 400, len(rows))
        first = np.stack([rng.multinomial(count, rng.dirichlet(np.full(8, 0.5))) for count in tokens])
        gate = tokens * rng.uniform(0.4, 1, len(rows)) if cmr else None
        layers.append(LayerRouting(side, 1, tokens, first, first[:, ::-1], first * 0.7, first * 0.1, first * 0.8, gate))
    return RoutingTable(tuple(rows), (40,) * len(rows), tuple(layers)).to_json()


def losses(config, floor, train=False):
    """Validation loss falls and, in the baseline, rises again; training loss only falls."""
    rising = {"moe": 0.8, "dense": 0.3}.get(config, 0.1)
    points = []
    for update in range(500, 3001, 500):
        by_pair = {}
        for pair, bucket in BUCKET.items():
            over = 0 if train else rising * {"very_low": 1.0, "low": 0.4, "high": 0.0}[bucket] * max(0, update - 1500)
            by_pair[pair] = round(floor + 3000 / update + over / 1500 - (0.5 if train else 0), 4)
        points.append({"update": update, "nll_loss": both(by_pair)})
    return points


def write_run(folder, config, seed, *, test=True, outputs=True, **changes):
    references = {direction: sentences(direction) for direction in both(PAIRS)}
    hypotheses = {
        direction: spoil(lines, SPOILED[config], f"{config} {seed} {direction}")
        for direction, lines in references.items()
    }
    scores = score(hypotheses, references)
    record = {
        "experiment": folder.name,
        "config": config,
        "title": config.replace("_", " + "),
        "seed": seed,
        "data_fingerprint": "f" * 64,
        "machine": "a test",
        "threads": 1,
        "updates": 3000,
        "seconds": 100.0 + seed,
        "words_per_second": 2000.0 + 10 * seed,
        "parameters": 1234567,
        "pairs": both(PAIRS),
        "bucket": both(BUCKET),
        "train": [{"update": 100, "loss": 8.0, "nll_loss": 7.5}],
        "valid": losses(config, 3 + 0.01 * seed),
        "train_sample": losses(config, 3 + 0.01 * seed, train=True),
        "dropped_share": 0.0,
        "routing": None if config == "dense" else routing(seed, cmr=config == "moe_cmr"),
        "valid_scores": scores,
        "test_scores": scores if test else None,
    }
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    (folder / "outputs").mkdir(exist_ok=True)
    (folder / "runs" / f"{config}.seed{seed}.json").write_text(json.dumps(record | changes))
    for split in ("valid", "test") if outputs else ():
        with lzma.open(folder / "outputs" / f"{config}.seed{seed}.{split}.jsonl.xz", "wt", encoding="utf-8") as stream:
            for direction, lines in hypotheses.items():
                stream.write(json.dumps({"direction": direction, "hypotheses": lines}) + "\n")


def score(hypotheses, references):
    from mtmoe.evaluation.metrics import build_metric

    return {
        direction: {
            name: build_metric(name, direction.split("-")[1]).corpus_score(lines, [references[direction]]).score
            for name in ("chrf++", "bleu")
        }
        for direction, lines in hypotheses.items()
    }


@pytest.fixture
def references():
    return {direction: sentences(direction) for direction in both(PAIRS)}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Four configurations, three seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("results") / "toy"
    for config in SPOILED:
        for seed in (1, 2, 3):
            write_run(folder, config, seed)
    return folder


@pytest.fixture
def make_run():
    return write_run
