"""Expert parallelism: experts shared out over processes, tokens sent to them and back; torch.distributed only."""

from mtmoe.parallel.exchange import AllToAll, Segments, Traffic
from mtmoe.parallel.expert_parallel import ExpertParallel
from mtmoe.parallel.gradients import EXPERT_GRADIENT_SCALES, reduce_expert_gradients, total_norm
from mtmoe.parallel.groups import Groups, build_groups
from mtmoe.parallel.layout import Layout

__all__ = [
    "EXPERT_GRADIENT_SCALES", "AllToAll", "ExpertParallel", "Groups", "Layout", "Segments", "Traffic", "build_groups",
    "reduce_expert_gradients", "total_norm",
]  # fmt: skip
