"""Data parallel x expert parallel against one process with the whole batch: outputs, losses and gradients.

The yardstick is the layer without a parallel object, which tests/moe holds against a loop over tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from reference.compare import assert_close
from reference.layouts import LAYERS, SEED, UPDATE, Batch, Model, compare, draw_batch, one_process, start
from reference.world import run_world
from torch import Tensor, distributed

from mtmoe import kernels
from mtmoe.errors import ConfigError
from mtmoe.kernels import reference as plain_kernels
from mtmoe.kernels.plan import plan_on_device
from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.experts import ExpertBank
from mtmoe.moe.keyed import DrawKeys


def compare_all(rank: int, sizes: list[int], batches: list[tuple[Batch, tuple]]) -> None:
    for size in sizes:
        parallel = start(rank, size)
        for number, (batch, expected) in enumerate(batches):
            try:
                compare(rank, parallel, batch, expected)
            except AssertionError as error:
                text = f"{size} ranks share the experts, batch {number}: {error}\n{batch.config}"
                raise AssertionError(text) from error


def drawn(seed: int, ranks: int, dtype: torch.dtype, count: int) -> list[tuple[Batch, tuple]]:
    generator = random.Random(seed)
    batches = [draw_batch(generator, ranks, dtype) for _ in range(count)]
    return [(batch, one_process(batch)) for batch in batches]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_processes_equal_one(dtype):
    run_world(2, compare_all, [1, 2], drawn(1, 2, dtype, 8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eight_processes_in_every_layout_equal_one(dtype):
    run_world(8, compare_all, [8, 4, 2, 1], drawn(2, 8, dtype, 8), seconds=280)


def test_plans_of_a_gpu_whose_unrouted_rows_stay_at_home(monkeypatch):
    monkeypatch.setattr(kernels, "plan_dispatch", plan_on_device)
    monkeypatch.setattr(kernels, "load_backend", lambda name, device: plain_kernels)
    batches = drawn(3, 2, torch.float64, 3)
    assert any(batch.padding.any() for batch, _ in batches)
    run_world(2, compare_all, [2], batches)


# Gating dropout


def gating_batch(seed: int, ranks: int, mode: str) -> Batch:
    """Cut as the emulation in one process cuts its batch; drawn in one of the two layers and not in the other."""
    generator = random.Random(seed)
    options = {"num_experts": 2 * ranks, "gating_dropout": 0.5, "gating_dropout_mode": mode}
    options |= {"capacity_factor": 0.0, "load_balance_include_padding": False}
    batch = draw_batch(generator, ranks, torch.float64, **options)
    tokens = len(batch.x)
    batch.cuts = [-(-rank * tokens // ranks) for rank in range(ranks + 1)]
    keys = [DrawKeys(SEED, UPDATE, layer, torch.zeros(0, dtype=torch.int64)) for layer in range(LAYERS)]
    assert [key.once("gating_dropout") < 0.5 for key in keys] == [True, False]
    return batch


def compare_gating(rank: int, batch: Batch, expected: tuple) -> None:
    parallel = start(rank, distributed.get_world_size())
    compare(rank, parallel, batch, expected)
    # One of two layers exchanges rows: there and back, in forward, backward, and the recomputed forward.
    assert parallel.traffic.calls == 4 + 2 * batch.recompute


@pytest.mark.parametrize("mode", ["gate", "gate_expert"])
def test_gating_dropout_is_what_one_process_emulates_and_sends_nothing(mode):
    ranks = 2
    for seed in range(3):
        batch = gating_batch(seed, ranks, mode)
        config = replace(batch.config, gating_dropout_ranks=ranks)
        run_world(ranks, compare_gating, batch, one_process(replace(batch, config=config)))


def without_keys(rank: int) -> None:
    config = MoEConfig(d_model=4, d_ffn=3, num_experts=4, gating_dropout=0.5)
    layer = MoELayer(config, parallel=start(rank, 2)).train()
    with pytest.raises(ValueError, match=r"gating_dropout=0\.5 needs keys where ranks share out experts"):
        layer(torch.zeros(3, 4))
    layer.eval()(torch.zeros(3 * rank, 4))
    with pytest.raises(ConfigError, match=r"gating_dropout_ranks=4 emulates ranks in one process.*leave it at 0"):
        MoELayer(replace(config, gating_dropout_ranks=4), parallel=start(rank, 2))
    with pytest.raises(ConfigError, match="num_experts=3 must be a multiple"):
        MoELayer(MoEConfig(d_model=4, d_ffn=3, num_experts=3), parallel=start(rank, 2))


def test_what_ranks_could_not_agree_on_is_refused():
    run_world(2, without_keys)


# Evaluation, weights, empty ranks


def evaluate(rank: int, batch: Batch, expected: tuple) -> None:
    with torch.no_grad():
        found = Model(batch, start(rank, 2)).eval()(batch.rows(rank))
    assert_close(found["y"], expected[0]["y"][batch.rows(rank)], batch.dtype, "y")


def test_evaluation_equals_one_process():
    batch = draw_batch(random.Random(4), 2, torch.float64)
    with torch.no_grad():
        expected = one_process(batch, training=False)
    run_world(2, evaluate, batch, expected)


def initial_weights(rank: int, expected: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(9)
    parallel = start(rank, 2)
    for whole in expected:
        layer = MoELayer(MoEConfig(d_model=6, d_ffn=5, num_experts=4, cmr=True), parallel=parallel)
        for name, value in layer.state_dict().items():
            cut = parallel.local_experts(4) if name.startswith("experts.") else range(len(whole[name]))
            assert torch.equal(value, whole[name][cut.start : cut.stop]), name


def test_weights_begin_alike_whoever_holds_them():
    torch.manual_seed(9)
    config = MoEConfig(d_model=6, d_ffn=5, num_experts=4, cmr=True)
    run_world(2, initial_weights, [MoELayer(config).state_dict() for _ in range(2)])


def test_a_bank_takes_its_own_from_a_state_dict_of_all_or_of_its_own():
    config = MoEConfig(d_model=6, d_ffn=5, num_experts=4)
    whole, part = ExpertBank(config), ExpertBank(config, local=range(2, 4))
    assert all(each.expert for each in part.parameters())
    assert not any(hasattr(each, "expert") for each in whole.parameters())
    part.load_state_dict(whole.state_dict())
    assert torch.equal(part.b_in, whole.b_in[2:])
    again = ExpertBank(config, local=range(2, 4))
    again.load_state_dict(part.state_dict())
    assert torch.equal(again.w_out, whole.w_out[2:])


def all_empty(rank: int) -> None:
    config = MoEConfig(d_model=4, d_ffn=3, num_experts=4, cmr=True, eom=0.2)
    layer = MoELayer(config, parallel=start(rank, 2)).train()
    x = torch.zeros(3 * rank, 4, requires_grad=True)
    output = layer(x, torch.ones(3 * rank, dtype=torch.bool), keys=DrawKeys(1, 1, 1, torch.arange(3 * rank)))
    (output.y.sum() + sum(output.losses.values()) + output.statistics.cmr_gate_sum).backward()
    assert not output.y.any() and not any(float(value) for value in output.losses.values())
    assert all(torch.isfinite(each.grad).all() for each in layer.parameters() if each.grad is not None)


def test_a_step_without_any_token_passes():
    run_world(2, all_empty)
