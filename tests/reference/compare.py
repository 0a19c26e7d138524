"""Comparison within a tolerance that follows from the number type, and of whole backward passes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PLAIN_UNITS = {torch.float64: 1e4, torch.float32: 500.0, torch.bfloat16: 4.0}
"""Rounding units that a short chain of sums and products may lose; a bf16 chain is short of units to begin with."""


def assert_close(
    actual: Tensor,
    expected: Tensor | float,
    dtype: torch.dtype,
    name: str = "",
    units: float | None = None,
    scale: float = 0.0,
) -> None:
    """Compare with rounding units of `dtype`, relative to the largest expected value, or to `scale` if that is larger.

    Elementwise relative bounds would fail where large terms cancel, which says nothing about the code.
    """
    if isinstance(expected, float):
        expected = torch.tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    scale = max(expected.abs().max().item(), scale, 1e-3)
    allowed = torch.finfo(dtype).eps * (units or PLAIN_UNITS[dtype]) * scale
    error = (actual - expected).abs().max().item()
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed are {allowed:.3g}"


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype, units: float | None = None
) -> None:
    """Compare tensors by name.

    In bf16 a gate's gradient may be the small difference of large products, whose rounding is left over: a tenth of the
    largest value is the least that errors are measured against.
    """
    assert actual.keys() == expected.keys()
    largest = max((value.abs().max().item() for value in expected.values() if value.numel()), default=0.0)
    scale = largest / 10 if dtype == torch.bfloat16 else 0.0
    for name, value in expected.items():
        assert_close(actual[name], value, dtype, name, units, scale)


def gradients(total: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name; zero for what `total` does not depend on."""
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), found, strict=True)
    }
