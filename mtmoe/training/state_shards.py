"""Optimiser state that is shared out over processes with the same weights (ZeRO, stage 1).

Each parameter has one owner. Only it keeps the parameter's moments and master copy, and updates it; then it sends the
new weights to the others. Parameters are not cut, so an update has the bits that it has without sharding.

torch's ``ZeroRedundancyOptimizer`` does the same for all parameters of an optimiser. Here some, the experts whose
updates wait until they are used, must stay with everybody, the optimiser must stay one object with one list of groups,
and a process that fails alone must not wait for the others to collect a state (fairseq writes ``crash.pt`` then).

Source: Rajbhandari et al. 2020 (ZeRO), section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mtmoe.training.master_weights import in_batches

States = dict[int, dict[str, Any]]
"""Number of a parameter -> what an optimiser keeps for it, as in the state dict of an optimiser."""


class StateShards:
    """Who owns which parameter. All processes make it with the same parameters, and call its methods together.

    Args:
        parameters: those to share out; they are the same in all processes. All others stay with everybody.
        group: the processes; None = all, or this one alone.
    """

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if several else (0, 1)
        self.owner = shared_out(parameters, self.size)

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process keeps the state of a parameter."""
        return self.owner.get(parameter, self.rank) == self.rank

    @torch.no_grad()
    def publish(self) -> None:
        """Send each owner's weights to the others."""
        if self.size == 1:
            return
        for owner, batch in self._batches():
            values = [parameter.data for parameter in batch]
            flat = values[0].reshape(-1) if len(values) == 1 else torch.cat([value.reshape(-1) for value in values])
            dist.broadcast(flat, group=self.group, group_src=owner)
            if owner != self.rank:
                sizes = [value.numel() for value in values]
                for value, part in zip(values, flat.split(sizes), strict=True):
                    if part.data_ptr() != value.data_ptr():
                        value.copy_(part.view_as(value))

    def _batches(self) -> Iterator[tuple[int, list[Tensor]]]:
        """What is sent at once: parameters of one owner, type and device."""
        lists: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
        for parameter, owner in self.owner.items():
            lists.setdefault((owner, parameter.dtype, parameter.device), []).append(parameter)
        for (owner, _, _), parameters in lists.items():
            for batch in in_batches(parameters):
                yield owner, batch

    # Checkpoints

    def gather(self, states: States, parameters: Sequence[Tensor]) -> States:
        """Bring all states to the first process, one tensor at a time.

        Args:
            states: of this process.
            parameters: all of the optimiser, in the order of their numbers.

        Returns:
            In the first process those of all owners, on the CPU where they came from others; elsewhere `states`.
        """
        if self.size == 1:
            return states
        owned = {number: state for number, state in states.items() if parameters[number] in self.owner}
        outlines: list[Any] = [None] * self.size
        dist.all_gather_object(outlines, _outline(owned), group=self.group)
        found = dict(states)
        for owner, outline in enumerate(outlines[1:], 1):
            if self.rank == owner:
                for tensor in _tensors(owned):
                    dist.send(tensor.to(self._device()).contiguous(), group=self.group, group_dst=0)
            elif self.rank == 0:
                found |= _filled(outline, partial(self._received, source=owner, keep_on="cpu"))
        return found

    def distribute(self, states: States | None, parameters: Sequence[Tensor]) -> States:
        """Send each process what it is to keep, one tensor at a time: the opposite of `gather`.

        Args:
            states: in the first process all; elsewhere they do not count.
            parameters: as in `gather`.
        """
        if self.size == 1:
            return states or {}
        found: States = {}
        for number, outline in self.from_first(_outline(states or {})).items():
            owner = self.owner.get(parameters[number])
            whole = (states or {}).get(number)
            if self.rank == 0 and whole is not None:
                for tensor in _tensors({number: whole}) if owner != 0 else ():
                    value = tensor.to(self._device()).contiguous()
                    if owner is None:
                        dist.broadcast(value, group=self.group, group_src=0)
                    else:
                        dist.send(value, group=self.group, group_dst=owner)
                if self.owns(parameters[number]):
                    found[number] = whole
            elif owner is None:
                found |= _filled({number: outline}, self._shared)
            elif owner == self.rank:
                found |= _filled({number: outline}, partial(self._received, source=0))
        return found

    def from_first(self, value: Any) -> Any:
        """What the first process gave."""
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def _received(self, like: Tensor, source: int, keep_on: str | None = None) -> Tensor:
        tensor = torch.empty(like.shape, dtype=like.dtype, device=self._device())
        dist.recv(tensor, group=self.group, group_src=source)
        return tensor.to(keep_on or tensor.device)

    def _shared(self, like: Tensor) -> Tensor:
        tensor = torch.empty(like.shape, dtype=like.dtype, device=self._device())
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")


def shared_out(parameters: Sequence[Tensor], size: int) -> dict[Tensor, int]:
    """The owner of each parameter: the largest first, each to whom has the fewest elements yet.

    Args:
        parameters: the same in all processes.
        size: processes.
    """
    load, owner = [0] * size, dict.fromkeys(parameters, 0)
    for parameter in sorted(parameters, key=lambda each: -each.numel()):
        owner[parameter] = load.index(min(load))
        load[owner[parameter]] += parameter.numel()
    return owner


def _outline(states: States) -> States:
    """The states without the contents of their tensors."""
    return {
        number: {
            name: value.to("meta") if isinstance(value, Tensor) else value for name, value in sorted(state.items())
        }
        for number, state in states.items()
    }


def _tensors(states: States) -> Iterator[Tensor]:
    """The tensors in the order of `_outline`."""
    for state in states.values():
        for _, value in sorted(state.items()):
            if isinstance(value, Tensor):
                yield value


def _filled(outline: States, read: Callable[[Tensor], Tensor]) -> States:
    """An outline with the tensors that `read` gets for those without contents."""
    filled: States = {}
    for number, state in outline.items():
        filled[number] = {name: read(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    return filled
