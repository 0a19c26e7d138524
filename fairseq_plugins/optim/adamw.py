"""AdamW in torch's fused kernel, on CPUs too; the gradient is scaled, clipped and used in one pass."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import eval_str_list
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import Tensor


@dataclass
class MtmoeAdamWConfig(FairseqDataclass):
    """Options of ``--optimizer mtmoe_adamw``; named as those of fairseq's ``adam``."""

    adam_betas: str = field(default="(0.9, 0.98)", metadata={"help": "decay of the two moments"})
    adam_eps: float = field(default=1e-6, metadata={"help": "added to the root of the second moment"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled weight decay"})
    lr: list[float] = II("optimization.lr")  # type: ignore[assignment]


@register_optimizer("mtmoe_adamw", dataclass=MtmoeAdamWConfig)
class MtmoeAdamW(FairseqOptimizer):
    """``torch.optim.AdamW(fused=True)``.

    fairseq multiplies the gradient by 1 / tokens, then clips it, then steps: three passes. Here the first two only
    remember a factor, and the fused kernel divides by it as it reads the gradient.
    """

    def __init__(self, cfg: Any, params: Collection[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        betas = tuple(eval_str_list(cfg.adam_betas, float))
        self._optimizer = torch.optim.AdamW(
            list(params), lr=cfg.lr[0], betas=betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay, fused=True
        )
        self._factor: Tensor | float = 1.0
        self._norm: Tensor | None = None

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
        grads = [parameter.grad for parameter in self.params if parameter.grad is not None]
        if not grads:
            return torch.zeros(())
        norm = torch.nn.utils.get_total_norm(grads) * self._factor
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            self._factor = self._factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def step(self, closure: Any = None, scale: float = 1.0, groups: Any = None) -> None:
        """Update the parameters.

        Args:
            closure: as in torch; seldom used.
            scale: what the gradients are still to be divided by.
            groups: not supported.
        """
        factor = self._factor / scale
        device = self.param_groups[0]["params"][0].device
        if isinstance(factor, Tensor) or factor != 1.0:
            self._optimizer.grad_scale = torch.as_tensor(1.0 / factor, dtype=torch.float32, device=device)
            self._optimizer.found_inf = torch.zeros((), device=device)
        try:
            self._optimizer.step(closure)
        finally:
            self._optimizer.grad_scale = self._optimizer.found_inf = None
            self._factor = 1.0
