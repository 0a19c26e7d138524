"""Runs of fairseq-train whose processes share out the experts, against others, and options that do not go together."""

import contextlib
import shlex
from types import SimpleNamespace

import pytest
import torch
from fairseq.distributed.legacy_distributed_data_parallel import LegacyDistributedDataParallel
from omegaconf import OmegaConf

from fairseq_plugins import expert_checkpoints, expert_parallel
from fairseq_plugins.optim.adamw import MtmoeAdamW, MtmoeAdamWConfig
from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint
from mtmoe.errors import ConfigError
from mtmoe.moe import MoEConfig
from mtmoe.moe.experts import ExpertBank

# Every method that draws; an epoch has seven batches of two sentences, so that the second of two processes runs out of
# them at the fourth update.
MODEL = shlex.split(
    "--arch mtmoe_transformer_tiny --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 --moe-freq 2 --num-experts 4 --eom 0.2 --fom 0.1 "
    "--cmr --cmr-gate-drop 0.2 --second-expert-policy random --dropout 0 --attention-dropout 0 "
    "--max-sentences 2 --required-batch-size-multiple 1 --virtual-epoch-size 14 --valid-limit 2"
)
UPDATES = 6


@pytest.fixture
def train(fairseq, toy_data, tmp_path):
    def run(processes: int, name: str, *options: object) -> dict[int, list[float]]:
        words = fairseq.train_command(toy_data, tmp_path / name, *MODEL, *options)
        if processes > 1:
            words = fairseq.torchrun(processes, *words)
        printed = fairseq.losses(fairseq.run(words, timeout=280).stdout)
        return {update: [float(number) for number in line.split()] for update, line in printed.items()}

    return run


def close(actual: dict[int, list[float]], expected: dict[int, list[float]], updates: range) -> None:
    """Loss with and without smoothing and gradient norm of each update, as printed: three decimals."""
    assert sorted(actual) == list(updates)
    for update in updates:
        assert actual[update] == pytest.approx(expected[update], abs=2.1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_that_share_experts_train_as_one_which_goes_on_from_their_checkpoint(train, tmp_path):
    """One process has the batches one after the other, so the losses that need all of them at once are left out."""
    options = ["--load-balance-loss-weight", 0, "--cmr-loss-weight", 0, "--max-update"]
    alone = ["--layout-invariant", "--update-freq", 2]
    one = train(1, "one", *options, UPDATES, *alone)
    close(train(2, "two", *options, 2, "--expert-parallel-size", 2), one, range(1, 3))
    close(train(2, "two", *options, 3, "--expert-parallel-size", 2), one, range(3, 4))
    last = tmp_path / "two" / "checkpoint_last.pt"
    assert last.readlink().name == "checkpoint_1_3"
    assert sorted(path.name for path in last.iterdir()) == [
        "experts-00000-of-00002.pt", "experts-00001-of-00002.pt", "manifest.json", "shared.pt",
    ]  # fmt: skip
    close(train(1, "two", *options, UPDATES, *alone), one, range(4, UPDATES + 1))
    # The directories are gone with their names. The rest of the epoch, dealt out anew, may end with the last update.
    assert {path.name for path in last.parent.iterdir()} <= {"checkpoint_last.pt", "checkpoint_best.pt"}
    expected, actual = (read_fairseq_checkpoint(path).tensors for path in (tmp_path / "one" / last.name, last))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_that_share_experts_go_on_as_those_that_each_have_all(train, tmp_path):
    whole = train(2, "data", "--max-update", UPDATES, "--layout-invariant", "--save-interval-updates", 3)
    restored = ["--restore-file", tmp_path / "data" / "checkpoint_1_3.pt"]
    shared = train(2, "experts", "--max-update", UPDATES, "--expert-parallel-size", 2, *restored)
    close(shared, whole, range(4, UPDATES + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ways_to_send_less_train_as_one_process(train):
    """Exactly so, but for rows in bf16, which change the first loss by less than a hundredth."""
    gate = ["--gate", "bilevel", "--expert-nodes", 2, "--normalize-weights", "none", "--max-update", 2]
    balances = ["--node-balance-loss-weight", 0, "--inner-balance-loss-weight", 0, "--cmr-loss-weight", 0]
    one = train(1, "one", *gate, *balances, "--layout-invariant", "--update-freq", 2)
    two = [*gate, *balances, "--expert-parallel-size", 2, "--hierarchical-exchange", "--overlap-exchange"]
    close(train(2, "two", *two), one, range(1, 3))
    narrow = train(2, "narrow", *two, "--exchange-dtype", "bfloat16")
    assert narrow[1][:2] == pytest.approx(one[1][:2], abs=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_state_of_bf16_weights_goes_with_shared_experts(train, tmp_path):
    """Neither sharing out the rest of the optimiser's state nor stopping changes a digit, and the masters are saved."""
    options = ["--expert-parallel-size", 2, "--bf16", "--max-update"]
    whole = train(2, "whole", *options, UPDATES)
    broken = train(2, "sharded", *options, 3, "--zero-sharding", "os")
    broken |= train(2, "sharded", *options, UPDATES, "--zero-sharding", "os")
    assert broken == whole
    expected, actual = (
        read_fairseq_checkpoint(tmp_path / name / "checkpoint_last.pt").tensors for name in ("whole", "sharded")
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == torch.float32 and torch.equal(actual[name], value), name
    assert any(not torch.equal(value, value.bfloat16().float()) for name, value in actual.items() if "experts" in name)


def options(**changes) -> SimpleNamespace:
    values = {"expert_parallel_size": 2, "layout_invariant": False, "store_ema": False}
    return SimpleNamespace(**(values | changes))


def test_options_that_would_mix_up_experts_are_refused():
    expert_parallel.check(options())
    expert_parallel.check(options(expert_parallel_size=1, store_ema=True))
    with pytest.raises(ConfigError, match="--store-ema does not work"):
        expert_parallel.check(options(store_ema=True))
    with pytest.raises(ConfigError, match=r"needs as many processes, but there is one.*torchrun --nproc_per_node 2"):
        expert_parallel.check_training(options())
    legacy = LegacyDistributedDataParallel.__new__(LegacyDistributedDataParallel)
    config = OmegaConf.structured(MtmoeAdamWConfig(lr=[0.1], store_ema=False))
    optimizer = MtmoeAdamW(config, [torch.nn.Parameter(torch.zeros(2))])
    for module, given, text in (
        (object(), optimizer, "needs --ddp-backend legacy_ddp"),
        (legacy, object(), "needs --optimizer mtmoe_adamw"),
        (legacy, optimizer, ""),
    ):
        with pytest.raises(ConfigError, match=text) if text else contextlib.nullcontext():
            expert_parallel.share(SimpleNamespace(module=module), given, SimpleNamespace(size=2), "world_size")
    assert expert_parallel.start(options()) is None  # one process, as when a trained model is read for decoding


def test_a_batch_that_only_keeps_others_company_counts_as_padding():
    step = expert_parallel.Step(1, 2, torch.tensor([5, 9]), counts=False)
    assert step.padding(None, 3).all() and step.padding(None, 3).shape == (3, 2)
    assert expert_parallel.Step(1, 2, torch.tensor([5, 9]), counts=True).padding(None, 3) is None
    keys = step.keys(layer=4, length=3)
    assert (keys.seed, keys.update, keys.layer) == (1, 2, 4)
    assert (keys.tokens[1] - keys.tokens[0]).tolist() == [1, 1]


def test_the_optimisers_state_of_all_experts_is_cut_to_ones_own():
    bank = ExpertBank(MoEConfig(d_model=3, d_ffn=2, num_experts=4), local=range(2, 4))
    parameters = [torch.nn.Parameter(torch.zeros(4)), bank.b_in]
    states = {
        number: {"step": 7, "exp_avg": torch.arange(4.0), "exp_avg_sq": torch.arange(4.0), "touched": [1, 2, 3, 4]}
        for number in range(2)
    }
    cut = expert_checkpoints.take_local({"state": states, "param_groups": []}, parameters)["state"]
    assert cut[0] is states[0]
    assert cut[1]["exp_avg"].tolist() == [2, 3] and cut[1]["touched"] == [3, 4] and cut[1]["step"] == 7
    assert len(states[1]["exp_avg"]) == 4
