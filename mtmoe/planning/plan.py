"""A plan: what each layout of a model on a cluster takes, and which one to use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mtmoe.errors import ConfigError
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.communication import Traffic, all_reduce_bytes, all_to_all_bytes
from mtmoe.planning.flops import BACKWARD, forward_flops
from mtmoe.planning.hardware import GIB, Cluster
from mtmoe.planning.layouts import Layout, layouts
from mtmoe.planning.memory import Memory, memory_of, usable_memory
from mtmoe.planning.model import SIDES, ModelShape
from mtmoe.planning.parameters import Parameters, count_parameters
from mtmoe.planning.step_time import StepTime, step_time
from mtmoe.planning.training import TrainingSetup

SAVERS = {
    "zero1": "--zero1", "recompute": "--recompute", "offload": "--offload",
}  # fmt: skip
"""Switches of `TrainingSetup` that save memory, cheapest in time first -> options of ``mtmoe plan``."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One layout: what it takes."""

    layout: Layout
    setup: TrainingSetup
    parameters_a_gpu: int
    memory: Memory
    usable: float
    """Bytes of a GPU that may be filled."""
    all_to_all: Traffic
    """Bytes that one GPU sends in an update."""
    all_reduce: Traffic
    """The same for gradients, and weights under ZeRO-1."""
    time: StepTime

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory is enough."""
        return self.memory.gpu <= self.usable

    @property
    def tokens_a_second(self) -> float:
        """Real target tokens of all GPUs."""
        return self.setup.tokens * self.setup.accumulate * self.layout.cluster.gpus / self.time.total


@dataclass(frozen=True, slots=True)
class Plan:
    """All layouts of a model on a cluster."""

    model: ModelShape
    cluster: Cluster
    setup: TrainingSetup
    assumed: Assumptions
    parameters: Parameters
    step_flops: float
    """FLOPs of one GPU in an update, recomputation included."""
    estimates: Sequence[Estimate]
    """By rising expert-parallel size."""
    best: Estimate | None
    """The fastest that fits; None if none does."""
    reason: str
    """Why that one, or what would make one fit."""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; times in seconds, sizes in bytes."""
        return {
            "model": asdict(self.model),
            "cluster": asdict(self.cluster),
            "setup": asdict(self.setup),
            "assumptions": asdict(self.assumed),
            "parameters": asdict(self.parameters) | {"total": self.parameters.total},
            "step_flops": self.step_flops,
            "layouts": [_plain(estimate) for estimate in self.estimates],
            "recommended": None if self.best is None else self.best.layout.expert_parallel,
            "reason": self.reason,
        }


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {
        "expert_parallel": estimate.layout.expert_parallel,
        "replicas": estimate.layout.replicas,
        "parameters_a_gpu": estimate.parameters_a_gpu,
        "memory": asdict(estimate.memory) | {"gpu": estimate.memory.gpu},
        "usable": estimate.usable,
        "fits": estimate.fits,
        "all_to_all": asdict(estimate.all_to_all),
        "all_reduce": asdict(estimate.all_reduce),
        "time": asdict(estimate.time) | {"total": estimate.time.total},
        "tokens_a_second": estimate.tokens_a_second,
    }


def check(model: ModelShape, cluster: Cluster, setup: TrainingSetup) -> None:
    """Refuse combinations that cannot be trained.

    Raises:
        ConfigError: says which, and the way out.
    """
    if setup.dtype in ("bf16", "autocast") and not cluster.gpu.bf16:
        raise ConfigError(f"{cluster.gpu.name} does not multiply in bf16; choose --dtype fp16 or fp32")
    if setup.overlap and not model.cmr:
        raise ConfigError("overlap hides all-to-all behind the shared network of CMR; add --cmr, or leave it out")
    dense = not any(model.moe_layers(side) for side in SIDES)
    for name in ("offload", "bilevel", "gating_dropout", "overlap"):
        if dense and getattr(setup, name):
            raise ConfigError(f"{name.replace('_', '-')} is about experts, and this model has none; set --moe-freq")


def estimate(model: ModelShape, setup: TrainingSetup, layout: Layout, assumed: Assumptions) -> Estimate:
    """What one layout takes."""
    parameters = count_parameters(model)
    dense, experts = all_reduce_bytes(parameters, setup, layout)
    return Estimate(
        layout=layout,
        setup=setup,
        parameters_a_gpu=parameters.replicated + parameters.experts // layout.expert_parallel,
        memory=memory_of(model, setup, layout, assumed),
        usable=usable_memory(layout, assumed),
        all_to_all=all_to_all_bytes(model, setup, layout),
        all_reduce=dense + experts,
        time=step_time(model, setup, layout, assumed),
    )


def make_plan(
    model: ModelShape,
    cluster: Cluster,
    setup: TrainingSetup,
    assumed: Assumptions | None = None,
    expert_parallel: int | None = None,
) -> Plan:
    """Compare the layouts of a model on a cluster.

    Args:
        model: its shape.
        cluster: GPUs and network.
        setup: batch, number types, optimiser, methods.
        assumed: what is taken for granted; None takes the defaults.
        expert_parallel: looks at this size only; None at all that fit the numbers of GPUs and experts.

    Raises:
        ConfigError: a combination makes no sense; the text says what is allowed.
    """
    assumed = assumed or Assumptions()
    check(model, cluster, setup)
    candidates = layouts(model, cluster, expert_parallel)
    estimates = [estimate(model, setup, layout, assumed) for layout in candidates]
    best = min((each for each in estimates if each.fits), key=lambda each: each.time.total, default=None)
    forward = forward_flops(model, setup.tokens, setup.tokens, setup.length)
    flops = setup.accumulate * (forward.total * (1 + BACKWARD) + setup.recompute * forward.layers)
    reason = _why(best, estimates) if best else _way_out(model, setup, estimates, assumed)
    return Plan(model, cluster, setup, assumed, count_parameters(model), flops, estimates, best, reason)


def _why(best: Estimate, estimates: Sequence[Estimate]) -> str:
    """Why the recommended layout is that."""
    full = [each.layout.expert_parallel for each in estimates if not each.fits]
    slower = [each for each in estimates if each.fits and each is not best]
    parts = [f"{best.time.total:.3g} s an update with {best.memory.gpu / GIB:.1f} of {best.usable / GIB:.1f} GiB"]
    if full:
        parts.append(f"expert-parallel {', '.join(map(str, full))} would not fit in memory")
    if slower:
        second = min(slower, key=lambda each: each.time.total)
        parts.append(
            f"the next that fits, {second.layout.expert_parallel}, takes {second.time.total / best.time.total:.2f} x "
            "the time"
        )
    elif len(estimates) > 1:
        parts.append("no other fits")
    return "; ".join(parts)


def _way_out(model: ModelShape, setup: TrainingSetup, estimates: Sequence[Estimate], assumed: Assumptions) -> str:
    """What would make a layout fit."""
    nearest = min(estimates, key=lambda each: each.memory.gpu)
    text = (
        f"no layout fits: the smallest, expert-parallel {nearest.layout.expert_parallel}, needs "
        f"{nearest.memory.gpu / GIB:.1f} of {nearest.usable / GIB:.1f} GiB"
    )
    has_experts = any(model.moe_layers(side) for side in SIDES)
    off = [name for name in SAVERS if not getattr(setup, name) and (name != "offload" or has_experts)]
    for count in range(1, len(off) + 1):
        for names in itertools.combinations(off, count):
            saving = _with(setup, names)
            if _any_fits(model, saving, estimates, assumed):
                return f"{text}; it would with {' '.join(SAVERS[name] for name in names)}"
    smaller = _with(setup, off)
    while smaller.tokens >= 2 * smaller.length:
        smaller = replace(smaller, tokens=smaller.tokens // 2)
        if _any_fits(model, smaller, estimates, assumed):
            switches = " ".join(SAVERS[name] for name in off)
            return f"{text}; it would with {switches} --tokens {smaller.tokens}".replace("  ", " ")
    return f"{text}; take more GPUs, GPUs with more memory, or a smaller model"


def _with(setup: TrainingSetup, savers: Sequence[str]) -> TrainingSetup:
    """A setup with some of `SAVERS` switched on."""
    switched: dict[str, Any] = dict.fromkeys(savers, True)
    return replace(setup, **switched)


def _any_fits(
    model: ModelShape, setup: TrainingSetup, estimates: Sequence[Estimate], assumed: Assumptions
) -> bool:
    """Whether any layout fits under another setup."""
    return any(estimate(model, setup, each.layout, assumed).fits for each in estimates)


def effects(plan: Plan) -> list[tuple[str, Estimate]]:
    """What each option alone would change in the recommended layout, or in the smallest if none fits.

    Returns:
        (option, estimate) pairs, the plan as it is first.
    """
    model, setup = plan.model, plan.setup
    base = plan.best or min(plan.estimates, key=lambda each: each.memory.gpu)
    changes: list[tuple[str, ModelShape, dict[str, Any]]] = [
        (SAVERS[name], model, {name: True}) for name in SAVERS if not getattr(setup, name)
    ]
    if base.layout.expert_parallel > 1:
        changes += [
            ("--payload bf16", model, {"payload": "bf16"}),
            ("--gating-dropout 0.3", model, {"gating_dropout": 0.3, "gating_dropout_mode": "gate"}),
            ("--gating-dropout 0.2, gate_expert", model, {"gating_dropout": 0.2, "gating_dropout_mode": "gate_expert"}),
            ("--bilevel", model, {"bilevel": True}),
            ("--cmr", replace(model, cmr=True), {}),
            ("--cmr --overlap", replace(model, cmr=True), {"overlap": True}),
        ]
    rows = [("as planned", base)]
    for name, shape, switched in changes:
        changed = replace(setup, **switched)
        if (changed, shape) != (setup, model) and not (name == "--payload bf16" and setup.payload_bytes == 2):
            rows.append((name, estimate(shape, changed, base.layout, plan.assumed)))
    return rows
