"""What a validation scores and logs: a sample of the training set, means over directions."""

import json
import shlex

import numpy as np
import pytest
import torch

import fairseq_plugins  # noqa: F401
from fairseq_plugins.tasks.parallel_dataset import Direction, ParallelDataset, Side
from fairseq_plugins.tasks.validation import check_metric, read_groups
from mtmoe.errors import ConfigError
from mtmoe.training.run_log import parse_metrics

DIRECTIONS = ["de-en", "en-de", "en-fr", "fr-en"]
OPTIONS = shlex.split(
    "--max-update 24 --validate-interval-updates 8 --save-interval-updates 8 --valid-limit 10 --max-tokens 200 "
    "--required-batch-size-multiple 1 --lr 0.01"
)


def records(output, kind):
    parsed = [parse_metrics(line) for line in output.splitlines()]
    return [record for record in parsed if record is not None and record["kind"] == kind]


@pytest.fixture(scope="module")
def described_data(fairseq, tmp_path_factory):
    """Toy data with a data.json, by which French is of low resource."""
    folder = fairseq.write_toy_data(tmp_path_factory.mktemp("described") / "data")
    pairs = {"de-en": {"train": 300}, "en-fr": {"train": 60}}
    resource = {"de": "high", "fr": "very_low"}
    (folder / "data.json").write_text(json.dumps({"pairs": pairs, "resource": resource}))
    return folder


@pytest.fixture(scope="module")
def sampled(fairseq, described_data, tmp_path_factory):
    save = tmp_path_factory.mktemp("sampled")
    words = [*OPTIONS, "--train-sample", 5, "--best-checkpoint-metric", "nll_low"]
    return save, fairseq.run(fairseq.train_command(described_data, save, *words)).stdout


def test_a_sample_of_a_set_is_spread_and_shares_its_tokens():
    generator = np.random.default_rng(0)
    sides = []
    for sentences in (11, 11, 3, 3):
        lengths = generator.integers(1, 9, sentences)
        sides.append(Side(generator.integers(4, 40, lengths.sum()).astype(np.uint16), lengths))
    directions = [Direction("de-en", *sides[:2], 40, 41, 0), Direction("en-fr", *sides[2:], 41, 42, 1)]
    whole = ParallelDataset(directions, pad=1, training=True)
    part = whole.sample(4)
    assert part.sizes_by_direction() == {"de-en": 4, "en-fr": 3}
    assert whole.sizes_by_direction() == {"de-en": 11, "en-fr": 3}
    assert (part.training, whole.training) == (False, True)
    everything, few = whole.collater([0, 2, 5, 8, 11, 12, 13]), part.collater(np.arange(7))
    for name in ("src_tokens", "prev_output_tokens"):
        assert torch.equal(few["net_input"][name], everything["net_input"][name])
    assert part.sizes_of(np.arange(7)).tolist() == whole.sizes_of(np.array([0, 2, 5, 8, 11, 12, 13])).tolist()
    assert all(np.shares_memory(piece.source.tokens, sides[i * 2].tokens) for i, piece in enumerate(part._pieces))


def test_means_follow_the_buckets_of_reports(described_data, toy_data):
    groups = read_groups(described_data, DIRECTIONS)
    assert groups["nll_mean"] == DIRECTIONS
    assert groups["nll_high"] == ["de-en", "en-de"]
    assert groups["nll_very_low"] == groups["nll_low"] == ["en-fr", "fr-en"]
    assert list(read_groups(toy_data, DIRECTIONS)) == ["nll_mean"]  # no data.json, no buckets


def test_a_metric_that_is_not_logged_is_refused(toy_data, fairseq, tmp_path):
    check_metric("nll_loss_en-fr", DIRECTIONS, {})
    check_metric("loss", DIRECTIONS, {})
    with pytest.raises(ConfigError, match="nll_low is not logged in this run; choose from: nll_loss, nll_mean, nll_l"):
        check_metric("nll_low", DIRECTIONS, {"nll_mean": DIRECTIONS})
    words = fairseq.train_command(toy_data, tmp_path, *OPTIONS, "--best-checkpoint-metric", "nll_low")
    assert "nll_low is not logged in this run" in fairseq.run(words, check=False).stderr


def test_training_pairs_are_scored_apart_without_a_trace(fairseq, described_data, sampled, tmp_path):
    _, output = sampled
    plain = fairseq.run(fairseq.train_command(described_data, tmp_path, *OPTIONS)).stdout
    assert fairseq.losses(plain) == fairseq.losses(output)
    assert not records(plain, "train_sample")
    valid, sample = records(output, "valid"), records(output, "train_sample")
    assert [record["num_updates"] for record in valid] == [record["num_updates"] for record in sample] == [8, 16, 24]
    for record in sample:
        assert {f"nll_loss_{name}" for name in DIRECTIONS} <= set(record)
    same = [record["nll_loss"] for record in records(plain, "valid")]
    assert same == [record["nll_loss"] for record in valid] != [record["nll_loss"] for record in sample]
    assert "train_sample: 20 pairs" not in output  # it is no split that was loaded
    assert not any(key.startswith("best_") for record in sample for key in record)


def test_means_over_directions_choose_the_checkpoint(sampled):
    save, output = sampled
    valid = records(output, "valid")
    for record in (*valid, *records(output, "train_sample")):
        losses = {name: record[f"nll_loss_{name}"] for name in DIRECTIONS}
        assert record["nll_mean"] == pytest.approx(sum(losses.values()) / 4, abs=2e-3)
        assert record["nll_high"] == pytest.approx((losses["de-en"] + losses["en-de"]) / 2, abs=2e-3)
        assert record["nll_low"] == record["nll_very_low"]
        assert record["nll_low"] == pytest.approx((losses["en-fr"] + losses["fr-en"]) / 2, abs=2e-3)
    best = torch.load(save / "checkpoint_best.pt", weights_only=True)["extra_state"]["best"]
    assert best == min(record["nll_low"] for record in valid)
    assert valid[-1]["best_nll_low"] == best
