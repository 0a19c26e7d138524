"""The MoE layer: reads like the figure in the papers, from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mtmoe import kernels
from mtmoe.kernels.linear import autocast_dtype
from mtmoe.moe.capacity import limit
from mtmoe.moe.conditional import ConditionalGates, ConditionalRouting, SharedOutput
from mtmoe.moe.config import MoEConfig
from mtmoe.moe.experts import ExpertBank
from mtmoe.moe.gates import build_gate
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.masking import drop_gating, hide, mask_expert_outputs, mask_final_output
from mtmoe.moe.routing import RoutingDecision
from mtmoe.moe.sharding import ShardedExperts
from mtmoe.moe.statistics import RoutingStatistics, gather_statistics
from mtmoe.parallel import ExpertParallel


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """What one forward pass of a layer computed; nothing is kept in the layer itself."""

    y: Tensor
    """(…, d_model): goes into the residual connection; 0 at padding."""
    losses: dict[str, Tensor]
    """Name -> () fp32, not yet weighted."""
    statistics: RoutingStatistics
    """What the routing did."""


class MoELayer(nn.Module):
    """A sparse feed-forward sublayer, without layer norm and residual connection.

    Order: gate → capacity → gating dropout → dispatch → experts → EOM → combine → CMR → FOM.

    Args:
        config: of the layer; stored with the model.
        backend: a key of `mtmoe.kernels.BACKENDS`, to force one; None takes the best for the device. Not stored: it
            changes how the layer computes, not what.
        parallel: the ranks that share out the experts, and whose batches the losses and the sum of the CMR gates are
            over: each rank's losses are those of one process with all batches. Their gradients are of all ranks' losses
            together, so when each rank weights them by its own number of tokens and the trainer adds up gradients,
            one process with all tokens is what comes out. Capacity is by rank, as in GShard. None: one process, which
            needs nothing of torch.distributed.
    """

    def __init__(
        self, config: MoEConfig, backend: str | None = None, parallel: ExpertParallel | None = None
    ) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.sharded = None
        if parallel is not None and parallel.size > 1:
            self.sharded = ShardedExperts(config, parallel, backend)
        self.gate = build_gate(config, backend, parallel)
        self.experts = ExpertBank(config, backend, None if self.sharded is None else self.sharded.local)
        self.conditional = ConditionalRouting(config, parallel) if config.cmr else None

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        survivors: Tensor | None = None,
        keys: DrawKeys | None = None,
    ) -> MoEOutput:
        """Send each token through its experts.

        Args:
            x: (…, d_model), any float type.
            padding_mask: (…) bool, True at padding, which is not routed and takes no capacity; None when there is none.
            survivors: (survivors,) int64 of `mtmoe.moe.clusters.surviving_experts`, the experts that take part in
                training; None for all. Evaluation uses all experts whatever is given.
            keys: what random choices (not ordinary dropout) depend on in training, their tokens of shape (…); None
                draws from torch's generator.

        Returns:
            The output in the shape of `x`, the losses and the statistics.

        Raises:
            ValueError: a shape does not fit, cluster_expert_dropout is on in training without `survivors`, or
                gating_dropout without `keys` where ranks share out the experts.
        """
        config = self.config
        if x.shape[-1] != config.d_model:
            raise ValueError(f"x of shape {tuple(x.shape)} must end in d_model={config.d_model}")
        if padding_mask is not None and padding_mask.shape != x.shape[:-1]:
            raise ValueError(f"padding_mask {tuple(padding_mask.shape)} must be of shape {tuple(x.shape[:-1])}, as x")
        if keys is not None and keys.tokens.shape != x.shape[:-1]:
            raise ValueError(f"keys.tokens {tuple(keys.tokens.shape)} must be of shape {tuple(x.shape[:-1])}, as x")
        if not self.training:
            survivors = None
        elif survivors is not None:
            survivors = survivors.to(x.device)
        elif config.cluster_expert_dropout > 0:
            raise ValueError(
                f"cluster_expert_dropout={config.cluster_expert_dropout} needs survivors in training: give those of "
                "mtmoe.moe.clusters.surviving_experts"
            )
        tokens = x.reshape(-1, config.d_model)
        real = None if padding_mask is None else ~padding_mask.reshape(-1)

        chosen = self.gate(tokens, real, survivors, keys)
        seated = limit(chosen, config, self.training)
        # EOM hides expert outputs; hidden pairs are not worth computing, so it stands before dispatch.
        narrow = tokens.to(autocast_dtype(tokens))  # once for all branches; gates read the tokens in their own type
        gates = None
        if self.sharded is not None:
            y, gates = self._on_ranks(self.sharded, tokens, narrow, seated, real, keys)
        else:
            decision = drop_gating(seated, config, self.training, keys)
            decision = mask_expert_outputs(decision, config, self.training, keys)
            plan = kernels.plan_dispatch(decision.expert_index, config.num_experts)
            y = self.experts(kernels.dispatch(narrow, plan, backend=self.backend), plan)
            y = kernels.combine(y, plan, decision.weight, backend=self.backend)
            if self.conditional is not None:
                gates = self.conditional.gates(tokens, real, keys)
                y = self.conditional(narrow, y, gates)
        if self.conditional is not None and real is not None:
            y = y.masked_fill(~real[:, None], 0)
        y = mask_final_output(y, config, self.training, keys)
        statistics = gather_statistics(chosen, seated, real, gates, survivors)
        return MoEOutput(y.view(x.shape), chosen.losses, statistics)

    def _on_ranks(
        self,
        sharded: ShardedExperts,
        tokens: Tensor,
        narrow: Tensor,
        seated: RoutingDecision,
        real: Tensor | None,
        keys: DrawKeys | None,
    ) -> tuple[Tensor, ConditionalGates | None]:
        """What `forward` does from gating dropout to CMR, where ranks share out the experts."""
        stays = sharded.stays_local(self.training, keys)
        decision = mask_expert_outputs(seated, self.config, self.training, keys)
        if self.conditional is None:
            return sharded.run(narrow, decision, self.experts, stays), None
        gates = self.conditional.gates(tokens, real, keys)
        # A gate of 0, as gate dropout leaves it, takes nothing from the experts: such rows need not travel.
        decision = hide(decision, gates.value == 0)
        shared = SharedOutput(self.conditional.shared, narrow)
        y = sharded.run(narrow, decision, self.experts, stays, shared.step)
        return self.conditional.mix(shared.value(), y, gates), gates
