"""Batches, epochs, criterion and optimiser, without a training run."""

import copy
import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.tasks import setup_task
from omegaconf import OmegaConf
from reference.schedules import ChosenDirections
from torch import nn

import fairseq_plugins  # noqa: F401
from fairseq_plugins.criterions.label_smoothed_cross_entropy import MtmoeLabelSmoothedCrossEntropy
from fairseq_plugins.optim.adamw import MtmoeAdamW
from fairseq_plugins.tasks.batch_iterators import TrainingEpochs
from fairseq_plugins.tasks.mtmoe_translation import identity_sample
from fairseq_plugins.tasks.options import MtmoeTranslationConfig
from fairseq_plugins.tasks.parallel_dataset import Direction, ParallelDataset, Side
from mtmoe.errors import ConfigError, DataError, UnknownLanguage
from mtmoe.training.curriculum import Schedule

PAD, EOS = 1, 2


def make_task(data, **options):
    fixed = {"seed": 1, "log_interval": 1, "max_update": 100, "update_freq": [1], "train_subset": "train",
             "best_checkpoint_metric": "loss"}  # fmt: skip
    config = OmegaConf.structured(MtmoeTranslationConfig(data=str(data)))
    OmegaConf.set_struct(config, False)
    return setup_task(OmegaConf.merge(config, {"_name": "mtmoe_translation", **fixed, **options}))


def read_sentences(data, direction):
    """Source and target sentences of a direction, by fairseq's own reader of the files."""
    pair = "-".join(sorted(direction.split("-")))
    sides = [MMapIndexedDataset(str(data / "bin" / f"train.{pair}.{code}")) for code in direction.split("-")]
    return [(sides[0][i].tolist(), sides[1][i].tolist()) for i in range(len(sides[0]))]


@pytest.mark.parametrize("langtok", ["src", "tgt"])
def test_batches_hold_tags_sentences_and_padding(toy_data, langtok):
    task = make_task(toy_data, encoder_langtok=langtok)
    task.load_dataset("train")
    dataset = task.dataset("train")
    assert dataset.sizes_by_direction() == {"de-en": 300, "en-de": 300, "en-fr": 60, "fr-en": 60}
    sentences = [pair for name in task.directions for pair in read_sentences(toy_data, name)]
    index = np.random.default_rng(0).permutation(len(dataset))[:40]
    sample = dataset.collater(index)
    tokens = 0
    for row, number in enumerate(index):
        name = task.directions[sample["direction"][row]]
        source_tag, target_tag = (task.dictionary.index(f"__{code}__") for code in name.split("-"))
        source, target = sentences[number]
        inputs = sample["net_input"]
        encoder = [source_tag if langtok == "src" else target_tag, *source]
        for actual, expected in (
            (inputs["src_tokens"], encoder),
            (inputs["prev_output_tokens"], [target_tag, *target[:-1]]),
            (sample["target"], target),
        ):
            assert actual[row].tolist() == expected + [PAD] * (actual.shape[1] - len(expected))
        assert inputs["src_lengths"][row] == len(encoder)
        assert target[-1] == source[-1] == EOS
        tokens += len(target)
    assert (sample["ntokens"], sample["nsentences"]) == (tokens, 40)
    assert dataset.collater([]) == {}


def test_swapping_directions_changes_tags_only(toy_data):
    task = make_task(toy_data)
    task.load_dataset("valid")
    data = task.dataset("valid")
    there, back = data.collater([0]), data.collater([24])
    assert there["net_input"]["src_tokens"][0, 1:].tolist() == back["target"][0].tolist()


def test_a_batch_is_gathered_fast(toy_data):
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 20, 1000)
    side = Side(generator.integers(4, 40, lengths.sum()).astype(np.uint16), lengths)
    dataset = ParallelDataset([Direction("en-de", side, side, 40, 41)], pad=PAD)
    batches = [generator.integers(0, 1000, 100) for _ in range(50)]
    begun = time.perf_counter()
    for batch in batches:
        dataset.collater(batch)
    assert (time.perf_counter() - begun) / len(batches) < 0.003  # 0.15 ms on an idle core


def test_valid_limit_takes_the_same_sentences_of_both_directions(toy_data):
    task = make_task(toy_data, valid_limit=5)
    task.load_dataset("valid")
    data = task.dataset("valid")
    assert set(data.sizes_by_direction().values()) == {5}
    there, back = data.collater(np.arange(5)), data.collater(np.arange(5, 10))
    assert torch.equal(there["net_input"]["src_tokens"][:, 1:], back["target"])
    whole = make_task(toy_data)
    whole.load_dataset("valid")
    spread = whole.dataset("valid").collater(np.arange(5) * 24 // 5)
    assert torch.equal(spread["target"], there["target"])


def test_too_long_sentences(toy_data):
    task = make_task(toy_data)
    task.load_dataset("valid")
    with pytest.raises(DataError, match=r"of 96 pairs are longer than .* skip them with --skip-invalid-size-inputs"):
        task.get_batch_iterator(task.dataset("valid"), max_tokens=100, max_positions=(8, 8))
    kept = task.get_batch_iterator(
        task.dataset("valid"), max_tokens=100, max_positions=(8, 8), ignore_invalid_inputs=True
    )
    for sample in kept.next_epoch_itr():
        assert sample["net_input"]["src_tokens"].shape[1] <= 8
        assert sample["target"].shape[1] <= 8


class Counter:
    def __init__(self):
        self.updates = 0

    def progress(self):
        return {"num_updates": self.updates, "skipped_updates": 0, "consecutive_skipped": 0}

    def restore(self, counters):
        self.updates = counters["num_updates"]


def make_epochs(task, counter, starts=None, shards=1, shard=0, freq=1, **options):
    data = task.dataset("train")
    return TrainingEpochs(
        data, Schedule(starts or dict.fromkeys(data.names, 0)), data.usable(None, None)[0],
        temperature=options.get("temperature", 1.0), epoch_size=options.get("epoch_size", 0), seed=5,
        epoch=1, update_freq=[freq], num_shards=shards, shard_id=shard, progress=counter,
        limits={"max_tokens": 200, "max_sentences": None, "multiple": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def loaded(toy_data):
    task = make_task(toy_data)
    task.load_dataset("train")
    return task


def test_an_epoch_holds_each_sentence_once_and_epochs_differ(loaded):
    counter = Counter()
    epochs = make_epochs(loaded, counter)
    seen = []
    for _ in range(2):
        order = [sample["id"] for sample in epochs.next_epoch_itr()]
        assert sorted(torch.cat(order).tolist()) == list(range(720))
        seen.append(torch.cat(order).tolist())
    assert seen[0] != seen[1]
    mixed = sum(len(sample["direction"].unique()) > 1 for sample in epochs.next_epoch_itr())
    assert mixed > 0.3 * len(epochs)  # German is longer here: lengths tell directions apart


def test_shards_share_the_batches(loaded):
    parts = [make_epochs(loaded, Counter(), shards=3, shard=i).next_epoch_itr() for i in range(3)]
    assert len({len(part) for part in parts}) == 1
    ids = [sample["id"] for part in parts for sample in part if sample]
    assert sorted(torch.cat(ids).tolist()) == list(range(720))


def test_resume_gives_the_very_next_batch(loaded):
    counter = Counter()
    epochs = make_epochs(loaded, counter)
    iterator = epochs.next_epoch_itr()
    for _ in range(5):
        next(iterator)
        counter.updates += 1
    state = json.loads(json.dumps(epochs.state_dict()))
    rest = [sample["id"].tolist() for sample in iterator]
    other = Counter()
    resumed = make_epochs(loaded, other)
    resumed.load_state_dict(state)
    assert other.updates == 5
    assert resumed.next_epoch_idx == 1
    again = resumed.next_epoch_itr()
    assert again.n == 5
    assert [sample["id"].tolist() for sample in again] == rest
    # Two processes take the same batches from there: ten of them were … five done by one.
    half = make_epochs(loaded, Counter(), shards=2, shard=1)
    half.load_state_dict(state)
    assert half.iterations_in_epoch == 2


def test_epochs_end_where_a_phase_begins(loaded):
    counter = Counter()
    starts = {"de-en": 0, "en-de": 0, "en-fr": 7, "fr-en": 90}
    epochs = make_epochs(loaded, counter, starts, freq=2)
    sets = {}
    while counter.updates < 100:
        for i, sample in enumerate(epochs.next_epoch_itr()):
            sets.setdefault(counter.updates, set()).update(loaded.directions[d] for d in sample["direction"].tolist())
            counter.updates += i % 2
    for update, names in sets.items():
        assert all(starts[name] <= update for name in names)
    assert 7 in sets and 90 in sets
    assert any("en-fr" in sets[update] for update in range(7, 20))


def ids_of(samples):
    return [sample["id"].tolist() if sample else [] for sample in samples]


@pytest.mark.parametrize("shards", [1, 2])
def test_the_rest_of_an_epoch_is_drawn_anew(loaded, shards):
    names = loaded.directions

    def make(shard, counter, active):
        epochs = make_epochs(loaded, counter, shards=shards, shard=shard)
        epochs.schedule = ChosenDirections(active)
        return epochs

    counters = [Counter() for _ in range(shards)]
    parts = [make(i, counter, names) for i, counter in enumerate(counters)]
    iterators = [part.next_epoch_itr() for part in parts]
    length = len(iterators[0])
    before = [ids_of([next(iterator) for _ in range(4)]) for iterator in iterators]
    for part, counter in zip(parts, counters, strict=True):
        counter.updates = 4
        part.schedule.names = names[:2]
        part.redraw()
    one = [ids_of([next(iterator)])[0] for iterator in iterators]
    for counter in counters:
        counter.updates = 5
    state = json.loads(json.dumps(parts[0].state_dict()))
    rest = [ids_of(iterator) for iterator in iterators]
    assert [4 + 1 + len(part) for part in rest] == [length] * shards
    numbers = loaded.dataset("train").directions_of(np.arange(720))
    assert {int(numbers[i]) for part in before for batch in part for i in batch} == {0, 1, 2, 3}
    assert {int(numbers[i]) for part in (*rest, one) for batch in part for i in np.atleast_1d(batch)} == {0, 1}

    counts = np.bincount(numbers[[i for part in before for batch in part for i in batch]], minlength=4)
    counts += np.bincount(numbers[[i for batch in one for i in batch]], minlength=4)
    seen_then = dict(zip(names, counts.tolist(), strict=True))
    for shard in range(shards):
        resumed = make(shard, Counter(), names[:2])
        resumed.load_state_dict(state)
        assert resumed.seen() == seen_then
        assert ids_of(resumed.next_epoch_itr()) == rest[shard]
        assert resumed.seen() == parts[0].seen()
    # The next epoch counts on.
    parts[0].next_epoch_itr()
    following = make_epochs(loaded, counters[0], shards=shards)
    following._seen |= parts[0].seen()
    assert following.seen() == resumed.seen()


def test_effective_epochs_count_what_was_taken(loaded):
    epochs = make_epochs(loaded, Counter())
    assert set(epochs.effective_epochs().values()) == {0.0}
    for _ in epochs.next_epoch_itr():
        pass
    assert set(epochs.effective_epochs().values()) == {1.0}
    assert epochs.state_dict()["seen"] == epochs.seen() == loaded.dataset("train").sizes_by_direction()
    iterator = epochs.next_epoch_itr()
    taken = [next(iterator)["direction"] for _ in range(3)]
    assert sum(epochs.seen().values()) == 720 + sum(map(len, taken))
    assert epochs.state_dict()["seen"]["de-en"] == 300  # a resumed run counts the begun epoch's batches again


def test_temperature_changes_the_quotas(loaded):
    epochs = make_epochs(loaded, Counter(), temperature=1e6, epoch_size=400)
    assert epochs.drawn() == dict.fromkeys(loaded.directions, 100)


def test_wrong_options_say_what_is_wrong(toy_data, tmp_path):
    with pytest.raises(DataError, match=r"dict.txt is missing; give the folder that `mtmoe prepare` wrote"):
        make_task(tmp_path)
    with pytest.raises(UnknownLanguage, match=r"language 'xx' of en-xx has no tag .* it has: de, en, fr"):
        make_task(toy_data, directions="en-xx")
    with pytest.raises(ConfigError, match="give both --source-lang and --target-lang"):
        make_task(toy_data, source_lang="en")
    with pytest.raises(ConfigError, match="'ende' must be written source-target"):
        make_task(toy_data, directions="ende")
    with pytest.raises(DataError, match="has no train files for de-fr"):
        make_task(toy_data, directions="de-fr").load_dataset("train")


def test_damaged_files_are_found(fairseq, tmp_path):
    data = fairseq.write_toy_data(tmp_path / "data")
    path = data / "bin" / "valid.de-en.de.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"valid.de-en.de.bin has \d+ bytes, its index says \d+"):
        make_task(data).load_dataset("valid")
    path.with_suffix(".idx").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"valid.de-en.de.idx is damaged"):
        make_task(data).load_dataset("valid")


def test_identity_warm_up_is_a_function_of_its_key_and_fades(toy_data, loaded):
    task = make_task(toy_data, identity_warmup=0.8, identity_warmup_updates=200, identity_floor=0.1)
    early = [task._copies(update, 0) for update in range(50)]
    late = [task._copies(update, 0) for update in range(1000, 2000)]
    assert sum(early) / 50 > 0.5
    assert 0.06 < sum(late) / 1000 < 0.14
    assert early == [task._copies(update, 0) for update in range(50)]
    sample = loaded.dataset("train").collater([3, 100, 650])
    copied = identity_sample(copy.deepcopy(sample), PAD, 1024)
    assert (copied["net_input"]["src_tokens"][:, 1:] == sample["target"]).all()
    assert (copied["net_input"]["src_tokens"][:, 0] == sample["net_input"]["prev_output_tokens"][:, 0]).all()
    assert copied["net_input"]["src_lengths"].tolist() == (sample["target"] != PAD).sum(1).add(1).tolist()
    assert identity_sample(sample, PAD, 5) is sample


# Criterion


class Toy(nn.Module):
    """A model of the shape that the criterion sees: a decoder with an output layer."""

    def __init__(self, routing=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(47, 8)
        self.decoder = nn.Module()
        self.decoder.output_projection = nn.Linear(8, 47, bias=False)
        self.routing = routing

    def forward(self, src_tokens, src_lengths, prev_output_tokens, features_only=False):
        x = self.embed(prev_output_tokens)
        extra = {"routing": self.routing} if self.routing else {}
        return (x if features_only else self.decoder.output_projection(x)), extra


def routing(load_balance, gate=None, **losses):
    statistics = SimpleNamespace(
        load=torch.tensor([1.5, 0.5, 0.0]), entropy=torch.tensor(0.7), dropped_share=torch.tensor(0.25),
        cmr_gate_sum=None if gate is None else torch.tensor(gate * 10, requires_grad=True),
        cmr_gate_count=None if gate is None else torch.tensor(10),
    )  # fmt: skip
    losses |= {"load_balance": torch.tensor(load_balance, requires_grad=True), "router_z": torch.tensor(4.0)}
    return SimpleNamespace(losses=losses, statistics=statistics)


def make_criterion(task, **weights):
    given = {
        "load_balance_loss_weight": 0.01, "node_balance_loss_weight": 0.005, "inner_balance_loss_weight": 0.005,
        "router_z_loss_weight": 0.0, "cluster_variance_loss_weight": 0.0, "cmr_loss_weight": 0.1, "cmr_budget": 0.8,
    }  # fmt: skip
    return MtmoeLabelSmoothedCrossEntropy(task, label_smoothing=0.1, sentence_avg=False, **{**given, **weights})


def test_dense_loss_is_that_of_fairseq(loaded):
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    sample, model = loaded.dataset("train").collater(np.arange(0, 700, 30)), Toy()
    loss, size, log = make_criterion(loaded)(model, sample)
    log_probs = torch.log_softmax(model(**sample["net_input"])[0], -1)
    theirs, nll = label_smoothed_nll_loss(log_probs.flatten(0, 1), sample["target"].flatten(), 0.1, PAD)
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(log["nll_loss"], nll)
    assert size == sample["ntokens"]
    model.decoder.output_projection = nn.Linear(8, 47, bias=True)  # no fused path with a bias
    nn.init.zeros_(model.decoder.output_projection.bias)
    assert torch.isfinite(make_criterion(loaded)(model, sample)[0])


def test_auxiliary_losses_are_added_in_training_only(loaded):
    sample = loaded.dataset("train").collater([1, 2, 3])
    layers = [("encoder.layers.1", routing(1.2, 0.9)), ("decoder.layers.1", routing(1.4, 0.5))]
    criterion = make_criterion(loaded, router_z_loss_weight=0.001)
    dense = criterion(Toy(), sample)[0]
    model = Toy(layers)
    loss, _, log = criterion(model, sample)
    tokens = sample["ntokens"]
    expected = dense + tokens * (0.01 * 2.6 + 0.001 * 8.0 + 0.1 * abs(0.7 - 0.8))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert layers[0][1].losses["load_balance"].grad == pytest.approx(0.01 * tokens)
    assert layers[0][1].statistics.cmr_gate_sum.grad == pytest.approx(-0.1 * tokens / 20)
    assert log["routing_encoder.layers.1_overflow"] == 25.0
    assert log["routing_load_max"] == 1.5
    model.eval()
    loss, _, log = criterion(model, sample)
    torch.testing.assert_close(loss, dense)
    assert log["load_balance_loss"] == pytest.approx(2.6 * tokens, rel=1e-5)
    assert math.isclose(sum(log[f"nll_loss_{d}"] for d in loaded.directions), float(log["nll_loss"]), rel_tol=1e-5)
    assert sum(log[f"ntokens_{d}"] for d in loaded.directions) == tokens


def test_the_cluster_variance_is_weighted_where_experts_have_clusters(loaded):
    sample = loaded.dataset("train").collater([1, 2, 3])
    dense = make_criterion(loaded)(Toy(), sample)[0]
    layers = [(name, routing(0.0, cluster_variance=torch.tensor(0.3))) for name in ("encoder.1", "decoder.1")]
    criterion = make_criterion(loaded, cluster_variance_loss_weight=0.5)
    loss, _, log = criterion(Toy(layers), sample)
    torch.testing.assert_close(loss, dense + sample["ntokens"] * 0.5 * 0.6)
    assert log["cluster_variance_loss"] == pytest.approx(0.6 * sample["ntokens"])
    with pytest.raises(ConfigError, match=r"cluster_variance_loss_weight=0\.5 needs expert_clusters"):
        criterion(Toy([("encoder.1", routing(0.0))]), sample)
    criterion(Toy(), sample)  # a dense model has no experts at all


# Optimiser


@pytest.mark.parametrize("clip", [0.0, 0.5, 1000.0])
def test_adamw_scales_and_clips_as_torch_does(clip):
    torch.manual_seed(0)
    ours = nn.Linear(5, 7)
    theirs = copy.deepcopy(ours)
    config = OmegaConf.create(
        {
            "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-6, "weight_decay": 0.1, "lr": [0.01],
            "expert_updates": "exact", "offload_expert_state": False, "store_ema": False,
        }
    )
    optimizer = MtmoeAdamW(config, ours.parameters())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for _ in range(4):
        x = torch.randn(3, 5) * 10
        for model, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            model(x).square().sum().backward()
        optimizer.multiply_grads(1 / 30)
        optimizer.multiply_grads(torch.tensor(2.0))
        norm = optimizer.clip_grad_norm(clip)
        optimizer.step()
        for parameter in theirs.parameters():
            parameter.grad.mul_(2 / 30)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        reference.step()
        torch.testing.assert_close(norm, expected)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)



def test_token_dropout_follows_the_passes_over_each_direction(toy_data):
    task = make_task(toy_data, source_token_dropout=0.5, target_token_dropout=0.3, token_dropout_passes=2.0)
    task.load_dataset("train")
    sample = task.dataset("train").collater(np.arange(720))
    before = copy.deepcopy(sample)
    passes = {"de-en": 0.0, "en-de": 2.0, "en-fr": 1e6}  # nothing is known of fr-en: it counts as not seen
    dropped = task.tokens.drop(sample, passes, (1, 2, 0, 0))
    assert all(torch.equal(sample["net_input"][name], before["net_input"][name]) for name in before["net_input"])
    assert torch.equal(dropped["target"], sample["target"])
    shares = {"de-en": 0.0, "en-de": 1 - math.exp(-1), "en-fr": 1.0, "fr-en": 0.0}
    for name, rate in (("src_tokens", 0.5), ("prev_output_tokens", 0.3)):
        old, new = sample["net_input"][name], dropped["net_input"][name]
        changed = old != new
        words = (old != PAD) & (old != EOS)
        words[:, 0] = False
        assert (new[changed] == task.dictionary.unk()).all()
        assert not changed[~words].any()
        for number, direction in enumerate(task.directions):
            mine = words & (sample["direction"] == number)[:, None]
            expected, count = rate * shares[direction], int(mine.sum())
            spread = 4 * math.sqrt(expected * (1 - expected) / count)
            assert abs(changed[mine].float().mean().item() - expected) <= spread, (name, direction)
    again = task.tokens.drop(sample, passes, (1, 2, 0, 0))
    assert torch.equal(again["net_input"]["src_tokens"], dropped["net_input"]["src_tokens"])
    assert task.tokens.drop({}, passes, (1, 2, 0, 0)) == {}
    assert make_task(toy_data).tokens is None


def test_passes_are_those_in_the_middle_of_an_epoch(loaded):
    counter = Counter()
    epochs = make_epochs(loaded, counter)
    wanted = []
    for _ in range(2):
        list(epochs.next_epoch_itr())
        wanted.append(dict(epochs.passes))
    assert set(wanted[0].values()) == {0.5}  # an epoch holds each sentence once
    assert set(wanted[1].values()) == {1.5}
