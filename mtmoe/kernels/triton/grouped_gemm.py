"""Products of ragged groups of rows with one matrix for each group: the three GEMMs of grouped_linear.

Legend:
    M: rows of all groups, sorted by expert. N, K: columns of the result, and the dimension that is summed.
    offsets: (experts + 1,) first row of each expert; the last entry ends the last expert.
    BLOCK_*: a tile of that dimension.

`multiply_rows` (forward, and the gradient of the rows) is persistent: as many programs as the device holds at once walk
over the tiles. Only the device knows how many rows an expert got, hence how many tiles there are, so a grid with one
program a tile would need either a host synchronisation or one program for each tile of the worst case. Each program
keeps the running number of tiles of all experts in registers and finds a tile's expert by comparing.

`multiply_columns` (gradient of the weights) sums over a group's rows, so the number of its tiles is known to the host:
one program a tile, and the hardware evens out long and short groups.

All of it reads through pointers with masks, not tensor descriptors: a group ends anywhere inside a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The kernels run on a CPU, in Triton's interpreter; decided when this module is imported."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one tile of a product, and the warps and the loads in flight that work on it."""

    m: int
    """Rows of the result."""
    n: int
    """Columns of the result."""
    k: int
    """Part of the sum that is loaded at once."""
    num_warps: int
    num_stages: int

    def config(self) -> triton.Config:
        """What Triton's autotuner chooses from."""
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return triton.Config(blocks, num_warps=self.num_warps, num_stages=self.num_stages)


WIDE, SQUARE, LOW = Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 8, 3)
TILES = {
    "forward": (WIDE, SQUARE, LOW),
    "forward_saved": (Tile(128, 128, 32, 8, 4), LOW),
    "rows_gradient": (Tile(128, 256, 32, 8, 4), SQUARE, LOW),
    "weight_gradient": (WIDE, SQUARE, LOW),
}
"""Product -> tiles of 16-bit inputs that the autotuner tries on the GPU at hand. Only those that spill nothing on
sm_80, sm_90 and sm_100 (`compile.py` beside this file): 128 x 256 by 64 spilled 4 bytes a thread in the rows' gradient,
and hundreds where gelu meets a kept pre-activation."""
FULL_PRECISION = {torch.float32: Tile(64, 64, 32, 4, 2), torch.float64: Tile(32, 32, 16, 4, 2)}
"""fp32 is multiplied without matrix instructions (no TF32): small tiles, since the operands live in registers."""
INTERPRETER = Tile(16, 16, 16, 4, 1)
"""Small, so that tests with few rows see several tiles."""


@triton.jit
def _dot(a, b, total):
    """``total + a @ b``; fp32 in full precision, not TF32."""
    if INTERPRETED:
        # The interpreter keeps bf16 as 16-bit integers and would multiply those.
        a = a.to(total.dtype)
        b = b.to(total.dtype)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit(do_not_specialize=["rows_per_expert"])
def multiply_rows_kernel(
    x,
    weight,
    bias,
    y,
    saved,
    offsets,
    num_experts,
    N,
    K,
    rows_per_expert,
    stride_expert,
    stride_n,
    stride_k,
    SUM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y[row, n] = activation(sum_k x[row, k] * weight[expert of row, n, k] + bias[expert of row, n])``.

    `saved` gets the sum before the activation; `rows_per_expert` only tells the autotuner one case from another.
    """
    experts = tl.arange(0, BLOCK_EXPERTS)
    inside = experts < num_experts
    rows = tl.load(offsets + experts + 1, mask=inside, other=0) - tl.load(offsets + experts, mask=inside, other=0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    ends = tl.cumsum(tl.cdiv(rows.to(tl.int32), BLOCK_M) * tiles_n, 0)  # tiles up to and with each expert
    for tile in tl.range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        expert = tl.sum((ends <= tile).to(tl.int32), 0)
        place = tile - tl.max(tl.where(ends <= tile, ends, 0), 0)  # in this expert
        start = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        # Neighbours share columns of the weights, the larger operand: each is read from memory about once.
        tiles_m = tl.cdiv((end - start).to(tl.int32), BLOCK_M)
        first = start + (place % tiles_m).to(tl.int64) * BLOCK_M
        left = (end - first).to(tl.int32)  # rows of this expert from here
        m = tl.arange(0, BLOCK_M)
        n = (place // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # One 64-bit pointer moves along K; the tile's offsets from it are 32 bits each and stay: fewer registers.
        x_tile = x + first * K
        x_offset = m[:, None] * K + k[None, :]
        w_tile = weight + expert.to(tl.int64) * stride_expert
        w_offset = k[:, None] * stride_k + n[None, :] * stride_n
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
        for at in tl.range(0, K, BLOCK_K):
            ahead = k < K - at
            a = tl.load(x_tile + x_offset, mask=(m < left)[:, None] & ahead[None, :], other=0.0)
            b = tl.load(w_tile + w_offset, mask=ahead[:, None] & (n < N)[None, :], other=0.0)
            total = _dot(a, b, total)
            x_tile += BLOCK_K
            w_tile += BLOCK_K * stride_k
        if HAS_BIAS:
            total += tl.load(bias + expert * N + n, mask=n < N, other=0.0).to(SUM)[None, :]
        place_out = first * N + (m[:, None] * N + n[None, :])
        written = (m < left)[:, None] & (n < N)[None, :]
        if SAVE:
            tl.store(saved + place_out, total.to(saved.dtype.element_ty), mask=written)
        tl.store(y + place_out, _activate(total, ACTIVATION).to(y.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["rows_per_expert"])
def multiply_columns_kernel(
    left,
    right,
    out,
    offsets,
    M,
    N,
    rows_per_expert,
    SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[expert, m, n] = sum over the expert's rows of left[row, m] * right[row, n]``; here K is the rows."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    expert = tl.program_id(1)
    tile = tl.program_id(0)
    start = tl.load(offsets + expert)
    rows = (tl.load(offsets + expert + 1) - start).to(tl.int32)
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left_tile = left + start * M
    left_offset = m[:, None] + k[None, :] * M
    right_tile = right + start * N
    right_offset = k[:, None] * N + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for at in tl.range(0, rows, BLOCK_K):
        # Both masked: a row of the next expert may hold an infinity, and 0 x inf is NaN.
        ahead = k < rows - at
        a = tl.load(left_tile + left_offset, mask=(m < M)[:, None] & ahead[None, :], other=0.0)
        b = tl.load(right_tile + right_offset, mask=ahead[:, None] & (n < N)[None, :], other=0.0)
        total = _dot(a, b, total)
        left_tile += BLOCK_K * M
        right_tile += BLOCK_K * N
    place_out = expert.to(tl.int64) * M * N + (m[:, None] * N + n[None, :])
    tl.store(out + place_out, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def sum_rows_kernel(x, out, offsets, N, SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``out[expert, n] = sum over the expert's rows of x[row, n]``: the gradient of the bias."""
    expert = tl.program_id(1)
    start = tl.load(offsets + expert)
    rows = (tl.load(offsets + expert + 1) - start).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    tile = x + start * N
    for at in tl.range(0, rows, BLOCK_M):
        inside = (m < rows - at)[:, None] & (n < N)[None, :]
        total += tl.load(tile + m[:, None] * N + n[None, :], mask=inside, other=0.0).to(SUM)
        tile += BLOCK_M * N
    tl.store(out + expert * N + n, tl.sum(total, 0).to(out.dtype.element_ty), mask=n < N)


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """The type that a kernel sums values of `dtype` in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@cache
def _tuned(product: str, dtype: torch.dtype) -> Any:
    """The kernel of a product, which picks its tile for each shape when it first meets it."""
    kernel = multiply_columns_kernel if product == "weight_gradient" else multiply_rows_kernel
    if INTERPRETED.value:
        tiles: tuple[Tile, ...] = (INTERPRETER,)
    else:
        tiles = (FULL_PRECISION[dtype],) if dtype in FULL_PRECISION else TILES[product]
    key = ["M" if product == "weight_gradient" else "K", "N", "rows_per_expert"]
    return triton.autotune([tile.config() for tile in tiles], key=key)(kernel)


@cache
def _multiprocessors(device: torch.device) -> int:
    """How many programs of a full-size tile run at once; under the interpreter few, so that each walks."""
    return 3 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _rows_per_expert(rows: int, num_experts: int) -> int:
    """The mean, rounded up to a power of two, so that not each new batch is tuned for."""
    return int(triton.next_power_of_2(max(1, rows // num_experts)))


def multiply_rows(
    product: str, x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Multiply each group of rows with its matrix, add its bias, and activate.

    Args:
        product: a key of `TILES`.
        x: (rows, d_in), contiguous, grouped by expert.
        offsets: (num_experts + 1,) int64 on the same device.
        weight: (num_experts, d_out, d_in) of any strides, of the type of `x`.
        bias: (num_experts, d_out), contiguous, any float type; None for none.
        activation: relu, gelu, silu or None.
        save: return the result before the activation, too.

    Returns:
        (rows, d_out) and, if saved, as much before the activation. Rows past the last offset are not written.
    """
    rows, d_in = x.shape
    num_experts, d_out, _ = weight.shape
    y = x.new_empty(rows, d_out)
    saved = torch.empty_like(y) if save else None
    if not y.numel():
        return y, saved

    def grid(tile: dict[str, int]) -> tuple[int]:
        most = (triton.cdiv(rows, tile["BLOCK_M"]) + num_experts) * triton.cdiv(d_out, tile["BLOCK_N"])
        at_once = max(1, SQUARE.m * SQUARE.n // (tile["BLOCK_M"] * tile["BLOCK_N"])) if x.is_cuda else 1
        return (min(most, _multiprocessors(x.device) * at_once),)

    _tuned(product, x.dtype)[grid](
        x,
        weight,
        bias,
        y,
        saved,
        offsets,
        num_experts,
        d_out,
        d_in,
        _rows_per_expert(rows, num_experts),
        *weight.stride(),
        SUM=sum_type(x.dtype),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        SAVE=save,
        BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
    )
    return y, saved


def multiply_columns(left: Tensor, right: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the outer products of two matrices' rows, expert by expert; zero for one without rows.

    Args:
        left: (rows, d_left), contiguous, grouped by expert.
        right: (rows, d_right), as `left`.
        offsets: (num_experts + 1,) int64.
        dtype: of the result.

    Returns:
        (num_experts, d_left, d_right).
    """
    (rows, d_left), d_right, num_experts = left.shape, right.shape[1], len(offsets) - 1
    out = torch.empty(num_experts, d_left, d_right, dtype=dtype, device=left.device)

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(d_left, tile["BLOCK_M"]) * triton.cdiv(d_right, tile["BLOCK_N"]), num_experts

    per_expert = _rows_per_expert(rows, num_experts)
    _tuned("weight_gradient", left.dtype)[grid](
        left, right, out, offsets, d_left, d_right, per_expert, SUM=sum_type(left.dtype)
    )
    return out


SUM_TILE = {"BLOCK_M": 128, "BLOCK_N": 32}
"""Narrow, for many programs where most rows belong to one expert: 64 bytes of a row are two sectors of memory."""


def sum_rows(x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each expert: (rows, d) -> (num_experts, d) of type `dtype`."""
    num_experts = len(offsets) - 1
    out = torch.empty(num_experts, x.shape[1], dtype=dtype, device=x.device)
    grid = triton.cdiv(x.shape[1], SUM_TILE["BLOCK_N"]), num_experts
    sum_rows_kernel[grid](x, out, offsets, x.shape[1], SUM=sum_type(x.dtype), **SUM_TILE)
    return out
