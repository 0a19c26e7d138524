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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils.hooks import RemovableHandle

from mtmoe.kernels import adamw as kernels
from mtmoe.training import master_weights
from mtmoe.training.state_shards import States, StateShards
from mtmoe.training.waiting_experts import Bank, horizon

EXPERT_UPDATES = ("dense", "exact", "lazy")
"""How an expert without tokens is treated: updated each time; updated when it is next used, with the same result; not
at all, as torch's SparseAdam does, which is another optimiser."""

HISTORY = 1024
"""Updates that an expert may be behind; then all are brought up to date, which is one pass in so many updates."""


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
        master_weights: keep and update fp32 copies of weights in 16 bits; else those are updated as they are.
        offload_experts: keep the state of experts, and copies of their weights, in the CPU's memory, and update them
            there. For a model on a GPU; on a CPU it gives the same bits, and saves nothing.

    Raises:
        ValueError: `expert_updates` is unknown, or exact with betas for which momentum does not fade, or dense together
            with `offload_experts`.

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
        master_weights: bool = False,
        offload_experts: bool = False,
    ) -> None:
        if expert_updates not in EXPERT_UPDATES:
            known = ", ".join(EXPERT_UPDATES)
            raise ValueError(f"expert_updates={expert_updates!r} is unknown; choose one of: {known}")
        if expert_updates == "exact":
            horizon(betas)
        if offload_experts and expert_updates == "dense":
            raise ValueError("offload_experts needs expert_updates='exact' or 'lazy': dense updates move all experts")
        self.expert_updates = expert_updates
        self.master_weights, self.offload_experts = master_weights, offload_experts
        self._shards: StateShards | None = None
        self._gathered: States = {}
        self._banks: list[Bank] = []
        self._watched: dict[nn.Parameter, Bank] = {}
        self._hooks: list[RemovableHandle] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    # Experts

    def watch(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
        """Treat parameters as stacked experts: the first dimension counts them.

        Args:
            module: the only one that uses them; its second input is a `mtmoe.kernels.DispatchPlan`.
            parameters: they always get gradients together.

        Returns:
            Whether that is possible: dense updates are not asked for, and all are contiguous, in one parameter group,
            and on a CPU or offloaded to one.

        Raises:
            RuntimeError: the state is sharded already.
        """
        if self._shards is not None:
            raise RuntimeError("watch experts before the state is sharded: each process keeps that of all experts")
        groups = [group for group in self.param_groups if any(each is parameters[0] for each in group["params"])]
        if self.expert_updates == "dense" or not groups:
            return False
        members = {id(each) for each in groups[0]["params"]}
        reached = self.offload_experts or all(p.device.type == "cpu" for p in parameters)
        if not reached or not all(id(p) in members and p.is_contiguous() for p in parameters):
            return False
        bank = Bank(list(parameters), groups[0], 0, [], [])
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
        for parameter, state in list(self.state.items()):
            self.state[parameter] = {name: value for name, value in state.items() if name == "master"}
        for bank in self._banks:
            self._restore(bank)

    def master_copies(self, state_dict: dict[str, Any]) -> dict[Tensor, Tensor]:
        """Parameter -> its master copy, of those that have one in a state dict of this optimiser."""
        states = state_dict["state"]
        return {
            each: states[number]["master"]
            for number, each in enumerate(self._parameters())
            if "master" in states.get(number, {})
        }

    # Sharded state

    def shard(self, group: Any = None) -> None:
        """Share the state out over processes with the same weights and gradients: each keeps and updates its part.

        Left out are watched experts, and parameters with an attribute ``expert``, which differ between processes. From
        now on `step`, `gather_state`, `distribute` and `load_state_dict` have to be called in all processes together.

        Args:
            group: a process group of torch.distributed; None = all processes, or this one alone.

        Raises:
            RuntimeError: there is a state already; load it afterwards.
        """
        if any(self.state.values()):
            raise RuntimeError("shard the state before the first update; load_state_dict takes each process's part")
        shared = [p for p in self._parameters() if p not in self._watched and not getattr(p, "expert", False)]
        self._shards = StateShards(shared, group)

    def gather_state(self) -> None:
        """Bring all states to the first process, whose next `state_dict` holds them; without sharding, do nothing."""
        if self._shards is not None:
            self.catch_up()
            parameters = self._parameters()
            states = {number: self.state[each] for number, each in enumerate(parameters) if self.state.get(each)}
            self._gathered = self._shards.gather(states, parameters)

    def distribute(self, state_dict: dict[str, Any] | None) -> dict[str, Any]:
        """Send each process its part of a state dict; without sharding, each has it already.

        Args:
            state_dict: of the whole optimiser in the first process; elsewhere it does not count.
        """
        if self._shards is None or self._shards.size == 1:
            return state_dict or {}
        first = self._shards.rank == 0
        states = self._shards.distribute(state_dict["state"] if first and state_dict else None, self._parameters())
        return {"state": states, "param_groups": self._shards.from_first(state_dict and state_dict["param_groups"])}

    def _parameters(self) -> list[Tensor]:
        """All parameters, in the order of their numbers in a state dict."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _on_host(self, parameter: Tensor) -> bool:
        return self.offload_experts and parameter in self._watched

    def _has_master(self, parameter: Tensor) -> bool:
        narrow = self.master_weights and parameter.dtype in master_weights.NARROW
        return narrow or self._on_host(parameter)

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
    def _catch_up(self, bank: Bank, experts: Sequence[int] | None = None) -> None:
        if self.expert_updates != "exact" or not bank.history:
            return
        listed = range(len(bank.current)) if experts is None else experts
        behind = [expert for expert in listed if bank.current[expert] < bank.step]
        if behind:
            changed, ends, rows = bank.missed(behind)
            for parameter in bank.parameters if changed else ():
                state = self.state[parameter]
                # Through .data: a graph that holds these weights knows other experts of them, which stay as they are.
                table = torch.from_numpy(rows).to(state["exp_avg"].dtype)
                if "master" in state:
                    master_weights.replay(parameter, state, changed, ends, table)
                    continue
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
        self._gathered = {}
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_dense(group, factor)
        number = float(factor) if self._banks else 1.0
        for bank in self._banks:
            self._step_bank(bank, number)
        if self._shards is not None:
            self._shards.publish()
        return loss

    def _step_dense(self, group: dict[str, Any], factor: Tensor | float) -> None:
        params = [each for each in group["params"] if each.grad is not None and each not in self._watched]
        if self._shards is not None:
            params = [each for each in params if self._shards.owns(each)]
        for parameter in params:
            self._prepare(parameter)
            self._settle(parameter)
        plain = [each for each in params if "master" not in self.state[each]]
        if plain:
            self._adamw(group, factor, plain, plain, [each.grad for each in plain])
        for batch in master_weights.in_batches([each for each in params if "master" in self.state[each]]):
            masters = [self.state[each]["master"] for each in batch]
            grads = [each.grad.to(masters[0].dtype) for each in batch if each.grad is not None]
            self._adamw(group, factor, batch, masters, grads)
            torch._foreach_copy_(batch, masters)

    def _adamw(
        self,
        group: dict[str, Any],
        factor: Tensor | float,
        params: list[Tensor],
        weights: list[Tensor],
        grads: list[Tensor],
    ) -> None:
        """Update `weights`, which are the parameters or their master copies."""
        states = [self.state[each] for each in params]
        scale = None
        if isinstance(factor, Tensor) or factor != 1.0:
            scale = torch.as_tensor(1.0 / factor, dtype=torch.float32, device=params[0].device)
        adamw(
            weights, grads,
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states], fused=True, grad_scale=scale,
            found_inf=None if scale is None else torch.zeros_like(scale), amsgrad=False, maximize=False,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _step_bank(self, bank: Bank, factor: float) -> None:
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
            options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            options |= {"step": bank.step, "lr": float(group["lr"]), "factor": factor}
            if "master" in state:
                master_weights.update_experts(parameter, state, experts, age, **options)
                continue
            kernels.update_experts(
                parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"], experts, age, **options
            )
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
        state = self.state[parameter]
        if "exp_avg" in state:
            return
        if self._has_master(parameter):
            self.state[parameter] = {**master_weights.new_state(parameter, self._on_host(parameter)), **state}
            return
        state.update(
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
        packed = super().state_dict()
        packed["state"] |= self._gathered
        self._gathered = {}
        parameters = self._parameters()
        for number, state in packed["state"].items():
            if "master" in state and parameters[number].dtype not in master_weights.NARROW:
                packed["state"][number] = {name: value for name, value in state.items() if name != "master"}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back; of this class with any options, or of torch's AdamW."""
        super().load_state_dict({**state_dict, "state": {}})  # torch would round master copies to the weights' type
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            saved = state_dict["state"].get(number)
            if saved and (self._shards is None or self._shards.owns(parameter)):
                self._place(parameter, saved)
        if self._shards is not None:
            self._shards.publish()  # what a master copy adds to the weights
        for bank in self._banks:
            bank.group = next(g for g in self.param_groups if any(p is bank.parameters[0] for p in g["params"]))
            self._restore(bank)

    def _place(self, parameter: Tensor, saved: dict[str, Any]) -> None:
        master, host = self._has_master(parameter), self._on_host(parameter)
        self.state[parameter] = master_weights.restored(parameter, saved, master, host)

    def _restore(self, bank: Bank) -> None:
        """Let a bank begin where the state of its parameters is; the weights are of the same update."""
        experts = len(bank.parameters[0])
        for parameter in bank.parameters:
            if "exp_avg" in self.state[parameter]:
                self._place(parameter, self.state[parameter])  # loaded before it was known as an expert's
        state = self.state[bank.parameters[0]]
        if self.expert_updates == "lazy":
            for parameter in bank.parameters:
                self._settle(parameter)
        bank.step = int(state.get("step", 0))
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
