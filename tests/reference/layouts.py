"""A small model on several processes, and what one process with the whole batch makes of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.clusters import surviving_experts
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.losses import cmr_budget_loss
from mtmoe.parallel import ExpertParallel, Layout, build_groups, reduce_expert_gradients
from reference.cases import LOSS_WEIGHTS, PADDINGS, clear_cut, make_case
from reference.compare import assert_all_close, assert_close

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
        """The batch of a rank."""
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
        """Output, losses and the input's gradient of one step."""
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
            loss = loss + LOSS_WEIGHTS[name] * tokens * found[name]
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
        """Of parameters, by name."""
        return {name: value.grad for name, value in self.named_parameters()}


def draw_batch(generator: random.Random, ranks: int, dtype: torch.dtype, nodes: int = 0, **fixed) -> Batch:
    """A batch whose routing does not hang on rounding; `nodes` takes SMILE's gate."""
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
        if nodes:
            options |= {"gate": "bilevel", "expert_nodes": nodes, "normalize_weights": "none", "expert_clusters": 0}
            options["top_k"] = min(options["top_k"], options["num_experts"] // nodes)
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
    """What `Model` finds in one process with the batches of all ranks, and its gradients."""
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


def start(
    rank: int, size: int, hosts: tuple[int, ...] | None = None, hierarchical: bool = False, **options
) -> ExpertParallel:
    """The groups of a layout on this rank."""
    layout = Layout(world_size=distributed.get_world_size(), expert_parallel_size=size, rank=rank, hosts=hosts)
    return ExpertParallel(build_groups(layout, hierarchical=hierarchical), **options)
