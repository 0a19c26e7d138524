"""Memory of each GPU and of each node's host, by part."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mtmoe.planning.activations import activation_bytes
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.layouts import Layout
from mtmoe.planning.model import SIDES, ModelShape
from mtmoe.planning.parameters import Parameters, count_parameters
from mtmoe.planning.training import ADAMW_STATES, TrainingSetup


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU at the peak of an update, by part, and on the host of its node."""

    weights: float
    gradients: float
    master: float
    """fp32 copies of weights, and of gradients where the optimiser holds them."""
    optimiser: float
    """Both moments of AdamW."""
    activations: float
    """What the forward pass keeps, copies of weights included."""
    working: float
    """Logits, or gradients of one layer."""
    exchange: float
    """Rows sent and received in an all-to-all."""
    reserved: float
    """CUDA context, libraries, NCCL."""
    host: float
    """In host memory, a node: what is offloaded."""

    @property
    def gpu(self) -> float:
        """All of one GPU."""
        return float(sum(getattr(self, field.name) for field in fields(self) if field.name != "host"))


def memory_of(model: ModelShape, setup: TrainingSetup, layout: Layout, assumed: Assumptions) -> Memory:
    """Count the memory of a layout."""
    parameters, sizes = count_parameters(model), setup.bytes
    experts = parameters.experts / layout.expert_parallel
    replicated = parameters.replicated
    sharded = replicated / (layout.cluster.gpus if setup.zero1 else 1)
    master_bytes = sizes.master + (4 if sizes.master and assumed.master_gradients else 0)
    on_gpu = 0.0 if setup.offload else experts
    activations = activation_bytes(
        model, setup, assumed.rank_imbalance, local_experts=model.num_experts // layout.expert_parallel
    )
    return Memory(
        weights=sizes.weight * (replicated + experts),
        gradients=sizes.gradient * (replicated + experts),
        master=master_bytes * (sharded + on_gpu),
        optimiser=ADAMW_STATES * (sharded + on_gpu),
        activations=activations.saved + activations.copies,
        working=activations.working,
        exchange=exchange_buffers(model, setup, layout, assumed),
        reserved=assumed.reserved_memory,
        host=host_memory(parameters, setup, layout, master_bytes),
    )


def exchange_buffers(model: ModelShape, setup: TrainingSetup, layout: Layout, assumed: Assumptions) -> float:
    """Bytes of rows that wait to be sent and of rows that arrive."""
    if layout.expert_parallel == 1 or not any(model.moe_layers(side) for side in SIDES):
        return 0.0
    rows = setup.tokens * model.routed_a_token
    return rows * model.d_model * setup.payload_bytes * (1 + assumed.rank_imbalance)


def host_memory(parameters: Parameters, setup: TrainingSetup, layout: Layout, master_bytes: int) -> float:
    """Bytes of a node's host memory: offloaded states, and an fp32 copy of weights and gradients to step on."""
    if not setup.offload:
        return 0.0
    staged = 0 if master_bytes else setup.bytes.weight + setup.bytes.gradient
    experts = parameters.experts / layout.expert_parallel * layout.cluster.node_size
    return experts * (ADAMW_STATES + master_bytes + staged)


def usable_memory(layout: Layout, assumed: Assumptions) -> float:
    """Bytes of a GPU that `Memory.gpu` may fill."""
    total = layout.cluster.gpu.memory
    return assumed.reserved_memory + max(0.0, total - assumed.reserved_memory) * assumed.usable_memory
