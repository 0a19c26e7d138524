"""Take the experts out of a training state, and put any range of them back; all in memory.

A training state is what fairseq saves: nested dictionaries with the weights under ``model``, the optimiser's state by
number of the parameter under ``last_optimizer_state``, and whatever else a run has to remember.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtmoe.errors import CheckpointError

OPTIMIZER = ("last_optimizer_state", "state")
"""Where the optimiser's state of each parameter is; its keys are numbers."""

EXPERTS = re.compile(r"(?:.*\.)?experts\.(?:w_in|b_in|w_out|b_out)")
"""Names of stacked parameters of experts, in checkpoints of mtmoe's models."""

STACKED, LIST, SCALAR, NUMBER = "stacked", "list", "scalar", "number"
"""What a tensor in a shard is in the state: a tensor or a list with a value for each expert, or a tensor without
dimensions or a number that is of all experts of a place. Where places that are joined differ in the last two (a place
without tokens counts no update), the largest counts."""


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """What a state holds of some experts in one place."""

    values: Tensor
    """(num_local_experts, ...) or (); see `STACKED` and the rest."""
    form: str


@dataclass(frozen=True, slots=True)
class SplitState:
    """A training state in two parts."""

    shared: dict[str, Any]
    """The state with None where something of experts was. Its order is kept, and so is that of the parameters."""
    experts: dict[str, ExpertTensor]
    """Path in the state, its keys joined by ``/`` -> what was there."""


def is_expert(name: str) -> bool:
    """Whether a parameter of mtmoe's models is stacked experts, by its name."""
    return EXPERTS.fullmatch(name) is not None


def split_state(
    state: Mapping[str, Any],
    parameters: Sequence[str] | None = None,
    expert: Callable[[str], bool] = is_expert,
) -> SplitState:
    """Take everything of experts out of a training state; neither it nor its tensors are changed or copied.

    Args:
        state: of one process, with its own experts.
        parameters: names of the optimiser's parameters in its order; by default `parameter_names` finds them.
        expert: tells of the name of a weight whether its first dimension counts experts.

    Raises:
        CheckpointError: the optimiser keeps something of experts that does not follow their shape.
    """
    experts: dict[str, ExpertTensor] = {}
    moments = _at(state, OPTIMIZER)
    owners: dict[Any, str] = {}
    if moments:
        names = dict(enumerate(parameter_names(state) if parameters is None else parameters))
        _check_shapes(state["model"], moments, names)
        owners = {index: names[int(index)] for index in moments if expert(names.get(int(index), ""))}

    def walk(value: dict[Any, Any], path: tuple[str, ...]) -> Any:
        result: Any = copy.copy(value)  # keeps the class, and the metadata that torch hangs on a module's state
        for key, item in value.items():
            here = (*path, str(key))
            if path == OPTIMIZER and key in owners:
                result[key] = _split_moments(item, state["model"][owners[key]], owners[key], here, experts)
            elif isinstance(item, Tensor) and expert(str(key)):
                experts["/".join(here)] = ExpertTensor(item, STACKED)
                result[key] = None
            elif isinstance(item, dict):
                result[key] = walk(item, here)
        return result

    return SplitState(walk(dict(state), ()), experts)


def _split_moments(
    moments: Mapping[str, Any], weight: Tensor, name: str, path: tuple[str, ...], experts: dict[str, ExpertTensor]
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in moments.items():
        kept[key] = None
        where = "/".join((*path, key))
        if isinstance(value, Tensor) and value.dim() == 0:
            experts[where] = ExpertTensor(value, SCALAR)
        elif isinstance(value, Tensor) and value.shape == weight.shape:
            experts[where] = ExpertTensor(value, STACKED)
        elif isinstance(value, list) and len(value) == len(weight) and all(type(each) is int for each in value):
            experts[where] = ExpertTensor(torch.tensor(value, dtype=torch.int64), LIST)
        elif type(value) in (int, float):
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            experts[where] = ExpertTensor(torch.tensor(value, dtype=dtype), NUMBER)
        elif isinstance(value, Tensor | list | tuple):
            shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
            raise CheckpointError(
                f"the optimiser keeps {key} of shape {shape} for the experts {name} of shape {tuple(weight.shape)}, "
                "which cannot be shared out among them. Train with --optimizer mtmoe_adamw, adam or sgd"
            )
        else:
            kept[key] = value
    return kept


def insert(state: dict[str, Any], path: str, tensor: ExpertTensor) -> None:
    """Put into a state, in place, what `split_state` took from that path.

    Raises:
        CheckpointError: the state has no such place.
    """
    *above, last = path.split("/")
    container: Any = state
    for depth, key in enumerate(above):
        named = {str(each): each for each in container}
        if key not in named and tuple(above[:depth]) == OPTIMIZER:
            # The process that wrote the shared part never had a gradient there; another one did.
            container[int(key)] = {}
            named[key] = int(key)
        if key not in named or not isinstance(container[named[key]], Mapping):
            raise CheckpointError(f"there is no place for {path} in the shared part: it lacks {key}")
        container = container[named[key]]
    if tensor.form == LIST:
        container[last] = tensor.values.tolist()
    elif tensor.form == NUMBER:
        container[last] = tensor.values.item()
    else:
        container[last] = tensor.values


def parameter_names(state: Mapping[str, Any]) -> list[str]:
    """Names of the optimiser's parameters in its order, from a state that does not tell them.

    fairseq gives them to the optimiser in the order of the model, which its state has too.
    """
    seen: set[tuple[int, torch.Size]] = set()
    names = []
    for name, tensor in state["model"].items():
        if not isinstance(tensor, Tensor) or name.endswith((".version", "embed_positions._float_tensor")):
            continue  # buffers of fairseq's Transformer
        identity = (tensor.data_ptr(), tensor.shape)
        if identity not in seen:  # a matrix that is shared is one parameter
            seen.add(identity)
            names.append(name)
    return names


def _check_shapes(model: Mapping[str, Tensor], moments: Mapping[Any, Any], names: Mapping[int, str]) -> None:
    """Refuse an optimiser whose parameters are others than those of the model, as with flat or frozen ones.

    Raises:
        CheckpointError: names the first, and the way out.
    """
    for index, values in moments.items():
        name = names.get(int(index))
        weight = model.get(name) if name is not None else None
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            value = values.get(key)
            if isinstance(value, Tensor) and weight is not None and value.shape != weight.shape:
                raise CheckpointError(
                    f"cannot tell which weights the optimiser's state is of: its {key} of parameter {index} has shape "
                    f"{tuple(value.shape)}, and {name} has {tuple(weight.shape)}. Flat parameters (--fp16 or --bf16 "
                    "without --fp16-no-flatten-grads) and frozen ones cannot be sharded with their optimiser; leave "
                    "it out (mtmoe reshard --no-optimizer)"
                )


def describe(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth knowing of a state without opening it: updates, epoch, and whether its last update was ordinary.

    Returns:
        Plain values, for the manifest.
    """
    iterator = state.get("extra_state", {}).get("train_iterator", {})
    history = state.get("optimizer_history") or [{}]
    return {
        "num_updates": int(history[-1].get("num_updates", 0)),
        "epoch": int(iterator.get("epoch", 1)),
        "steady": iterator.get("progress", {}).get("consecutive_skipped", 0) == 0,
    }


def copy_to_cpu(value: Any) -> Any:
    """Copy nested containers and the tensors in them, so that training may go on changing the originals.

    A tensor that stands in several places is copied once and shared again.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def duplicate(item: Any) -> Any:
        if isinstance(item, Tensor):
            identity = (item.data_ptr(), item.shape, item.stride(), item.dtype, str(item.device))
            if identity not in copies:
                detached = item.detach()
                copies[identity] = detached.clone() if detached.device.type == "cpu" else detached.cpu()
            return copies[identity]
        if isinstance(item, ExpertTensor):
            return ExpertTensor(duplicate(item.values), item.form)
        if isinstance(item, dict):
            result: Any = copy.copy(item)
            for key, each in item.items():
                result[key] = duplicate(each)
            return result
        if type(item) in (list, tuple):
            return type(item)(duplicate(each) for each in item)
        return item

    return duplicate(value)


def _at(state: Any, path: Sequence[str]) -> Any:
    for key in path:
        state = state.get(key) if isinstance(state, Mapping) else None
    return state
