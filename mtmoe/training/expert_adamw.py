"""AdamW for models with experts: an expert that got no token costs nothing in that update.

AdamW moves a weight without gradient too: by its momentum, and by weight decay. Those updates can wait until the
weight is used again, since they need nothing but the moments of that time and the learning rates since. So an expert's
moments stay as its last gradient left them, and before a forward pass uses it, or a checkpoint is written, its weights
are brought up to date: update by update, in registers, in one pass over its memory.

With beta1**2 < beta2 the momentum's part falls faster than the root of the second moment, by r = beta1 / sqrt(beta2) an
update. After `horizon` updates all that would still follow is less than one fp32 rounding error of a single update, and
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils.hooks import RemovableHandle

from mtmoe.kernels import adamw as kernels

EXPERT_UPDATES = ("dense", "exact", "lazy")
"""How an expert without tokens is treated: updated each time; updated when it is next used, with the same result; not
at all, as torch's SparseAdam does, which is another optimiser."""

HISTORY = 1024
"""Updates that an expert may be behind; then all are brought up to date, which is one pass in so many updates."""


def horizon(betas: tuple[float, float]) -> int:
    """Updates after an expert's last gradient whose momentum still counts.

    By Cauchy–Schwarz ``|exp_avg| <= C sqrt(exp_avg_sq)`` with ``C**2 = (1 - beta1)**2 / ((1 - beta2) (1 - r**2))``, so
    the n-th update without gradient moves a weight by at most ``lr C r**n`` (the bias corrections are near 1 by then),
    and all from the n-th on by ``lr C r**n / (1 - r)``. That is to be below ``2**-25 lr``, the rounding error of one
    fp32 update of size lr.

    Raises:
        ValueError: beta1**2 >= beta2, so that momentum does not fade.
    """
    beta1, beta2 = betas
    ratio = beta1 / math.sqrt(beta2)
    if ratio >= 1:
        raise ValueError(f"betas={betas}: exact expert updates need beta1**2 < beta2; choose dense updates instead")
    if beta1 == 0:
        return 0
    bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio**2))
    return max(0, math.ceil(math.log(2**-25 * (1 - ratio) / bound) / math.log(ratio)))


@dataclass
class _Bank:
    """Stacked weights of one layer's experts, and what each of them has missed."""

    parameters: list[nn.Parameter]
    group: dict[str, Any]
    step: int
    touched: list[int]
    """Of each expert the update that its moments are of; 0 = it never had a gradient."""
    current: list[int]
    """Of each expert the update that its weights are of."""
    used: set[int] = field(default_factory=set)
    """Experts that may have a gradient now."""
    history: list[tuple[float, float]] = field(default_factory=list)
    """Learning rate and weight decay of the last updates, up to `step`."""

    def missed(self, experts: Sequence[int]) -> tuple[list[int], list[int], np.ndarray]:
        """Those of the experts whose weights change, and their updates for `kernels.replay`, in fp64."""
        beta1, beta2 = self.group["betas"]
        current, touched = (np.array([each[expert] for expert in experts]) for each in (self.current, self.touched))
        counts = self.step - current
        owner = np.repeat(np.arange(len(experts)), counts)
        step = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + current[owner] + 1
        rates = np.array(self.history)[step - 1 - self.step]  # counted from the end
        since = step - touched[owner]
        moves = (since <= horizon((beta1, beta2))) & (touched[owner] > 0)
        since = np.where(moves, since, 0)
        # exp_avg_sq would be smaller by beta2**since: its root is taken once, and its factor goes into the others.
        root = beta2 ** (since / 2) / np.sqrt(1 - beta2**step)
        rows = np.stack(
            [
                1 - rates[:, 0] * rates[:, 1],
                np.where(moves, rates[:, 0] * beta1**since / (1 - beta1**step) / root, 0),
                np.where(moves, self.group["eps"] / root, 1),
            ],
            axis=1,
        )
        kept = moves | (rows[:, 0] != 1)
        sizes = np.bincount(owner[kept], minlength=len(experts))
        changed = np.flatnonzero(sizes)
        return [experts[int(i)] for i in changed], np.cumsum(sizes[changed]).tolist(), rows[kept]


class ExpertAdamW(torch.optim.Optimizer):
    """AdamW whose cost grows with the experts that an update touches.

    Parameters are updated as by ``torch.optim.AdamW(fused=True)`` until `watch` tells which are stacked experts. To
    read such weights other than through a forward pass or ``state_dict`` of their module, call `catch_up` first.

    Args:
        params: as in torch.
        lr: learning rate.
        betas: decay of the moments an update.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        expert_updates: one of `EXPERT_UPDATES`.

    Raises:
        ValueError: `expert_updates` is unknown, or exact with betas for which momentum does not fade.

    Source: Loshchilov & Hutter 2019, Decoupled weight decay regularization.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        expert_updates: str = "exact",
    ) -> None:
        if expert_updates not in EXPERT_UPDATES:
            known = ", ".join(EXPERT_UPDATES)
            raise ValueError(f"expert_updates={expert_updates!r} is unknown; choose one of: {known}")
        if expert_updates == "exact":
            horizon(betas)
        self.expert_updates = expert_updates
        self._banks: list[_Bank] = []
        self._watched: dict[nn.Parameter, _Bank] = {}
        self._hooks: list[RemovableHandle] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    # Experts

    def watch(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
        """Treat parameters as stacked experts: the first dimension counts them.

        Args:
            module: the only one that uses them; its second input is a `mtmoe.kernels.DispatchPlan`.
            parameters: they always get gradients together.

        Returns:
            Whether that is possible: dense updates are not asked for, and all are contiguous on a CPU and in one
            parameter group.
        """
        groups = [group for group in self.param_groups if any(each is parameters[0] for each in group["params"])]
        if self.expert_updates == "dense" or not groups:
            return False
        members = {id(each) for each in groups[0]["params"]}
        if not all(id(p) in members and p.device.type == "cpu" and p.is_contiguous() for p in parameters):
            return False
        bank = _Bank(list(parameters), groups[0], 0, [], [])
        self._banks.append(bank)
        self._watched.update(dict.fromkeys(parameters, bank))
        self._restore(bank)

        def before_use(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            experts = [expert for expert, _, _ in inputs[1].segments]
            self._catch_up(bank, experts)
            if torch.is_grad_enabled():
                bank.used.update(experts)

        self._hooks.append(module.register_forward_pre_hook(before_use))
        self._hooks.append(module.register_state_dict_pre_hook(lambda *_: self._catch_up(bank)))
        return True

    def release(self) -> None:
        """Never touch the weights of experts again, because another optimiser or a checkpoint takes them over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._banks.clear()
        self._watched.clear()

    def catch_up(self) -> None:
        """Bring all weights up to date."""
        for bank in self._banks:
            self._catch_up(bank)

    def forget(self) -> None:
        """Forget all moments, as before the first update; weights that wait for updates get them first."""
        self.catch_up()
        self.state.clear()
        for bank in self._banks:
            self._restore(bank)

    def share_used(self, reduce: Callable[[Tensor], object]) -> None:
        """Let all processes agree on the experts that may have a gradient, once gradients are summed.

        Args:
            reduce: takes the largest value over the processes, in place, of an int32 tensor on the CPU.
        """
        if not self._banks:
            return
        flags = [torch.zeros(len(bank.touched), dtype=torch.int32) for bank in self._banks]
        for flag, bank in zip(flags, self._banks, strict=True):
            flag[sorted(bank.used)] = 1
        shared = torch.cat(flags)
        reduce(shared)
        for part, bank in zip(shared.split([len(flag) for flag in flags]), self._banks, strict=True):
            bank.used = set(part.nonzero()[:, 0].tolist())

    @torch.no_grad()
    def _catch_up(self, bank: _Bank, experts: Sequence[int] | None = None) -> None:
        if self.expert_updates != "exact" or not bank.history:
            return
        listed = range(len(bank.current)) if experts is None else experts
        behind = [expert for expert in listed if bank.current[expert] < bank.step]
        if behind:
            changed, ends, rows = bank.missed(behind)
            for parameter in bank.parameters if changed else ():
                state = self.state[parameter]
                # Through .data: a graph that holds these weights knows other experts of them, which stay as they are.
                table = torch.from_numpy(rows).to(parameter.dtype)
                kernels.replay(parameter.data, state["exp_avg"], state["exp_avg_sq"], changed, ends, table)
            for expert in behind:
                bank.current[expert] = bank.step
        if experts is None:
            bank.history.clear()

    # What every optimiser has

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        for bank in self._banks:
            bank.used.clear()

    def gradient_norm(self, chosen: Callable[[Tensor], bool] | None = None) -> Tensor:
        """Euclidean norm of all gradients, in one pass that leaves out experts without tokens.

        Args:
            chosen: which parameters to take; None takes all.

        Returns:
            () fp32 or wider.
        """
        pairs: list[tuple[Tensor, Sequence[int] | None]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and (chosen is None or chosen(parameter)):
                    bank = self._watched.get(parameter)
                    pairs.append((parameter.grad, None if bank is None else sorted(bank.used)))
        return kernels.total_norm(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, factor: Tensor | float = 1.0) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: as in torch.
            factor: what the gradients are multiplied by; they may be left multiplied.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_dense(group, factor)
        number = float(factor) if self._banks else 1.0
        for bank in self._banks:
            self._step_bank(bank, number)
        return loss

    def _step_dense(self, group: dict[str, Any], factor: Tensor | float) -> None:
        params = [each for each in group["params"] if each.grad is not None and each not in self._watched]
        if not params:
            return
        for parameter in params:
            self._prepare(parameter)
            self._settle(parameter)
        states = [self.state[each] for each in params]
        scale = None
        if isinstance(factor, Tensor) or factor != 1.0:
            scale = torch.as_tensor(1.0 / factor, dtype=torch.float32, device=params[0].device)
        adamw(
            params, [each.grad for each in params],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states], fused=True, grad_scale=scale,
            found_inf=None if scale is None else torch.zeros_like(scale), amsgrad=False, maximize=False,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _step_bank(self, bank: _Bank, factor: float) -> None:
        if all(parameter.grad is None for parameter in bank.parameters):
            return
        experts = sorted(bank.used)
        self._catch_up(bank, experts)  # those that only another process used
        bank.step += 1
        group, lazy = bank.group, self.expert_updates == "lazy"
        age = [1 if lazy else bank.step - bank.touched[expert] for expert in experts]
        for parameter in bank.parameters:
            if parameter.grad is None:
                raise RuntimeError("some weights of an expert bank have no gradient, others have; freeze all or none")
            self._prepare(parameter)
            state = self.state[parameter]
            state["step"].fill_(bank.step)
            if not lazy:
                state["touched"] = bank.touched
            kernels.update_experts(
                parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"], experts, age,
                step=bank.step, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], factor=factor,
            )  # fmt: skip
        if lazy:
            return
        for expert in experts:
            bank.touched[expert] = bank.current[expert] = bank.step
        bank.history.append((float(group["lr"]), group["weight_decay"]))
        if min(bank.current) == bank.step:
            bank.history.clear()
        elif len(bank.history) == HISTORY:
            self._catch_up(bank)

    def _prepare(self, parameter: Tensor) -> None:
        if not self.state[parameter]:
            self.state[parameter].update(
                step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                exp_avg=torch.zeros_like(parameter, memory_format=torch.preserve_format),
                exp_avg_sq=torch.zeros_like(parameter, memory_format=torch.preserve_format),
            )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state, in the layout of ``torch.optim.AdamW``, after all weights are brought up to date.

        ``touched`` tells of each expert which update its moments are of: they are kept as the last gradient left them,
        so that a resumed run rounds as an unbroken one.
        """
        self.catch_up()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back; of this class with any `expert_updates`, or of torch's AdamW."""
        super().load_state_dict(state_dict)
        for bank in self._banks:
            bank.group = next(g for g in self.param_groups if any(p is bank.parameters[0] for p in g["params"]))
            self._restore(bank)

    def _restore(self, bank: _Bank) -> None:
        """Let a bank begin where the state of its parameters is; the weights are of the same update."""
        experts = len(bank.parameters[0])
        state = self.state[bank.parameters[0]]
        if self.expert_updates == "lazy":
            for parameter in bank.parameters:
                self._settle(parameter)
        bank.step = int(state["step"]) if state else 0
        bank.touched = list(state.get("touched", [bank.step] * experts))
        bank.current = [bank.step] * experts
        bank.history.clear()
        bank.used.clear()

    @torch.no_grad()
    def _settle(self, parameter: Tensor) -> None:
        """Bring the moments of experts up to date, for updates that know nothing of experts."""
        state = self.state[parameter]
        if "touched" not in state:
            return
        group = next(each for each in self.param_groups if any(member is parameter for member in each["params"]))
        for expert, touched in enumerate(state.pop("touched")):
            age = int(state["step"]) - touched
            state["exp_avg"][expert].mul_(group["betas"][0] ** age)
            state["exp_avg_sq"][expert].mul_(group["betas"][1] ** age)
