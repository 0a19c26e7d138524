"""What is measured: shapes and number types, and the least work that each of them takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

DTYPES = ("fp32", "bf16", "autocast")
"""fp32; bf16 weights and activations; bf16 autocast over fp32 weights."""

PASSES = ("forward", "forward_backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape in one number type; experts are `d_model` -> `d_ffn` -> `d_model` with ReLU and biases."""

    num_experts: int
    tokens: int = 2048
    d_model: int = 512
    d_ffn: int = 2048
    top_k: int = 2
    dtype: str = "fp32"
    """One of `DTYPES`."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of: {', '.join(DTYPES)}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")

    def __str__(self) -> str:
        return (
            f"{self.dtype}, {self.num_experts} experts, {self.tokens} tokens, {self.d_model} x {self.d_ffn}, "
            f"top-{self.top_k}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type that weights, their gradients and the layer's input are stored in."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type that matrices are multiplied in."""
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16

    @property
    def autocast(self) -> bool:
        """Whether the layer runs under bf16 autocast."""
        return self.dtype == "autocast"

    def flops(self, which: str) -> float:
        """Floating point operations of the experts' products in a pass; the backward pass has twice the forward's."""
        forward = 2 * 2 * self.tokens * self.top_k * self.d_model * self.d_ffn
        return float(forward * (3 if which == "forward_backward" else 1))

    def bytes_moved(self, which: str, touched: int) -> float:
        """Bytes that must cross the memory bus when nothing stays in the cache between the steps.

        Forward: the matrices of the experts that have tokens, the input and the output. Backward: those matrices
        again, their gradients, the input again, the hidden activations written in forward and read here, and the
        gradients of output and input. Biases, gate and routing are left out.

        Args:
            which: one of `PASSES`.
            touched: experts that have tokens.
        """
        stored, computed = self.weight_dtype.itemsize, self.compute_dtype.itemsize
        weights = touched * 2 * self.d_model * self.d_ffn * stored
        activations = self.tokens * self.d_model * stored
        if which == "forward":
            return float(weights + 2 * activations)
        hidden = self.tokens * self.top_k * self.d_ffn * computed
        return float(3 * weights + 5 * activations + 2 * hidden)

    def weight_bytes(self) -> int:
        """Bytes of all experts' matrices."""
        return self.num_experts * 2 * self.d_model * self.d_ffn * self.weight_dtype.itemsize


HEADLINE = tuple(Case(num_experts=experts, dtype=dtype) for dtype in DTYPES for experts in (8, 32, 128))
"""The shapes of the goals: d_model 512, 2,048 tokens, top-2."""

CURVE = tuple(Case(num_experts=experts, dtype="bf16") for experts in (4, 8, 16, 32, 64, 128, 256))
"""Cost against the number of experts, at the same tokens and FLOPs."""

SMOKE = tuple(
    Case(num_experts=4, tokens=128, d_model=64, d_ffn=256, top_k=top_k, dtype=dtype)
    for dtype in DTYPES
    for top_k in (1, 2)
)
"""Seconds for all of it; says that everything works, and nothing about speed."""


def full_grid() -> Iterator[Case]:
    """Every combination that the benchmark knows, the small ones first."""
    for d_model, tokens, experts, dtype, top_k in product(
        (256, 512, 1024), (256, 2048, 8192), (8, 32, 128), DTYPES, (1, 2)
    ):
        yield Case(
            num_experts=experts, tokens=tokens, d_model=d_model, d_ffn=4 * d_model, top_k=top_k, dtype=dtype
        )
