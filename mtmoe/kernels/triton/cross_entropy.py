"""Label-smoothed cross entropy over a large vocabulary: the gradient is written over the logits, no fp32 copy is made.

A program handles one token: a first pass over its logits, BLOCK_V at once, keeps the running maximum, the sum of
exponentials and the sum of logits in fp32; the second reads the logits again, mostly from the L2 cache (256k words in
bf16 are 512 KiB), and writes the gradient in their place. Memory traffic is that of one read and one write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 8192
"""Largest block of the vocabulary: 16 fp32 values a thread of 16 warps (no spills on sm_80, sm_90 and sm_100)."""


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, mask_ptr, grad_ptr,  # (tokens, vocabulary), (tokens,) twice, (tokens, vocabulary)
    nll_ptr, smooth_ptr,  # (tokens,) fp32
    logits_stride, grad_stride, vocabulary, on_target, eps_i,
    HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Negative log likelihood and its sum over the vocabulary for one token, then the gradient of its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    grad_ptr += row * grad_stride
    column = tl.arange(0, BLOCK_V)
    counts = True
    if HAS_MASK:
        counts = tl.load(mask_ptr + row) != 0
    if counts:
        target = tl.load(target_ptr + row)
        target_logit = tl.load(logits_ptr + target).to(tl.float32)
        best, norm, total = -float("inf"), 0.0, 0.0
        for start in range(0, vocabulary, BLOCK_V):
            inside = start + column < vocabulary
            block = tl.load(logits_ptr + start + column, mask=inside, other=-float("inf")).to(tl.float32)
            new_best = tl.maximum(best, tl.max(block, axis=0))
            # Nothing but -inf so far: any finite number keeps the differences from being NaN.
            pivot = tl.where(new_best == -float("inf"), 0.0, new_best)
            norm = norm * tl.exp(best - pivot) + tl.sum(tl.exp(block - pivot), axis=0)
            total += tl.sum(tl.where(inside, block, 0.0), axis=0)
            best = new_best
        log_partition = best + tl.log(norm)
        tl.store(nll_ptr + row, log_partition - target_logit)
        tl.store(smooth_ptr + row, vocabulary * log_partition - total)
        if HAS_GRAD:
            # The target's logit must have been read by every thread before one of them writes over it.
            tl.debug_barrier()
            for start in range(0, vocabulary, BLOCK_V):
                inside = start + column < vocabulary
                block = tl.load(logits_ptr + start + column, mask=inside, other=-float("inf")).to(tl.float32)
                grad = tl.exp(block - log_partition) - eps_i
                grad = tl.where(start + column == target, grad - on_target, grad)
                tl.store(grad_ptr + start + column, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(nll_ptr + row, 0.0)
        tl.store(smooth_ptr + row, 0.0)
        if HAS_GRAD:
            for start in range(0, vocabulary, BLOCK_V):
                zeros = tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + start + column, zeros, mask=start + column < vocabulary)


def tile(vocabulary: int) -> tuple[int, int]:
    """BLOCK_V and warps for a vocabulary."""
    block_v = min(BLOCK_V, max(128, triton.next_power_of_2(vocabulary)))
    return block_v, max(1, block_v // 512)


def builds() -> Iterator[dict[str, Any]]:
    """What to compile ahead of time: keyword arguments of `mtmoe.kernels.triton.compile.Build`."""
    types = {"target_ptr": "*i64", "mask_ptr": "*i1", "nll_ptr": "*fp32", "smooth_ptr": "*fp32"}
    types |= dict.fromkeys(("logits_stride", "grad_stride", "vocabulary"), "i32")
    types |= {"on_target": "fp32", "eps_i": "fp32"}
    block_v, num_warps = tile(256_000)
    for dtype in ("bf16", "fp16", "fp32"):
        yield {
            "label": f"256k words, {dtype}",
            "kernel": cross_entropy_kernel,
            "types": types | {"logits_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}"},
            "constants": {"HAS_MASK": True, "HAS_GRAD": True, "BLOCK_V": block_v},
            "num_warps": num_warps,
        }


def loss_and_gradient(
    logits: Tensor, target: Tensor, mask: Tensor | None, label_smoothing: float, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss of a block of tokens, ``sum of (1 - eps - eps_i) * nll + eps_i * sum_v nll_v``, eps_i = eps / (V - 1).

    Args:
        logits: (tokens, vocabulary) bf16, fp16 or fp32, each row contiguous.
        target: (tokens,) int64 in [0, vocabulary); anything where `mask` is false.
        mask: (tokens,) bool, False where a token does not count; None when all do.
        label_smoothing: eps, in [0, 1).
        grad: receives the gradient of the loss; may be `logits` itself, may be None.

    Returns:
        () fp32 loss, (tokens,) fp32 negative log likelihood in nats, 0 where `mask` is false.
    """
    tokens, vocabulary = logits.shape
    eps_i = label_smoothing / (vocabulary - 1) if label_smoothing else 0.0
    on_target = 1.0 - label_smoothing - eps_i
    nll = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    smooth = torch.empty_like(nll)
    out = logits if grad is None else grad
    if logits.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the Triton cross entropy needs rows that are contiguous; call .contiguous() on the logits")
    if tokens:
        block_v, num_warps = tile(vocabulary)
        cross_entropy_kernel[(tokens,)](
            logits, target.contiguous(), None if mask is None else mask.contiguous(), out, nll, smooth,
            logits.stride(0), out.stride(0), vocabulary, on_target, eps_i,
            HAS_MASK=mask is not None, HAS_GRAD=grad is not None, BLOCK_V=block_v, num_warps=num_warps,
        )  # fmt: skip
    loss = on_target * nll.sum()
    return (loss + eps_i * smooth.sum() if eps_i else loss), nll
