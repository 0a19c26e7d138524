"""The gate in one kernel each way: softmax, top-k, policy, weights and counts, a token's experts in registers.

Legend of the kernels: a program handles BLOCK_T tokens (rows) of BLOCK_E experts (columns, a power of two); TOP_K
choices stand in BLOCK_K columns. POLICY is the position of a name in `mtmoe.kernels.gating.POLICIES`.

Sums are the same on every run: integer counts are added atomically, which has no order, and each program writes its
part of the fp32 sums to a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtmoe.kernels.gating import POLICIES, TRITON_EXPERTS

ELEMENTS = 2048
"""Logits a program holds: 16 fp32 values a thread of 4 warps, so that logits, probabilities and ranks stay in
registers (no spills at 8 to 1024 experts on sm_80, sm_90 and sm_100)."""


@triton.jit
def choose_kernel(
    logits_ptr, draws_ptr, real_ptr,  # (tokens, num_experts), of the policy, (tokens,)
    probs_ptr, index_ptr, ranked_ptr, weight_ptr,  # (tokens, num_experts), then (tokens, top_k)
    log_partition_ptr, counts_ptr, sums_ptr,  # (tokens,), (2, num_experts), (programs, num_experts + 1)
    tokens, num_experts, threshold,
    POLICY: tl.constexpr, HAS_REAL: tl.constexpr, NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Everything of `mtmoe.kernels.gating.choose_experts`, for BLOCK_T tokens."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column, choice = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    in_rows, in_columns = row < tokens, column < num_experts
    inside = in_rows[:, None] & in_columns[None, :]
    place = row[:, None] * num_experts + column[None, :]
    logits = tl.load(logits_ptr + place, mask=inside, other=-float("inf")).to(tl.float32)
    # Rows behind the last token hold zeros, so that nothing there becomes NaN.
    logits = tl.where(in_rows[:, None], logits, 0.0)
    best = tl.max(logits, axis=1)
    powers = tl.where(in_columns[None, :], tl.exp(logits - best[:, None]), 0.0)
    norm = tl.sum(powers, axis=1)
    probs = powers / norm[:, None]
    log_partition = best + tl.log(norm)
    tl.store(probs_ptr + place, probs, mask=inside)
    tl.store(log_partition_ptr + row, log_partition, mask=in_rows)

    # NaN ranks first, as in torch. Among equals the lower expert wins, and none is taken twice even if all are -inf.
    rank = tl.where(logits == logits, logits, float("inf"))
    if POLICY == 1:
        draws = tl.load(draws_ptr + place, mask=inside, other=1.0).to(tl.float32)
        noisy = rank - tl.log(draws)  # Gumbel noise: the best is drawn in proportion to its probability
    free = in_columns[None, :] & (row >= 0)[:, None]
    ranked = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for k in tl.static_range(TOP_K):
        top = tl.max(tl.where(free, rank, -float("inf")), axis=1)
        expert = tl.min(tl.where(free & (rank == top[:, None]), column[None, :], BLOCK_E), axis=1)
        taken = column[None, :] == expert[:, None]
        free = free & (taken == 0)
        ranked = tl.where(choice[None, :] == k, expert[:, None], ranked)
        chosen = tl.where(choice[None, :] == k, tl.sum(tl.where(taken, probs, 0.0), axis=1)[:, None], chosen)
        if POLICY == 1 and k == 0:
            rank = noisy

    share = chosen / tl.sum(chosen, axis=1)[:, None]
    at = row[:, None] * TOP_K + choice[None, :]
    in_choices = in_rows[:, None] & (choice < TOP_K)[None, :]
    keep = in_choices
    if POLICY == 2:
        uniform = tl.load(draws_ptr + at, mask=in_choices, other=0.0).to(tl.float32)
        keep = keep & ((choice == 0)[None, :] | (2 * share > uniform))
    if POLICY == 3:
        keep = keep & ((choice == 0)[None, :] | (share > threshold))
    counted = in_rows
    if HAS_REAL:
        counted = counted & (tl.load(real_ptr + row, mask=in_rows, other=0) != 0)
        keep = keep & counted[:, None]
    weight = share if NORMALIZE else chosen
    index = tl.where(keep, ranked, -1)
    tl.store(index_ptr + at, index.to(tl.int64), mask=in_choices)
    tl.store(ranked_ptr + at, ranked, mask=in_choices)
    tl.store(weight_ptr + at, tl.where(keep, weight, 0.0), mask=in_choices)

    everything = tl.zeros([BLOCK_E], tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(choice[None, :] == k, index, 0), axis=1)
        hits = tl.sum((column[None, :] == expert[:, None]).to(tl.int32), axis=0)
        if k == 0:
            tl.atomic_add(counts_ptr + num_experts + column, hits.to(tl.int64), mask=in_columns & (hits > 0))
        everything += hits
    tl.atomic_add(counts_ptr + column, everything.to(tl.int64), mask=in_columns & (everything > 0))
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * (num_experts + 1)
    tl.store(sums + column, tl.sum(tl.where(counted[:, None], probs, 0.0), axis=0), mask=in_columns)
    tl.store(sums + num_experts, tl.sum(tl.where(counted, log_partition * log_partition, 0.0), axis=0))


@triton.jit
def choose_backward_kernel(
    probs_ptr, ranked_ptr, index_ptr, log_partition_ptr, real_ptr,  # as the forward kernel left them
    grad_weight_ptr, grad_probs_ptr, grad_probability_ptr, grad_squared_ptr,  # like what they are of
    grad_logits_ptr,  # (tokens, num_experts), the type of the logits
    tokens, num_experts,
    HAS_REAL: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_PROBS: tl.constexpr, HAS_PROBABILITY: tl.constexpr, HAS_SQUARED: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from those of the weights, the probabilities and both sums, as far as there are any."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_E)
    in_rows, in_columns = row < tokens, column < num_experts
    inside = in_rows[:, None] & in_columns[None, :]
    place = row[:, None] * num_experts + column[None, :]
    probs = tl.load(probs_ptr + place, mask=inside, other=0.0)
    real = in_rows.to(tl.float32)
    if HAS_REAL:
        real = (tl.load(real_ptr + row, mask=in_rows, other=0) != 0).to(tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)  # gradient of the probabilities, over all their uses
    if HAS_PROBS:
        total += tl.load(grad_probs_ptr + place, mask=inside, other=0.0)
    if HAS_PROBABILITY:
        total += real[:, None] * tl.load(grad_probability_ptr + column, mask=in_columns, other=0.0)[None, :]
    if HAS_WEIGHT:
        norm, mean = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
        if NORMALIZE:
            for k in tl.static_range(TOP_K):
                expert = tl.load(ranked_ptr + row * TOP_K + k, mask=in_rows, other=0)
                keep = tl.load(index_ptr + row * TOP_K + k, mask=in_rows, other=-1) >= 0
                grad = tl.load(grad_weight_ptr + row * TOP_K + k, mask=in_rows, other=0.0)
                chosen = tl.sum(tl.where(column[None, :] == expert[:, None], probs, 0.0), axis=1)
                norm += chosen
                mean += tl.where(keep, grad, 0.0) * chosen
            norm = tl.where(in_rows, norm, 1.0)
            mean = mean / norm
        for k in tl.static_range(TOP_K):
            expert = tl.load(ranked_ptr + row * TOP_K + k, mask=in_rows, other=0)
            keep = tl.load(index_ptr + row * TOP_K + k, mask=in_rows, other=-1) >= 0
            grad = tl.where(keep, tl.load(grad_weight_ptr + row * TOP_K + k, mask=in_rows, other=0.0), 0.0)
            if NORMALIZE:
                grad = (grad - mean) / norm
            total += tl.where(column[None, :] == expert[:, None], grad[:, None], 0.0)
    result = total - tl.sum(total * probs, axis=1)[:, None]
    if HAS_SQUARED:
        log_partition = tl.load(log_partition_ptr + row, mask=in_rows, other=0.0)
        result += (2.0 * tl.load(grad_squared_ptr) * log_partition * real)[:, None]
    tl.store(grad_logits_ptr + place, (result * probs).to(grad_logits_ptr.dtype.element_ty), mask=inside)


def tile(num_experts: int) -> tuple[int, int]:
    """BLOCK_T and BLOCK_E for a number of experts."""
    if num_experts > TRITON_EXPERTS:
        raise ValueError(f"Triton's gate takes at most {TRITON_EXPERTS} experts, got {num_experts}; use backend='cpu'")
    block_e = max(2, triton.next_power_of_2(num_experts))
    return max(1, min(128, ELEMENTS // block_e)), block_e


def builds(backward: bool) -> Iterator[dict[str, Any]]:
    """What to compile ahead of time: keyword arguments of `mtmoe.kernels.triton.compile.Build`."""
    pointers = {"probs_ptr": "*fp32", "ranked_ptr": "*i32", "index_ptr": "*i64", "log_partition_ptr": "*fp32"}
    types = pointers | {"real_ptr": "*i1", "tokens": "i32", "num_experts": "i32", "threshold": "fp32"}
    types |= dict.fromkeys(("logits_ptr", "draws_ptr", "weight_ptr", "sums_ptr", "grad_logits_ptr"), "*fp32")
    types |= dict.fromkeys(("grad_weight_ptr", "grad_probability_ptr", "grad_squared_ptr"), "*fp32")
    types |= {"counts_ptr": "*i64"}
    uses: dict[str, Any] = {"HAS_WEIGHT": True, "HAS_PROBS": False, "HAS_PROBABILITY": True, "HAS_SQUARED": True}
    for num_experts in (8, 32, 128, TRITON_EXPERTS):
        block_t, block_e = tile(num_experts)
        constants: dict[str, Any] = {"HAS_REAL": True, "TOP_K": 2, "BLOCK_T": block_t, "BLOCK_E": block_e}
        if backward:
            constants |= {"NORMALIZE": True, "grad_probs_ptr": None, **uses}
            label = f"{num_experts} experts"
            yield {"label": label, "kernel": choose_backward_kernel, "types": types, "constants": constants}
            continue
        for policy, name in enumerate(POLICIES):
            unused = {} if name in ("sampling", "random") else {"draws_ptr": None}
            yield {
                "label": f"{num_experts} experts, {name}",
                "kernel": choose_kernel,
                "types": types,
                "constants": constants | {"POLICY": policy, "NORMALIZE": False, "BLOCK_K": 2, **unused},
            }


class ChooseExperts(Function):
    """See `mtmoe.kernels.gating.choose_experts`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_logits: Tensor,
        top_k: int,
        policy: str,
        threshold: float,
        draws: Tensor | None,
        normalize: bool,
        real: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Launch the forward kernel."""
        if gate_logits.dtype == torch.float64:
            raise ValueError("the Triton gate computes in fp32; use backend='cpu' for fp64")
        gate_logits = gate_logits.contiguous()
        tokens, num_experts = gate_logits.shape
        block_t, block_e = tile(num_experts)
        programs = triton.cdiv(tokens, block_t)
        real = None if real is None else real.contiguous()
        draws = None if draws is None else draws.contiguous()

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=gate_logits.device)

        probs, log_partition, weight = new(tokens, num_experts), new(tokens), new(tokens, top_k)
        index, ranked = new(tokens, top_k, dtype=torch.int64), new(tokens, top_k, dtype=torch.int32)
        counts = torch.zeros(2, num_experts, dtype=torch.int64, device=gate_logits.device)
        sums = new(programs, num_experts + 1)
        if tokens:
            choose_kernel[(programs,)](
                gate_logits, draws, real, probs, index, ranked, weight, log_partition, counts, sums,
                tokens, num_experts, threshold,
                POLICY=POLICIES.index(policy), HAS_REAL=real is not None, NORMALIZE=normalize,
                TOP_K=top_k, BLOCK_K=triton.next_power_of_2(top_k), BLOCK_T=block_t, BLOCK_E=block_e,
            )  # fmt: skip
        total = sums.sum(dim=0)
        ctx.save_for_backward(probs, ranked, index, log_partition, real)
        ctx.normalize, ctx.dtype = normalize, gate_logits.dtype
        per_expert, firsts = counts[0], counts[1]
        ctx.mark_non_differentiable(index, per_expert, firsts)
        ctx.set_materialize_grads(False)
        # Copies: views of one sum cannot have gradients of their own.
        return index, weight, probs, per_expert, firsts, total[:-1].clone(), total[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _index: None,
        grad_weight: Tensor | None,
        grad_probs: Tensor | None,
        _per_expert: None,
        _firsts: None,
        grad_probability: Tensor | None,
        grad_squared: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Launch the backward kernel; it reads only the gradients that exist."""
        probs, ranked, index, log_partition, real = ctx.saved_tensors
        tokens, num_experts = probs.shape
        block_t, block_e = tile(num_experts)
        given = [grad_weight, grad_probs, grad_probability, grad_squared]
        given = [None if grad is None else grad.contiguous() for grad in given]
        grad_logits = torch.empty_like(probs, dtype=ctx.dtype)
        if tokens:
            choose_backward_kernel[(triton.cdiv(tokens, block_t),)](
                probs, ranked, index, log_partition, real, *given, grad_logits, tokens, num_experts,
                HAS_REAL=real is not None, NORMALIZE=ctx.normalize,
                HAS_WEIGHT=given[0] is not None, HAS_PROBS=given[1] is not None,
                HAS_PROBABILITY=given[2] is not None, HAS_SQUARED=given[3] is not None,
                TOP_K=ranked.shape[1], BLOCK_T=block_t, BLOCK_E=block_e,
            )  # fmt: skip
        return grad_logits, None, None, None, None, None, None
