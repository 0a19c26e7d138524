"""GPUs and the networks between them, with their makers' figures."""

from __future__ import annotations

from dataclasses import dataclass

from mtmoe.errors import ConfigError

GIGA, TERA, GIB = 1e9, 1e12, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU: peak rates as its maker states them, without structured sparsity."""

    name: str
    memory: float
    """Bytes."""
    flops: dict[str, float]
    """``half`` (bf16, or fp16 where that is all there is) and ``single`` (fp32) -> FLOP/s."""
    memory_bandwidth: float
    """Bytes/s."""
    network_in_node: float
    """Bytes/s of one GPU to the others of its node, one direction."""
    network_between_nodes: float
    """Bytes/s of one GPU to other nodes, one direction."""
    host: float
    """Bytes/s between GPU and host memory, one direction."""
    bf16: bool = True
    """Whether it multiplies in bf16."""

    def __post_init__(self) -> None:
        for name in ("memory", "memory_bandwidth", "network_in_node", "network_between_nodes", "host"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} of {self.name} must be above 0")
        for kind, rate in self.flops.items():
            if not rate > 0:
                raise ConfigError(f"{kind} FLOP/s of {self.name} must be above 0, not {rate}")


def _gpu(name: str, memory: int, half: float, single: float, rates: tuple[float, ...], bf16: bool = True) -> Gpu:
    """GiB; TFLOP/s twice; GB/s of memory, to GPUs of the node, to other nodes, to the host."""
    own, in_node, between, host = (rate * GIGA for rate in rates)
    return Gpu(
        name=name, memory=memory * GIB, flops={"half": half * TERA, "single": single * TERA}, memory_bandwidth=own,
        network_in_node=in_node, network_between_nodes=between, host=host, bf16=bf16,
    )  # fmt: skip


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("v100-32", 31, 125, 15.7, (900, 150, 6.25, 16), bf16=False),
        _gpu("a100-40", 39, 312, 19.5, (1555, 300, 25, 32)),
        _gpu("a100-80", 79, 312, 19.5, (2039, 300, 25, 32)),
        _gpu("h100", 79, 989, 67, (3350, 450, 50, 64)),
        _gpu("h200", 139, 989, 67, (4800, 450, 50, 64)),
        _gpu("l40s", 44, 362, 91.6, (864, 32, 25, 32)),
    )
}
"""Name -> GPU. Memory: what CUDA reports, in whole GiB. The rest is of NVIDIA's data sheets of the SXM versions (L40S:
PCIe): dense tensor-core bf16 (V100: fp16), fp32 without tensor cores, memory bandwidth; half of NVLink's bidirectional
bandwidth (L40S: PCIe 4.0 x16); PCIe 3.0, 4.0 or 5.0 x16 to the host. Between nodes: a GPU's part of the InfiniBand of
NVIDIA's DGX machines, 50 (DGX-2), 200 (DGX A100) or 400 Gbit/s (DGX H100), and 200 Gbit/s taken for the L40S; a cluster
may have less, so measure it or read its data sheet, and give --network."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    gpus: int
    """In all."""
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', '-')}={getattr(self, name)} must be at least 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ConfigError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}; give a multiple, or --gpus-per-node"
            )

    @property
    def nodes(self) -> int:
        """Machines."""
        return max(1, self.gpus // self.gpus_per_node)

    @property
    def node_size(self) -> int:
        """GPUs in use on a node."""
        return min(self.gpus, self.gpus_per_node)
