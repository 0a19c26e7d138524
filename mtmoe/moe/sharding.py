"""A layer's experts on several ranks: rows go to their owners, through the experts, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mtmoe import kernels
from mtmoe.errors import ConfigError
from mtmoe.kernels import DispatchPlan
from mtmoe.moe.config import MoEConfig
from mtmoe.moe.experts import ExpertBank
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.masking import gating_is_dropped, skip_experts, stay_local
from mtmoe.moe.routing import RoutingDecision
from mtmoe.parallel import ExpertParallel


class ShardedExperts:
    """What `MoELayer` does between capacity and combination when ranks share out its experts.

    Rows grouped by expert are grouped by rank already, since a rank's experts have consecutive numbers: dispatch →
    exchange → regroup by local expert → experts → back in the order of arrival → exchange → combine. A step takes part
    in the exchange with whatever it has, so that a rank without tokens holds nobody up.

    Args:
        config: of the layer.
        parallel: the ranks.
        backend: as in `MoELayer`.

    Raises:
        ConfigError: the experts cannot be shared out evenly, or gating dropout is to emulate other ranks than those.

    Sources: Lepikhin et al. 2020 (GShard); Liu et al. 2022 (Gating Dropout).
    """

    def __init__(self, config: MoEConfig, parallel: ExpertParallel, backend: str | None = None) -> None:
        self.config, self.parallel, self.backend = config, parallel, backend
        self.local = parallel.local_experts(config.num_experts)
        if config.gating_dropout > 0 and config.gating_dropout_ranks not in (0, parallel.size):
            raise ConfigError(
                f"gating_dropout_ranks={config.gating_dropout_ranks} emulates ranks in one process, but experts are on "
                f"{parallel.size} real ones; leave it at 0"
            )

    def stays_local(self, training: bool, keys: DrawKeys | None) -> bool:
        """Whether gating dropout has drawn this step: the same answer on all ranks, without asking them.

        Raises:
            ValueError: each rank would draw for itself, and some would wait for others for ever.
        """
        if training and self.config.gating_dropout > 0 and keys is None:
            raise ValueError(
                f"gating_dropout={self.config.gating_dropout} needs keys where ranks share out experts, so that all "
                "draw alike: give mtmoe.moe.keyed.DrawKeys"
            )
        return gating_is_dropped(self.config, training, keys)

    def run(self, x: Tensor, decision: RoutingDecision, experts: ExpertBank, stays: bool) -> Tensor:
        """Run tokens through their experts.

        Args:
            x: (tokens, d_model).
            decision: in the numbers of all experts.
            experts: those of this rank.
            stays: of `stays_local`: tokens go to the experts of their own rank (or to none, in mode gate_expert), and
                nothing is exchanged.

        Returns:
            (tokens, d_model), like `x`.
        """
        if stays:
            skips = self.config.gating_dropout_mode == "gate_expert"
            decision = skip_experts(decision) if skips else stay_local(decision, len(self.local))
            plan = kernels.plan_dispatch(decision.expert_index, len(self.local))
            y = experts(kernels.dispatch(x, plan, backend=self.backend), plan)
        else:
            plan = kernels.plan_dispatch(decision.expert_index, self.config.num_experts)
            y = self._through_owners(kernels.dispatch(x, plan, backend=self.backend), plan, experts)
        return kernels.combine(y, plan, decision.weight, backend=self.backend)

    def _through_owners(self, rows: Tensor, plan: DispatchPlan, experts: ExpertBank) -> Tensor:
        """(routed, d_model) grouped by expert -> the experts' outputs in the same order."""
        segments = self.parallel.segments(plan.tokens_per_expert)
        # A GPU's plan has a row for each choice, and those that go nowhere come last: they stay here.
        arrived = self.parallel.exchange(rows[: sum(segments.sent)], segments.sent, segments.received)
        order = regroup(segments.received_per_expert, len(arrived))
        y = experts(kernels.dispatch(arrived, order, backend=self.backend), order)
        y = kernels.dispatch(y, inverse(order), backend=self.backend)
        y = self.parallel.exchange(y, segments.received, segments.sent)
        return F.pad(y, (0, 0, 0, plan.routed - len(y))) if len(y) < plan.routed else y


def regroup(received_per_expert: Tensor, rows: int) -> DispatchPlan:
    """The plan that groups rows by local expert which have arrived rank by rank, and by expert inside a rank.

    Args:
        received_per_expert: (ranks, local experts) int64.
        rows: their sum, so that no device is waited for.

    Returns:
        A plan with a choice a row; an expert's rows stay in the order of the ranks.
    """
    ranks, local = received_per_expert.shape
    expert = torch.arange(local, device=received_per_expert.device).repeat(ranks)
    expert = expert.repeat_interleave(received_per_expert.reshape(-1), output_size=rows)
    return kernels.plan_dispatch(expert[:, None], local)


def inverse(plan: DispatchPlan) -> DispatchPlan:
    """The plan that undoes one which has a choice a row, all of them routed."""
    rows = plan.slot.reshape(-1)
    return DispatchPlan(
        assignment=rows, token=rows, slot=plan.assignment[:, None],
        offsets=torch.tensor([0, len(rows)], device=rows.device),
    )  # fmt: skip
