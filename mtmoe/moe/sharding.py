"""A layer's experts on several ranks: rows go to their owners, through the experts, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from mtmoe.parallel import AllToAll, ExpertParallel


class ShardedExperts:
    """What `MoELayer` does between capacity and combination when ranks share out its experts.

    Rows grouped by expert are grouped by rank already, since a rank's experts have consecutive numbers: dispatch →
    exchange → regroup by local expert → experts → back in the order of arrival → exchange → combine. A step takes part
    in the exchange with whatever it has, so that a rank without tokens holds nobody up.

    In two steps, a token's row goes once to each host that has experts of it, to the rank in the sender's place there,
    with the numbers and weights of these experts. That rank does all of the above among the ranks of its host, and
    sends back the weighted sum of the experts' outputs.

    Args:
        config: of the layer.
        parallel: the ranks.
        backend: as in `MoELayer`.

    Raises:
        ConfigError: the experts cannot be shared out evenly, or gating dropout is to emulate other ranks than those.

    Sources: Lepikhin et al. 2020 (GShard); Liu et al. 2022 (Gating Dropout); He et al. 2022 (SMILE), two steps.
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

    def run(
        self,
        x: Tensor,
        decision: RoutingDecision,
        experts: ExpertBank,
        stays: bool,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Run tokens through their experts.

        Args:
            x: (tokens, d_model).
            decision: in the numbers of all experts.
            experts: those of this rank.
            stays: of `stays_local`: tokens go to the experts of their own rank (or to none, in mode gate_expert), and
                nothing is exchanged.
            meanwhile: called twice where rows are exchanged: on their way to the experts and on their way back, or, if
                nothing is to overlap, right after.

        Returns:
            (tokens, d_model), like `x`.
        """
        if stays:
            skips = self.config.gating_dropout_mode == "gate_expert"
            decision = skip_experts(decision) if skips else stay_local(decision, len(self.local))
            plan = kernels.plan_dispatch(decision.expert_index, len(self.local))
            y = experts(kernels.dispatch(x, plan, backend=self.backend), plan)
            return kernels.combine(y, plan, decision.weight, backend=self.backend)
        index, weight = decision.expert_index, decision.weight
        if self.parallel.by_hosts is None:
            return self._among(self.parallel.whole, x, index, weight, experts, meanwhile)
        return self._by_hosts(*self.parallel.by_hosts, x, index, weight, experts, meanwhile)

    def _by_hosts(
        self,
        across: AllToAll,
        within: AllToAll,
        x: Tensor,
        expert_index: Tensor,
        weight: Tensor,
        experts: ExpertBank,
        meanwhile: Callable[[], None],
    ) -> Tensor:
        """(tokens, d_model) -> the same through experts on all hosts; each row goes once to each host that it needs."""
        local = len(self.local) * within.size
        host = torch.where(expert_index < 0, expert_index, expert_index.div(local, rounding_mode="floor"))
        plan = kernels.plan_dispatch(once_each(host), across.size)
        segments = across.segments(plan.tokens_per_expert)
        send, receive = segments.sent, segments.received
        rows = sum(send)
        token = plan.token[:rows]
        target = host.reshape(-1)[plan.assignment[:rows], None]  # (rows, 1)
        elsewhere = host[token] != target
        index = (expert_index[token] - target * local).masked_fill(elsewhere, -1)
        index = across.start(index.to(torch.int32), send, receive).wait().long()
        part = across.exchange(weight[token].masked_fill(elsewhere, 0), send, receive, exact=True)
        sent = kernels.dispatch(x, plan, backend=self.backend)[:rows]
        arrived = self._travel(across, sent, send, receive, meanwhile)
        y = self._among(within, arrived, index, part, experts)
        y = self._travel(across, y, receive, send, meanwhile)
        return kernels.combine(padded(y, plan), plan, torch.ones_like(weight), backend=self.backend)

    def _among(
        self,
        ranks: AllToAll,
        x: Tensor,
        expert_index: Tensor,
        weight: Tensor,
        experts: ExpertBank,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """(tokens, d_model) -> the same through experts of a group of ranks, which are numbered from 0."""
        plan = kernels.plan_dispatch(expert_index, len(self.local) * ranks.size)
        rows = kernels.dispatch(x, plan, backend=self.backend)
        segments = ranks.segments(plan.tokens_per_expert)
        # A GPU's plan has a row for each choice, and those that go nowhere come last: they stay here.
        rows = rows[: sum(segments.sent)]
        arrived = self._travel(ranks, rows, segments.sent, segments.received, meanwhile)
        order = regroup(segments.received_per_expert, len(arrived))
        y = experts(kernels.dispatch(arrived, order, backend=self.backend), order)
        y = kernels.dispatch(y, inverse(order), backend=self.backend)
        y = self._travel(ranks, y, segments.received, segments.sent, meanwhile)
        return kernels.combine(padded(y, plan), plan, weight, backend=self.backend)

    def _travel(
        self,
        ranks: AllToAll,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        meanwhile: Callable[[], None],
    ) -> Tensor:
        """Exchange rows, and call `meanwhile` before or after they have arrived."""
        under_way = ranks.begin(rows, send, receive)
        if self.parallel.overlap:
            meanwhile()
            return under_way.finish()
        arrived = under_way.finish()
        meanwhile()
        return arrived


def once_each(host: Tensor) -> Tensor:
    """(tokens, top_k) int64 with the second and later choices of a host by one token replaced by -1."""
    top_k = host.shape[1]
    same = host[:, :, None] == host[:, None, :]
    earlier = torch.ones(top_k, top_k, dtype=torch.bool, device=host.device).tril(-1)
    return host.masked_fill((same & earlier).any(dim=2), -1)


def padded(y: Tensor, plan: DispatchPlan) -> Tensor:
    """(rows, d_model) with rows of zeros at the end for the choices of a plan that go nowhere."""
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
