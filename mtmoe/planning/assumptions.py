"""Everything that a plan takes for granted, in one place, each with where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from mtmoe.errors import ConfigError

SHARES = (
    "utilisation", "memory_bandwidth_share", "network_share", "usable_memory", "all_reduce_overlap",
    "host_overlap",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted. *assumed*: nobody has measured it for this project; measure, and override it."""

    utilisation: float = 0.4
    """Share of a GPU's peak FLOP/s that matrix products and all that stands between them reach together. Source:
    Megatron-LM reports 43 to 52 % for dense models of 1.7 to 1,000 billion parameters on A100, recomputed FLOPs counted
    (Narayanan et al. 2021, Table 1); rounded down, since experts multiply fewer rows at a time. Narrow models
    (d_model below 1024) reach less."""
    memory_bandwidth_share: float = 0.8
    """Share of the memory bandwidth that reading weights and stepping the optimiser reach. assumed"""
    network_share: float = 0.7
    """Share of a link's nominal bandwidth that all-to-all and all-reduce reach. assumed"""
    collective_latency: float = 30e-6
    """Seconds for each collective before the first byte arrives, launch included. assumed"""
    message_in_node: float = 1e-6
    """Seconds of overhead for each peer in the node, in an all-to-all. assumed"""
    message_between_nodes: float = 5e-6
    """Seconds of overhead for each peer on another node, in an all-to-all. assumed"""
    counts_exchange: float = 100e-6
    """Seconds in each MoE layer and forward pass for exchanging the sizes of segments, and waiting for them on the
    host, before the rows can be sent. assumed"""
    rank_imbalance: float = 1.0
    """Rows of the fullest GPU over the mean. 1: an even load, what the load-balance loss drives at; take what your log
    shows. Scales the time and memory of experts, and all-to-all time."""
    all_reduce_overlap: float = 0.0
    """Share of the all-reduce of gradients that hides behind the backward pass. 0: none, an upper bound of the time."""
    host_overlap: float = 0.0
    """Share of the transfers and CPU work of offloaded states that hides. 0: none, an upper bound of the time."""
    host_memory_bandwidth: float = 150e9
    """Bytes/s of a node's memory that AdamW on the CPU reaches, over all its processes. assumed"""
    reserved_memory: float = 2e9
    """Bytes of each GPU for the CUDA context, NCCL's buffers and libraries' workspaces. assumed"""
    usable_memory: float = 0.92
    """Share of a GPU's memory, less the reserved, that can be filled before fragments of the allocator get in the
    way. assumed"""
    master_gradients: bool = True
    """bf16 and fp16: the optimiser holds fp32 copies of gradients beside those of weights. Source: fairseq's
    FP16Optimizer; measured in tests/planning/test_memory.py."""

    def __post_init__(self) -> None:
        for name in SHARES:
            value, least = getattr(self, name), 0.0
            above = value >= least if name.endswith("overlap") else value > least
            if not (above and value <= 1):
                raise ConfigError(f"assumption {name}={value} must be a share: at most 1, and not below 0")
        for name in ("collective_latency", "message_in_node", "message_between_nodes", "counts_exchange",
                     "reserved_memory"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"assumption {name}={getattr(self, name)} must not be negative")
        if not self.rank_imbalance >= 1:
            raise ConfigError(f"assumption rank_imbalance={self.rank_imbalance} must be at least 1, an even load")
        if not self.host_memory_bandwidth > 0:
            raise ConfigError(f"assumption host_memory_bandwidth={self.host_memory_bandwidth} must be above 0")


def with_overrides(overrides: Sequence[str]) -> Assumptions:
    """The assumptions with some changed.

    Args:
        overrides: ``name=value`` each.

    Raises:
        ConfigError: a name is unknown, or a value makes no sense.
    """
    kinds = {field.name: str(field.type) for field in fields(Assumptions)}
    values: dict[str, float | bool] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or name not in kinds:
            raise ConfigError(f"--assume {override!r} must be NAME=VALUE with one of: {', '.join(kinds)}")
        if kinds[name] == "bool":
            if text not in ("true", "false"):
                raise ConfigError(f"--assume {override!r} must be {name}=true or {name}=false")
            values[name] = text == "true"
            continue
        try:
            values[name] = float(text)
        except ValueError:
            raise ConfigError(f"--assume {override!r}: {text!r} is no number, such as {name}=0.5") from None
    return replace(Assumptions(), **values)  # type: ignore[arg-type]
