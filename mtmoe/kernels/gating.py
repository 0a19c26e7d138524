"""From gate logits to chosen experts in one step: softmax, top-k, policy of the later choices, weights and counts.

Backends: ``reference`` (plain torch, gradients by autograd), ``cpu`` (the same operations without what autograd keeps,
backward by hand; it runs on any device) and ``triton`` (one kernel each way). They agree in values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

POLICIES = ("all", "sampling", "random", "threshold")
"""When a choice after the first is kept."""

TRITON_EXPERTS = 1024
"""The Triton kernel holds a token's experts in registers; beyond this many they do not fit."""

LANES = 16
"""On a CPU, rows of fewer experts than fp32 values fit a vector are handled as columns: softmax of 1000 x 8 takes 8
instead of 145 microseconds, its backward 3 instead of 58 (one core, AVX-512); from 16 experts on both ways are equal,
and at 128 rows are faster."""


@dataclass(frozen=True, slots=True)
class ChoiceCounts:
    """Sums over the real tokens of a batch: what the losses and statistics of routing are made of."""

    tokens_per_expert: Tensor
    """(num_experts,) int64: kept choices of an expert, in any place."""
    first_choice_per_expert: Tensor
    """(num_experts,) int64: tokens whose best choice an expert is."""
    probability_per_expert: Tensor
    """(num_experts,) fp32, with gradient: gate probability summed over tokens."""
    squared_log_partition: Tensor
    """() fp32, with gradient: squared log-sum-exp of a token's logits, summed over tokens."""


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """What `choose_experts` found; padding has chosen nothing."""

    expert_index: Tensor
    """(tokens, top_k) int64, best choice first; -1 where the policy or padding took the choice away."""
    weight: Tensor
    """(tokens, top_k) fp32, with gradient; 0 where a choice was taken away."""
    gate_probs: Tensor
    """(tokens, num_experts) fp32, with gradient; padding too."""
    counts: ChoiceCounts
    """Over real tokens."""


def draw_for_policy(
    gate_logits: Tensor,
    top_k: int,
    policy: str,
    uniform: Callable[[int, torch.dtype], Tensor] | None = None,
) -> Tensor | None:
    """Draw what a policy needs in training.

    Args:
        gate_logits: (tokens, num_experts).
        top_k: choices of a token.
        policy: one of `POLICIES`.
        uniform: gives (tokens, n) multiples of 2^-24 in [0, 1) of a type, for n draws a token; None takes torch's
            global generator.

    Returns:
        (tokens, num_experts) exponential draws for ``sampling``, (tokens, top_k) uniform ones in [0, 1) for ``random``;
        None for the other policies, and for one choice a token, which leaves nothing to decide.
    """
    if top_k == 1 or policy not in ("sampling", "random"):
        return None
    gate_logits = gate_logits.detach()
    dtype = torch.promote_types(gate_logits.dtype, torch.float32)
    if policy == "sampling":
        if uniform is None:
            return torch.empty_like(gate_logits, dtype=dtype).exponential_()
        # Half a step up: the logarithm of 0 is not finite, and that of 1 gives a draw whose own logarithm is not.
        return -(uniform(gate_logits.shape[1], torch.float64) + 2.0**-25).log().to(dtype)
    if uniform is None:
        return torch.rand(len(gate_logits), top_k, dtype=dtype, device=gate_logits.device)
    return uniform(top_k, dtype)


def choose_experts(
    gate_logits: Tensor,
    top_k: int,
    *,
    policy: str = "all",
    threshold: float = 0.0,
    draws: Tensor | None = None,
    normalize: bool = False,
    real: Tensor | None = None,
    backend: str | None = None,
) -> ExpertChoice:
    """Choose the `top_k` experts of each token; the same inputs give the same choice on every backend.

    The share of a choice is its probability over that of all `top_k` choices. ``all`` keeps every choice; ``sampling``
    draws the later ones in proportion to their probabilities; ``random`` keeps a later one with probability 2 x share;
    ``threshold`` keeps it if its share is above `threshold`. The first choice is always kept.

    Args:
        gate_logits: (tokens, num_experts), any float type; gets a gradient. Everything is computed in at least fp32.
        top_k: choices of a token, from 1 to num_experts.
        policy: one of `POLICIES`.
        threshold: of the policy of that name.
        draws: of `draw_for_policy`; None makes ``sampling`` and ``random`` behave like ``all``, as in evaluation.
        normalize: weights are shares, instead of probabilities.
        real: (tokens,) bool, False for padding; None when every token is real.
        backend: ``reference``, ``cpu`` or ``triton``; by default the best for the device.

    Raises:
        ValueError: an argument does not fit the others.

    Sources: Lepikhin et al. 2020 (GShard), algorithm 1; Fedus et al. 2021 (Switch); NLLB Team 2022.
    """
    if gate_logits.dim() != 2 or not 1 <= top_k <= gate_logits.shape[1]:
        raise ValueError(f"gate_logits {tuple(gate_logits.shape)} must be (tokens, num_experts >= top_k={top_k})")
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} must be one of: {', '.join(POLICIES)}")
    if real is not None and real.shape != gate_logits.shape[:1]:
        raise ValueError(f"real {tuple(real.shape)} must have one entry for each of {len(gate_logits)} tokens")
    if top_k == 1 or (draws is None and policy != "threshold"):
        policy, draws = "all", None
    columns = {"sampling": gate_logits.shape[1], "random": top_k}.get(policy, 0)
    if columns and (draws is None or draws.shape != (len(gate_logits), columns)):
        raise ValueError(f"policy={policy!r} needs draws of shape ({len(gate_logits)}, {columns})")
    backend = backend or _best_backend(gate_logits)
    with torch.autocast(gate_logits.device.type, enabled=False):
        if backend == "reference":
            return _choose_by_autograd(gate_logits, top_k, policy, threshold, draws, normalize, real)
        if backend == "cpu":
            function: type[Function] = _ChooseExperts
        elif backend == "triton":
            from mtmoe.kernels.triton.gating import ChooseExperts as function
        else:
            raise ValueError(f"backend={backend!r} is unknown; choose one of: cpu, reference, triton")
        index, weight, probs, per_expert, firsts, probability, squared = function.apply(
            gate_logits, top_k, policy, threshold, draws, normalize, real
        )
    return ExpertChoice(index, weight, probs, ChoiceCounts(per_expert, firsts, probability, squared))


def by_columns(device: torch.device, num_experts: int) -> bool:
    """Whether (tokens, num_experts) is better kept with the tokens next to each other in memory."""
    return device.type == "cpu" and num_experts < LANES


def _best_backend(gate_logits: Tensor) -> str:
    fits = gate_logits.dtype != torch.float64 and gate_logits.shape[1] <= TRITON_EXPERTS
    return "triton" if gate_logits.is_cuda and fits and find_spec("triton") is not None else "cpu"


def _rank(gate_logits: Tensor, top_k: int, policy: str, draws: Tensor | None) -> Tensor:
    """(tokens, top_k) int64: the experts before anything is taken away."""
    if policy != "sampling":
        return gate_logits.topk(top_k, dim=-1).indices
    assert draws is not None
    # Adding Gumbel noise and taking the best draws in proportion to the probabilities without the first expert's.
    first = gate_logits.argmax(dim=-1, keepdim=True)
    noisy = (gate_logits - draws.log()).scatter(1, first, -torch.inf)
    return torch.cat([first, noisy.topk(top_k - 1, dim=-1).indices], dim=1)


def _taken_away(
    share: Tensor | None, policy: str, threshold: float, draws: Tensor | None, real: Tensor | None
) -> Tensor | None:
    """(tokens, top_k) or (tokens, 1) bool of the choices that the policy or padding takes away; None: there are none.

    `share` is needed only by the policies ``random`` and ``threshold``.
    """
    taken = None
    if policy in ("random", "threshold"):
        assert share is not None
        taken = share <= threshold if draws is None else 2 * share <= draws
        taken[:, 0] = False
    if real is not None:
        padding = ~real[:, None]
        taken = padding if taken is None else taken | padding
    return taken


def count_choices(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Kept choices and first choices of each expert; -1 falls into a bin of its own, which is cut off."""
    shifted = expert_index + 1
    firsts = torch.bincount(shifted[:, 0], minlength=num_experts + 1)[1:]
    if expert_index.shape[1] == 1:
        return firsts, firsts
    return torch.bincount(shifted.flatten(), minlength=num_experts + 1)[1:], firsts


def _choose_by_autograd(
    gate_logits: Tensor,
    top_k: int,
    policy: str,
    threshold: float,
    draws: Tensor | None,
    normalize: bool,
    real: Tensor | None,
) -> ExpertChoice:
    """The plain implementation."""
    gate_logits = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    gate_probs = gate_logits.softmax(dim=-1)
    expert_index = _rank(gate_logits.detach(), top_k, policy, draws)
    probs = gate_probs.gather(1, expert_index)
    share = probs / probs.sum(dim=-1, keepdim=True)
    weight = share if normalize else probs
    taken = _taken_away(share.detach(), policy, threshold, draws, real)
    if taken is not None:
        expert_index, weight = expert_index.masked_fill(taken, -1), weight.masked_fill(taken, 0)
    counted = slice(None) if real is None else real
    counts = ChoiceCounts(
        *count_choices(expert_index, gate_probs.shape[1]),
        gate_probs[counted].sum(dim=0),
        gate_logits[counted].logsumexp(dim=-1).square().sum(),
    )
    return ExpertChoice(expert_index, weight, gate_probs, counts)


class _ChooseExperts(Function):
    # A layer of a small model spends as long on a gate's many tiny operations as on an expert's GEMM: 250 operations
    # forward and backward with autograd for 1000 tokens. Here each direction does what its formula says.
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
        ctx.dtype = gate_logits.dtype
        gate_logits = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
        if by_columns(gate_logits.device, gate_logits.shape[1]):
            gate_probs = gate_logits.t().contiguous().softmax(dim=0).t()
        else:
            gate_probs = gate_logits.softmax(dim=-1)
        ranked = _rank(gate_logits, top_k, policy, draws)
        probs = gate_probs.gather(1, ranked)
        share = probs / probs.sum(dim=-1, keepdim=True) if normalize or policy in ("random", "threshold") else None
        weight = probs
        if normalize:
            assert share is not None
            weight = share
        taken = _taken_away(share, policy, threshold, draws, real)
        expert_index = ranked
        if taken is not None:
            expert_index, weight = ranked.masked_fill(taken, -1), weight.masked_fill(taken, 0)
        # The first choice has the largest probability, at least 1 / num_experts: its logarithm is exact enough.
        log_partition = gate_logits.gather(1, ranked[:, :1]).squeeze(1) - probs[:, 0].log()
        mask = None if real is None else real.to(gate_probs.dtype)
        if mask is None:
            probability, squared = gate_probs.sum(dim=0), torch.dot(log_partition, log_partition)
        else:
            probability, squared = mask @ gate_probs, torch.dot(mask * log_partition, log_partition)
        tokens_per_expert, firsts = count_choices(expert_index, gate_probs.shape[1])
        ctx.normalize = normalize
        # `probs` is both an intermediate and, where nothing is taken away, an output: saved tensors may be either.
        ctx.save_for_backward(gate_probs, ranked, probs, taken, log_partition, mask)
        ctx.mark_non_differentiable(expert_index, tokens_per_expert, firsts)
        ctx.set_materialize_grads(False)
        return expert_index, weight, gate_probs, tokens_per_expert, firsts, probability, squared

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
        gate_probs, ranked, probs, taken, log_partition, mask = ctx.saved_tensors
        # `total` becomes the gradient of `gate_probs`, a sum over its uses, in its memory format.
        total = torch.zeros_like(gate_probs) if grad_probability is None else torch.empty_like(gate_probs)
        if grad_probability is not None and mask is None:
            total.copy_(grad_probability.expand_as(total))
        elif grad_probability is not None:
            torch.mul(mask[:, None], grad_probability, out=total)
        if grad_probs is not None:
            total.add_(grad_probs)
        if grad_weight is not None:
            if taken is not None:
                grad_weight = grad_weight.masked_fill(taken, 0)
            if ctx.normalize:
                norm = probs.sum(dim=-1, keepdim=True)
                grad_weight = (grad_weight - (grad_weight * probs).sum(dim=-1, keepdim=True) / norm) / norm
            total.scatter_add_(1, ranked, grad_weight)
        if by_columns(gate_probs.device, gate_probs.shape[1]):
            grad = torch._softmax_backward_data(total.t(), gate_probs.t(), 0, gate_probs.dtype).t()
        else:
            grad = torch._softmax_backward_data(total, gate_probs, 1, gate_probs.dtype)
        if grad_squared is not None:
            scale = 2 * grad_squared * (log_partition if mask is None else log_partition * mask)
            grad.addcmul_(gate_probs, scale[:, None])
        return grad.to(ctx.dtype), None, None, None, None, None, None
