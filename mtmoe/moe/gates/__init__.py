"""Gates by name. Adding one means a file here, a line in `GATES` and a test."""

from __future__ import annotations

from mtmoe.moe.config import MoEConfig
from mtmoe.moe.gates.bilevel import BiLevelGate
from mtmoe.moe.gates.cosine import CosineGate
from mtmoe.moe.gates.topk import TopKGate
from mtmoe.parallel import ExpertParallel

__all__ = ["GATES", "BiLevelGate", "CosineGate", "TopKGate", "build_gate"]

GATES: dict[str, type[TopKGate]] = {"topk": TopKGate, "moec": CosineGate, "bilevel": BiLevelGate}
"""Name -> gate: a module with ``forward(x, real, survivors, keys) -> RoutingDecision``."""


def build_gate(config: MoEConfig, backend: str | None = None, parallel: ExpertParallel | None = None) -> TopKGate:
    """Make the gate that a config names; `backend` and `parallel` as in `MoELayer`.

    Raises:
        ValueError: the name is unknown; the text lists the known ones.
    """
    if config.gate not in GATES:
        raise ValueError(f"gate={config.gate!r} is unknown; choose one of: {', '.join(sorted(GATES))}")
    return GATES[config.gate](config, backend, parallel)
