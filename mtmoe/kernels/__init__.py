"""The three steps that move tokens through experts, and dropout: one signature, several implementations.

``plan_dispatch`` turns a routing decision into a permutation; ``dispatch`` groups the tokens by expert,
``grouped_linear`` multiplies each group with its expert's matrix, and ``combine`` adds the weighted results up at each
token. Nothing here is of size tokens x experts.

Backends: ``cpu`` (hand-written backward, one GEMM a non-empty expert), ``triton`` (GPU kernels; the choice on CUDA
where triton is installed) and ``reference`` (plain torch, obvious; the choice for every other device). All agree in
values and gradients. A backend is imported when it is first used.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mtmoe.kernels.attention import attend
from mtmoe.kernels.dropout import dropout
from mtmoe.kernels.linear import feed_forward, linear
from mtmoe.kernels.plan import DispatchPlan, plan_dispatch
from mtmoe.kernels.residual import residual_add, residual_norm

__all__ = [
    "ACTIVATIONS", "BACKENDS", "DispatchPlan", "attend", "combine", "dispatch", "dropout", "feed_forward",
    "grouped_linear", "linear", "plan_dispatch", "residual_add", "residual_norm",
]  # fmt: skip

BACKENDS = {name: f"mtmoe.kernels.{name}" for name in ("cpu", "reference", "triton")}
"""Name of a backend -> its module with ``dispatch``, ``grouped_linear`` and ``combine``."""

ACTIVATIONS = ("relu", "gelu", "silu")
"""What `grouped_linear` can do to its result; gelu is the exact one."""


def load_backend(name: str | None, device: torch.device) -> ModuleType:
    """Find a backend by name, or the best one for a device.

    Raises:
        ValueError: the name is unknown; the text lists the known ones.
        ImportError: the backend needs a package that is not installed; the text tells how to install it.
    """
    if name is None:
        name = "cpu" if device.type == "cpu" else "reference"
        if device.type == "cuda" and _triton_is_installed():
            name = "triton"
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; choose one of: {', '.join(sorted(BACKENDS))}")
    if name == "triton" and not _triton_is_installed():
        raise ImportError("backend='triton' needs the package triton, which is not installed: pip install mtmoe[gpu]")
    return import_module(BACKENDS[name])


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def dispatch(x: Tensor, plan: DispatchPlan, *, backend: str | None = None) -> Tensor:
    """Copy each token once for each expert it goes to, grouped by expert.

    Args:
        x: (tokens, d_model), any float type; gets a gradient.
        plan: of the same number of tokens.
        backend: a key of `BACKENDS`; by default the best for the device.

    Returns:
        (routed, d_model), like `x`: first expert's tokens first, in token order within an expert. Rows past the plan's
        last offset, which only a GPU's plan has, hold anything and get no gradient, here and in `grouped_linear`.

    Raises:
        ValueError: `x` has another number of tokens than the plan.
    """
    if x.dim() != 2 or x.shape[0] != plan.tokens:
        raise ValueError(f"dispatch got x of shape {tuple(x.shape)}; the plan is for ({plan.tokens}, d_model)")
    return load_backend(backend, x.device).dispatch(x, plan)  # type: ignore[no-any-return]


def grouped_linear(
    x: Tensor,
    plan: DispatchPlan,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Apply to each group of rows the linear map of its expert, and an activation.

    Under autocast inputs are cast to the autocast type, as torch's own linear does.

    Args:
        x: (routed, d_in), grouped as `dispatch` returns it; gets a gradient.
        plan: tells how many rows belong to each expert.
        weight: (num_experts, d_out, d_in); gets a gradient, zero for an expert without tokens.
        bias: (num_experts, d_out) or None; gets a gradient.
        activation: one of `ACTIVATIONS`, applied to the sum; None for none.
        backend: a key of `BACKENDS`; by default the best for the device.

    Returns:
        (routed, d_out).

    Raises:
        ValueError: the shapes do not fit each other or the plan, or the activation is unknown.
    """
    if weight.dim() != 3 or weight.shape[0] != plan.num_experts or x.shape != (plan.routed, weight.shape[2]):
        raise ValueError(
            f"grouped_linear got x {tuple(x.shape)} and weight {tuple(weight.shape)}; the plan has {plan.routed} rows "
            f"for {plan.num_experts} experts"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"grouped_linear got bias {tuple(bias.shape)}; weight asks for {tuple(weight.shape[:2])}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose None or one of: {', '.join(ACTIVATIONS)}")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = x.dtype
        if weight.dtype != dtype:
            raise ValueError(f"grouped_linear got x of {dtype} and weight of {weight.dtype}; cast one, or use autocast")
    return load_backend(backend, x.device).grouped_linear(  # type: ignore[no-any-return]
        x.to(dtype), plan, weight, bias, activation
    )


def combine(y: Tensor, plan: DispatchPlan, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Add up at each token what its experts returned, each times its weight.

    Args:
        y: (routed, d_model), grouped by expert; gets a gradient.
        plan: the plan that grouped the tokens.
        weight: (tokens, top_k) fp32; gets a gradient. Entries of choices that are not routed are ignored.
        backend: a key of `BACKENDS`; by default the best for the device.

    Returns:
        (tokens, d_model), the type of `y`, summed in at least fp32; zero where a token went to no expert.

    Raises:
        ValueError: the shapes do not fit the plan.
    """
    if y.dim() != 2 or y.shape[0] != plan.routed or weight.shape != (plan.tokens, plan.top_k):
        raise ValueError(
            f"combine got y {tuple(y.shape)} and weight {tuple(weight.shape)}; the plan has {plan.routed} rows "
            f"of {plan.tokens} tokens with {plan.top_k} choices"
        )
    return load_backend(backend, y.device).combine(y, plan, weight)  # type: ignore[no-any-return]
