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
    lr: list[float] = II("optimization.lr")  # type: ignore[assignment]
    store_ema: bool = II("ema.store_ema")  # type: ignore[assignment]


@register_optimizer("mtmoe_adamw", dataclass=MtmoeAdamWConfig)
class MtmoeAdamW(FairseqOptimizer):
    """`mtmoe.training.expert_adamw.ExpertAdamW`.

    fairseq multiplies the gradient by 1 / tokens, then clips it, then steps: three passes. Here the first two only
    remember a factor, and the kernel applies it as it reads the gradient.
    """

    def __init__(self, cfg: Any, params: Collection[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        self._optimizer = ExpertAdamW(list(params), **self.optimizer_config, expert_updates=cfg.expert_updates)
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
        if not all(watched):
            logger.warning(
                "%d of %d expert banks are updated each time: --expert-updates %s needs weights on a CPU that are "
                "trained whole, in their own tensors (no --fp16, --bf16 or sharding)",
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

    def all_reduce_grads(self, module: nn.Module) -> None:
        """Sum the gradients over processes where the wrapper does not, and agree on the experts that have one."""
        super().all_reduce_grads(module)
        group = None
        if self._parallel is not None:
            reduce_expert_gradients(filter(_is_expert, self.params), self._parallel, self._scale)
            group = self._parallel.groups.data_parallel
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            largest = torch.distributed.ReduceOp.MAX
            self._optimizer.share_used(lambda flags: torch.distributed.all_reduce(flags, largest, group=group))

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
