"""How long an update takes, by part."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mtmoe.planning import communication
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.flops import BACKWARD, Flops, forward_flops
from mtmoe.planning.layouts import Layout
from mtmoe.planning.model import SIDES, ModelShape
from mtmoe.planning.parameters import count_parameters
from mtmoe.planning.training import ADAMW_STATES, TrainingSetup


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of an update, by part; parts come one after the other, what overlaps is taken off."""

    compute: float
    """Matrix products of all but the experts, and what stands between them."""
    experts: float
    """Products of the experts: arithmetic or reading their weights, whichever binds."""
    all_to_all: float
    """Exchange of tokens that does not hide."""
    all_reduce: float
    """Averaging of gradients (and gathering of weights) that does not hide."""
    optimiser: float
    """AdamW on the GPU."""
    host: float
    """Transfers to the host and AdamW there, as far as they do not hide."""

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def peak_flops(setup: TrainingSetup, layout: Layout) -> float:
    """FLOP/s of a GPU in the type of the products."""
    return layout.cluster.gpu.flops["half" if setup.bytes.product == 2 else "single"]


def step_time(model: ModelShape, setup: TrainingSetup, layout: Layout, assumed: Assumptions) -> StepTime:
    """Estimate the time of an update."""
    forward = forward_flops(model, setup.tokens, setup.tokens, setup.length)
    passes = 1 + BACKWARD + setup.recompute
    rate = peak_flops(setup, layout) * assumed.utilisation
    rest = forward.output * (1 + BACKWARD) + (forward.layers - forward.experts) * passes
    optimiser, host = _optimiser_seconds(model, setup, layout, assumed)
    traffic = communication.all_reduce_bytes(count_parameters(model), setup, layout)
    all_reduce = sum(communication.all_reduce_seconds(part, layout.cluster.gpu, assumed) for part in traffic)
    return StepTime(
        compute=setup.accumulate * rest / rate,
        experts=setup.accumulate * setup.expert_share * _expert_seconds(model, setup, layout, forward, assumed),
        all_to_all=setup.accumulate * setup.exchange_share * _exchange_seconds(model, setup, layout, assumed),
        all_reduce=all_reduce * (1 - assumed.all_reduce_overlap),
        optimiser=optimiser,
        host=host * (1 - assumed.host_overlap),
    )


def _expert_seconds(
    model: ModelShape, setup: TrainingSetup, layout: Layout, forward: Flops, assumed: Assumptions
) -> float:
    """Time of one batch's expert products."""
    arithmetic = forward.experts * assumed.rank_imbalance * (1 + BACKWARD + setup.recompute)
    arithmetic /= peak_flops(setup, layout) * assumed.utilisation
    sizes = setup.bytes
    # Weights are read in each pass, and the backward pass writes their gradients; autocast reads the wide ones besides,
    # to write a narrow copy.
    cast = sizes.weight + sizes.product if sizes.product != sizes.weight else 0
    moved = (2 + setup.recompute) * sizes.product + sizes.gradient + (1 + setup.recompute) * cast
    experts = count_parameters(model).experts / layout.expert_parallel
    reading = experts * moved / (layout.cluster.gpu.memory_bandwidth * assumed.memory_bandwidth_share)
    return max(arithmetic, reading)


def _exchange_seconds(model: ModelShape, setup: TrainingSetup, layout: Layout, assumed: Assumptions) -> float:
    """Time of one batch's all-to-alls that hides behind nothing."""
    group, gpu = layout.expert_group, layout.cluster.gpu
    if group.size == 1:
        return 0.0
    row_bytes = model.d_model * setup.payload_bytes
    traffic = communication.exchange(
        setup.tokens * model.routed_a_token, row_bytes, group, model.top_k, setup.bilevel
    )
    once = communication.exchange_seconds(traffic, group, gpu, assumed, setup.bilevel)
    forward, backward = communication.exchanges_of(setup)
    rate = peak_flops(setup, layout) * assumed.utilisation
    seconds = 0.0
    for side in SIDES:
        shared = setup.tokens * 4 * model.d_model * model.shared_d_ffn(side) / rate if setup.overlap else 0.0
        # The shared network runs while tokens travel, there and back: each pass has two exchanges to hide.
        ahead = max(0.0, forward * once - (1 + setup.recompute) * shared)
        back = max(0.0, backward * once - BACKWARD * shared)
        counts = assumed.counts_exchange * (1 + setup.recompute)
        seconds += model.moe_layers(side) * (ahead + back + counts)
    return seconds


def _optimiser_seconds(
    model: ModelShape, setup: TrainingSetup, layout: Layout, assumed: Assumptions
) -> tuple[float, float]:
    """Time of AdamW on the GPU, and of what offloading its states costs."""
    parameters, sizes, cluster = count_parameters(model), setup.bytes, layout.cluster
    experts = parameters.experts / layout.expert_parallel
    # Moments and fp32 weights are read and written, the gradient is read; half precision is read and written besides.
    moved = 2 * ADAMW_STATES + 3 * 4 + (sizes.gradient + 2 * 4 + sizes.weight if sizes.master else 0)
    local = parameters.replicated / (cluster.gpus if setup.zero1 else 1) + (0 if setup.offload else experts)
    on_gpu = local * moved / (cluster.gpu.memory_bandwidth * assumed.memory_bandwidth_share)
    if not setup.offload:
        return on_gpu, 0.0
    transfer = experts * (sizes.gradient + sizes.weight) / cluster.gpu.host
    stepping = experts * cluster.node_size * moved / assumed.host_memory_bandwidth
    return on_gpu, transfer + stepping
