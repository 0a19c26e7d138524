"""Data parallel x expert parallel against one process with the whole batch: outputs, losses and gradients.

The yardstick is the layer without a parallel object, which tests/moe holds against a loop over tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from reference.cases import PADDINGS, clear_cut, make_case
from reference.compare import assert_all_close, assert_close
from reference.world import run_world
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from mtmoe import kernels
from mtmoe.errors import ConfigError
from mtmoe.kernels import reference as plain_kernels
from mtmoe.kernels.plan import plan_on_device
from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.clusters import surviving_experts
from mtmoe.moe.experts import ExpertBank
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.losses import cmr_budget_loss
from mtmoe.parallel import ExpertParallel, Layout, build_groups, reduce_expert_gradients

WEIGHTS = {"load_balance": 0.7, "router_z": 0.3, "cluster_variance": 1.1}
SEED, UPDATE, LAYERS = 11, 7, 2


@dataclass
class Batch:
    """Two layers with a residual connection each, and the batches of all ranks behind each other."""

    config: MoEConfig
    layers: list[dict[str, Tensor]]
    x: Tensor
    padding: Tensor
    direction: Tensor
    cuts: list[int]
    dtype: torch.dtype
    recompute: bool
    keyed: bool

    def rows(self, rank: int) -> slice:
        return slice(self.cuts[rank], self.cuts[rank + 1])


class Model(nn.Module):
    """``x + layer(x)``, twice; the loss is the criterion's: auxiliary losses times the tokens of a batch."""

    def __init__(self, batch: Batch, parallel: ExpertParallel | None) -> None:
        super().__init__()
        self.batch = batch
        self.layers = nn.ModuleList([MoELayer(batch.config, parallel=parallel) for _ in batch.layers])
        self.to(batch.dtype)
        for layer, weights in zip(self.layers, batch.layers, strict=True):
            layer.load_state_dict(weights)

    def forward(self, rows: slice) -> dict[str, Tensor]:
        batch, config = self.batch, self.batch.config
        x = batch.x[rows].to(batch.dtype).requires_grad_()
        padding = batch.padding[rows]
        mask = padding if padding.any() else None  # the graphs of ranks with and without padding differ
        numbers = torch.arange(len(batch.x))[rows]
        outputs, y = [], x
        for number, layer in enumerate(self.layers):
            keys = DrawKeys(SEED, UPDATE, number, numbers) if batch.keyed else None
            arguments = y, mask, surviving_experts(config, SEED, UPDATE, number), keys
            again = batch.recompute and self.training
            output = checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
            outputs.append(output)
            y = y + output.y
        tokens = int((~padding).sum())
        loss = (y * batch.direction[rows].to(y.dtype)).sum()
        found = {}
        for name in outputs[0].losses:
            found[name] = torch.stack([output.losses[name] for output in outputs]).sum()
            loss = loss + WEIGHTS[name] * tokens * found[name]
        if config.cmr:
            statistics = [output.statistics for output in outputs]
            found["cmr"] = cmr_budget_loss(
                [each.cmr_gate_sum for each in statistics], [each.cmr_gate_count for each in statistics], 0.8
            )
            loss = loss + 0.9 * tokens * found["cmr"]
        if loss.requires_grad:
            loss.backward()
            found["d x"] = x.grad
        return found | {"y": y.detach(), "loss": loss.detach()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.named_parameters()}


def draw_batch(generator: random.Random, ranks: int, dtype: torch.dtype, **fixed) -> Batch:
    """A batch whose routing does not hang on rounding."""
    while True:
        top_k = generator.choice([1, 2, 2, 3])
        options = {
            "num_experts": ranks * generator.choice([1, 2]) if ranks > 2 else 4,
            "top_k": top_k,
            "normalize_weights": "none" if top_k == 1 else generator.choice(["after_drop", "before_drop"]),
            "second_expert_policy": generator.choice(["all", "threshold", "random", "sampling"]),
            "cmr": generator.random() < 0.5,
            "eom": generator.choice([0.0, 0.3]),
            "fom": generator.choice([0.0, 0.3]),
            "masking_scale": generator.choice(["eval", "inverted"]),
            "jitter": generator.choice([0.0, 0.05]),
            "load_balance_include_padding": generator.random() < 0.3,
            "batch_prioritized": generator.random() < 0.3,
            "capacity_factor": generator.choice([0.0, 64.0]),  # where capacity binds, it is each rank's own
            "activation": generator.choice(["relu", "gelu"]),
            "expert_clusters": generator.choice([0, 2]),
            "cluster_variance_type": generator.choice([0, 1, 2]),
            "cluster_variance_scale": generator.choice(["mean", "sum"]),
        }
        if generator.random() < 0.3:
            options |= {"gating_dropout": 0.5, "gating_dropout_mode": "gate_expert"}
        options |= {"cmr_gate_drop": 0.2} if options["cmr"] else {}
        config = MoEConfig(d_model=6, d_ffn=5, **(options | fixed))
        sizes = [generator.choice([0, 1, 2, 5, 9]) for _ in range(ranks)]
        sizes[generator.randrange(ranks)] = 7  # somebody has tokens
        cuts = [sum(sizes[:rank]) for rank in range(ranks + 1)]
        seed = generator.randrange(10**6)
        cases = [
            make_case(config, cuts[-1], generator.choice(PADDINGS[:3]), seed=seed + layer) for layer in range(LAYERS)
        ]
        batch = Batch(
            config, [case.layer.state_dict() for case in cases], cases[0].x, cases[0].padding, cases[0].direction,
            cuts, dtype, recompute=generator.random() < 0.4, keyed=True,
        )  # fmt: skip
        if dtype == torch.float64 or (clear_cut(cases[0]) and settled(batch)):
            return batch


def settled(batch: Batch) -> bool:
    """Whether fp32 routes as fp64 does, so that a difference is one of rounding and not another choice."""
    narrow, wide = (one_process(replace(batch, dtype=dtype))[0] for dtype in (batch.dtype, torch.float64))
    return bool((narrow["y"].double() - wide["y"]).abs().max() < 1e-4)


def one_process(batch: Batch, training: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = Model(batch, None).train(training)
    return model(slice(None)), model.gradients()


def compare(rank: int, parallel: ExpertParallel, batch: Batch, expected: tuple, training: bool = True) -> None:
    """All that a rank can see of one step, against one process; any dtype by its rounding."""
    model = Model(batch, parallel).train(training)
    found, (values, gradients) = model(batch.rows(rank)), expected
    rows = batch.rows(rank)
    loss = found.pop("loss").clone()
    distributed.all_reduce(loss)
    assert_close(loss, values["loss"], batch.dtype, "loss")
    for name in ("y", "d x"):
        scale = values[name].abs().max().item()
        assert_close(found.pop(name), values[name][rows], batch.dtype, name, scale=scale)
    assert_all_close(found, {name: values[name] for name in found}, batch.dtype)
    world = parallel.layout.world_size
    experts = [each for each in model.parameters() if hasattr(each, "expert")]
    assert len(experts) == (4 * LAYERS if parallel.size > 1 else 0)
    reduce_expert_gradients(experts, parallel)
    for name, parameter in model.named_parameters():
        whole = gradients[name] if gradients[name] is not None else torch.zeros_like(parameter)
        scale = whole.abs().max().item()
        if hasattr(parameter, "expert"):
            local = parallel.local_experts(batch.config.num_experts)
            assert_close(parameter.grad * world, whole[local.start : local.stop], batch.dtype, name, scale=scale)
        else:
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            distributed.all_reduce(total)
            assert_close(total, whole, batch.dtype, name, scale=scale)


def start(rank: int, size: int) -> ExpertParallel:
    layout = Layout(world_size=distributed.get_world_size(), expert_parallel_size=size, rank=rank)
    return ExpertParallel(build_groups(layout))


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
