"""AdamW in fused kernels, on CPUs too; experts without tokens cost nothing, and a gradient is scaled as it is read."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import eval_str_list
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import Tensor, nn

from fairseq_plugins.expert_checkpoints import take_local
from mtmoe.errors import ConfigError
from mtmoe.moe.experts import ExpertBank
from mtmoe.parallel import ExpertParallel, reduce_expert_gradients, total_norm
from mtmoe.training.expert_adamw import EXPERT_UPDATES, ExpertAdamW

logger = logging.getLogger(__name__)


@dataclass
class MtmoeAdamWConfig(FairseqDataclass):
    """Options of ``--optimizer mtmoe_adamw``; named as those of fairseq's ``adam``."""

    adam_betas: str = field(default="(0.9, 0.98)", metadata={"help": "decay of the two moments"})
    adam_eps: float = field(default=1e-6, metadata={"help": "added to the root of the second moment"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled weight decay"})
    expert_updates: ChoiceEnum(list(EXPERT_UPDATES)) = field(  # type: ignore[valid-type]
        default="exact",
        metadata={
            "help": "experts without tokens: updated each time (dense), when next used, with the same result (exact), "
            "or not at all (lazy: another optimiser)"
        },
    )
    offload_expert_state: bool = field(
        default=False,
        metadata={
            "help": "keep the optimiser's state of experts, and fp32 copies of their weights, in the CPU's memory, and "
            "update there the experts that got tokens; for models on GPUs"
        },
    )
    lr: list[float] = II("optimization.lr")  # type: ignore[assignment]
    store_ema: bool = II("ema.store_ema")  # type: ignore[assignment]


@register_optimizer("mtmoe_adamw", dataclass=MtmoeAdamWConfig)
class MtmoeAdamW(FairseqOptimizer):
    """`mtmoe.training.expert_adamw.ExpertAdamW`.

    fairseq multiplies the gradient by 1 / tokens, then clips it, then steps: three passes. Here the first two only
    remember a factor, and the kernel applies it as it reads the gradient. Weights in bf16 (``--bf16``) get fp32 master
    copies.
    """

    def __init__(self, cfg: Any, params: Collection[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        if cfg.offload_expert_state and (cfg.expert_updates == "dense" or cfg.store_ema):
            other = "--store-ema" if cfg.store_ema else "--expert-updates dense"
            raise ConfigError(f"--offload-expert-state moves only experts with tokens; it does not go with {other}")
        self._optimizer = ExpertAdamW(
            list(params),
            **self.optimizer_config,
            expert_updates=cfg.expert_updates,
            master_weights=True,
            offload_experts=cfg.offload_expert_state,
        )
        self._factor: Tensor | float = 1.0
        self._model: nn.Module | None = None
        self._parallel: ExpertParallel | None = None
        self._scale = ""

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """What a resumed run takes from its own options instead of the checkpoint."""
        return {
            "lr": self.cfg.lr[0],
            "betas": tuple(eval_str_list(self.cfg.adam_betas, float)),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }

    @property
    def supports_flat_params(self) -> bool:
        """The update is pointwise."""
        return True

    def watch_experts(self, model: nn.Module) -> None:
        """Learn from now on which experts of `model` each forward pass uses; a second call does nothing."""
        if model is self._model:
            return
        self._model = model
        banks = [module for module in model.modules() if isinstance(module, ExpertBank)]
        if self.cfg.expert_updates == "dense" or not banks:
            return
        if self.cfg.store_ema:
            logger.warning("--store-ema reads all weights at each update: all experts are updated each time")
            return
        watched = [self._optimizer.watch(bank, list(bank.parameters())) for bank in banks]
        if not all(watched) and self.cfg.offload_expert_state:
            raise ConfigError(
                f"--offload-expert-state: {watched.count(False)} of {len(banks)} expert banks are frozen or not in "
                "their own tensors (--fp16, --ddp-backend fully_sharded); train without that, or without offloading"
            )
        if not all(watched):
            logger.warning(
                "%d of %d expert banks are updated each time: --expert-updates %s needs weights on a CPU that are "
                "trained whole, in their own tensors (no --fp16 or fully_sharded), or --offload-expert-state",
                watched.count(False), len(banks), self.cfg.expert_updates,
            )  # fmt: skip

    def release_experts(self) -> None:
        """Never touch the experts' weights again; for an optimiser that is being replaced."""
        self._optimizer.release()

    def share_experts(self, parallel: ExpertParallel, scale: str) -> None:
        """Leave experts to the ranks that hold them.

        Args:
            parallel: the ranks.
            scale: of their gradients, one of `mtmoe.parallel.EXPERT_GRADIENT_SCALES`.
        """
        self._parallel, self._scale = parallel, scale

    def prepare(self, model: nn.Module, group: Any, sharded: bool) -> None:
        """Get ready for a state from a checkpoint, so that none of it lies where it is not to stay.

        Args:
            model: as in `watch_experts`.
            group: processes with the same weights.
            sharded: share the state out over them: each keeps, updates and sends a part.
        """
        if sharded or self.cfg.offload_expert_state:
            self.watch_experts(model)
        if sharded:
            self._optimizer.shard(group)

    def gather_state(self) -> None:
        """Bring a sharded state to the first process, for its next `state_dict`; all have to call this together."""
        self._optimizer.gather_state()

    def master_copies(self, model: nn.Module, state_dict: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """The fp32 master copies of weights, by all names that the model has for each.

        Args:
            model: not wrapped.
            state_dict: of this optimiser, if there is one already.
        """
        copies = self._optimizer.master_copies(state_dict or self.state_dict())
        named = model.named_parameters(remove_duplicate=False)
        return {name: copies[parameter] for name, parameter in named if parameter in copies}

    def broadcast_global_state_dict(self, state_dict: Any) -> dict[str, Any]:
        """Send each process its part of the state that the first one has loaded; called by fairseq."""
        return self._optimizer.distribute(state_dict if isinstance(state_dict, dict) else None)

    def all_reduce_grads(self, module: nn.Module) -> None:
        """Sum the gradients over processes where the wrapper does not, and agree on the experts that have one."""
        super().all_reduce_grads(module)
        group = None
        if self._parallel is not None:
            reduce_expert_gradients(filter(_is_expert, self.params), self._parallel, self._scale)
            group = self._parallel.groups.data_parallel
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._optimizer.share_used(lambda flags: _keep_largest(flags, group))

    def zero_grad(self) -> None:
        """Forget the gradients, and the factor that belonged to them."""
        self._optimizer.zero_grad(set_to_none=True)
        self._factor = 1.0

    def multiply_grads(self, c: Tensor | float) -> None:
        """Remember that the gradients are to be multiplied by `c`."""
        self._factor = self._factor * c

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        """Norm of the (multiplied) gradients; the factor that brings it to `max_norm` is remembered, not applied.

        Args:
            max_norm: largest norm; 0 = no limit.
            aggregate_norm_fn: combines the norms of several processes.

        Returns:
            () fp32 norm before clipping.
        """
        if self._parallel is None:
            norm = self._optimizer.gradient_norm()
        else:
            replicated = self._optimizer.gradient_norm(lambda each: not _is_expert(each))
            norm = total_norm(replicated, self._optimizer.gradient_norm(_is_expert), self._parallel)
        norm = norm * self._factor
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            self._factor = self._factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: Any = None) -> None:
        """Take a state back; of one that holds all experts, those of this process."""
        super().load_state_dict(take_local(state_dict, list(self.params)), optimizer_overrides)

    def step(self, closure: Any = None, scale: float = 1.0, groups: Any = None) -> None:
        """Update the parameters.

        Args:
            closure: as in torch; seldom used.
            scale: what the gradients are still to be divided by.
            groups: not supported.
        """
        self._optimizer.step(closure, factor=self._factor / scale)
        self._factor = 1.0


def _is_expert(parameter: Tensor) -> bool:
    return hasattr(parameter, "expert")


def _keep_largest(flags: Tensor, group: Any) -> None:
    """Take the largest value over the processes, in place; NCCL works on tensors of a GPU only."""
    shared = flags.cuda() if torch.distributed.get_backend() == "nccl" else flags
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=group)
    flags.copy_(shared)
