"""AdamW on some experts of a bank: only their weights, moments and gradients are read or written.

Compiled (``csrc/adamw.cpp``) for fp32 on a CPU where the extension is there, otherwise plain torch. Both agree up to
rounding; each alone gives the same bits on any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mtmoe.kernels import extension

BLOCK = 1 << 16
"""Elements on which the plain torch replay runs all its updates before it goes on: 3 arrays of fp32 fit an L2 cache."""

SUMMED_AT_ONCE = 1 << 20
"""Elements of one fp32 norm. torch adds up one running sum a vector lane: it is 1e-5 too small for 2**20 normal random
numbers, 2e-3 for 2**25 (a bank of 32 experts of 512 x 2048) and 2e-2 for 2**27."""


def compiled(*tensors: Tensor) -> bool:
    """Whether the compiled operators are there and can take these tensors."""
    return extension.available() and all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors
    )


def update_experts(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    experts: Sequence[int],
    age: Sequence[int],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: float = 1.0,
) -> None:
    """Update the listed experts in place, each as torch's AdamW would.

    Args:
        param: (num_experts, …) weights, contiguous.
        grad: like `param`; plain torch multiplies the listed experts' part by `factor` in place.
        exp_avg: like `param`, the first moment.
        exp_avg_sq: like `param`, the second moment.
        experts: different ones.
        age: of each listed expert how many updates its moments are behind this one, at least 1; those between count as
            updates without gradient.
        step: number of this update, from 1, for the bias correction.
        lr: learning rate.
        betas: decay of the moments an update.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        factor: what the gradient is multiplied by.
    """
    beta1, beta2 = betas
    if compiled(param, grad, exp_avg, exp_avg_sq):
        torch.ops.mtmoe.adamw_step(
            param, grad, exp_avg, exp_avg_sq, experts, [beta1**n for n in age], [beta2**n for n in age], factor,
            beta1, beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps,
        )  # fmt: skip
        return
    for expert, n in zip(experts, age, strict=True):
        if n > 1:
            exp_avg[expert].mul_(beta1 ** (n - 1))
            exp_avg_sq[expert].mul_(beta2 ** (n - 1))
    scale = None if factor == 1.0 else torch.tensor(1 / factor, dtype=torch.float32, device=param.device)
    parts = [[each[expert] for expert in experts] for each in (param, grad, exp_avg, exp_avg_sq)]
    steps = [torch.tensor(step - 1.0, device=param.device) for _ in experts]
    adamw(
        parts[0], parts[1], parts[2], parts[3], [], steps, fused=True, grad_scale=scale,
        found_inf=None if scale is None else torch.zeros_like(scale), amsgrad=False, maximize=False,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip


def replay(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, experts: Sequence[int], ends: Sequence[int], rows: Tensor
) -> None:
    """Make up for updates without gradient: ``param = decay * param - step_size * exp_avg / (sqrt(exp_avg_sq) + eps)``.

    Args:
        param: (num_experts, …) weights, contiguous; changed in place.
        exp_avg: like `param`; only read.
        exp_avg_sq: like `param`; only read.
        experts: different ones.
        ends: of each listed expert the end of its rows; they start at the end before.
        rows: (updates, 3) ``decay, step_size, eps`` in the dtype of `param`, applied in order.
    """
    if compiled(param, exp_avg, exp_avg_sq, rows):
        torch.ops.mtmoe.adamw_replay(param, exp_avg, exp_avg_sq, experts, ends, rows)
        return
    table = rows.tolist()
    for expert, start, end in zip(experts, [0, *ends[:-1]], ends, strict=True):
        arrays = [each[expert].view(-1).split(BLOCK) for each in (param, exp_avg, exp_avg_sq)]
        for weights, momentum, second in zip(*arrays, strict=True):
            root = second.sqrt()
            for decay, step_size, eps in table[start:end]:
                weights.mul_(decay).addcdiv_(momentum, root + eps, value=-step_size)


def total_norm(grads: Sequence[tuple[Tensor, Sequence[int] | None]]) -> Tensor:
    """Euclidean norm of gradients taken together, in one pass.

    Args:
        grads: pairs of a gradient and the experts whose part counts (the others are not read); None = all of it.

    Returns:
        () fp32 or wider, on the device of the first gradient.
    """
    if not grads:
        return torch.zeros(())
    if compiled(*(grad for grad, _ in grads)):
        experts = [[0] if listed is None else listed for _, listed in grads]
        tensors = [grad.unsqueeze(0) if listed is None else grad for grad, listed in grads]
        flat = [expert for listed in experts for expert in listed]
        return torch.tensor(math.sqrt(torch.ops.mtmoe.sum_of_squares(tensors, flat, [*accumulate(map(len, experts))])))
    device = grads[0][0].device
    norms = [torch.zeros((), device=device)]
    for grad, listed in grads:
        dtype = torch.promote_types(grad.dtype, torch.float32)
        for part in [grad] if listed is None else [grad[expert] for expert in listed]:
            for piece in part.reshape(-1).split(SUMMED_AT_ONCE):
                norms.append(torch.linalg.vector_norm(piece, dtype=dtype).to(device))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
