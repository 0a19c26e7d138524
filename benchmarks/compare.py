"""Is a peer's result the right one? Asked before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers import Built, Weights, experts_loop, leaf

TOLERANCE = {
    "output": {torch.float32: 1e-4, torch.bfloat16: 2e-2},
    "gradient": {torch.float32: 1e-4, torch.bfloat16: 0.12},
}
"""Largest error of a row, as a share of the expected row's length: some 1,000 rounding units of fp32 and 5 of bf16. Two
experts exchanged, or a weight missing, are off by 0.3 and more. A peer that rounds a product to bf16 before it adds
the bias moves one hidden unit in 500 across ReLU's corner: 6 % of a gradient's length, and not an error of the peer."""

ROWS_OFF = {torch.float32: 0.002, torch.bfloat16: 0.02}
"""Share of tokens that may be off: where two experts' logits are equal to within rounding, peers choose differently."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a result is from the expected one."""

    rows_off: float
    """Share of rows that are further off than the tolerance."""
    error: float
    """Median over the rows of the error's length over the expected row's."""
    ok: bool
    """Whether few enough rows are off."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a right peer returns, in fp32: output and gradient of the input, (tokens, d_model) each."""

    y: Tensor
    grad: Tensor


def compare(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "output") -> Comparison:
    """Compare row by row.

    Args:
        actual: (tokens, d_model), any float type.
        expected: (tokens, d_model) fp32.
        dtype: the type that `actual` was computed in, which sets the tolerance.
        what: ``output`` or ``gradient``.
    """
    if actual.shape != expected.shape:
        return Comparison(1.0, float("inf"), False)
    lengths = expected.norm(dim=1)
    # A row of zeros has no scale of its own.
    scale = lengths.clamp(min=1e-3 * lengths.max().item() + 1e-12)
    errors = ((actual.float() - expected).norm(dim=1) / scale).nan_to_num(nan=float("inf"))
    rows_off = (errors > TOLERANCE[what][dtype]).float().mean().item()
    return Comparison(rows_off, errors.median().item(), rows_off <= ROWS_OFF[dtype])


def direction(case: Case) -> Tensor:
    """(tokens, d_model) fp32, the gradient that backward starts from: random, so that no error cancels."""
    generator = torch.Generator(case.device).manual_seed(7)
    return torch.randn(case.tokens, case.d_model, generator=generator, device=case.device)


def expected_results(case: Case, weights: Weights, x: Tensor) -> dict[str, Expected]:
    """What to expect of ``moe`` and ``dense`` peers, in fp32 arithmetic on the numbers that they multiply."""
    wide = Weights(*(getattr(weights, name).float() for name in Weights.__dataclass_fields__))
    first = Weights(*(getattr(wide, name)[:1] for name in Weights.__dataclass_fields__))
    results = {}
    for name, those, top_k in (("moe", wide, case.top_k), ("dense", first, 1)):
        rows = leaf(x.float())
        y = experts_loop(rows, those, top_k, case.compute_dtype)
        (grad,) = torch.autograd.grad((y * direction(case)).sum(), rows)
        results[name] = Expected(y.detach(), grad)
    return results


def check(built: Built, case: Case, x: Tensor, expected: dict[str, Expected]) -> dict[str, Comparison]:
    """Run a peer forward and backward, and compare its output and its gradient of the input."""
    right = expected[built.reference]
    rows = leaf(x)
    with torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
        y = built.call(rows)
    y.backward(direction(case).to(y.dtype))
    for parameter in built.parameters:
        parameter.grad = None
    assert rows.grad is not None
    return {
        "output": compare(y.detach(), right.y, case.compute_dtype),
        "gradient": compare(rows.grad, right.grad, case.compute_dtype, "gradient"),
    }
