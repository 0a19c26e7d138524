"""Random MoE layers with inputs, the odd ones included, and both ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.clusters import surviving_experts
from reference import moe as reference
from reference.compare import gradients

PADDINGS = ("none", "random", "right", "all")
CROWDS = ("spread", "one_expert", "two_groups")
LOSS_WEIGHTS = {
    "load_balance": 0.7, "node_balance": 0.5, "inner_balance": 0.8, "router_z": 0.3, "cluster_variance": 1.1,
}  # fmt: skip
"""Of each loss in the sum whose gradient is taken; all differ, so that none passes for another."""


@dataclass
class Case:
    """A layer, its input, and a direction in which to take the gradient of the output."""

    config: MoEConfig
    layer: MoELayer
    x: Tensor
    padding: Tensor
    direction: Tensor
    seed: int
    survivors: Tensor | None = None

    def __repr__(self) -> str:
        return f"Case({self.config}, tokens={len(self.x)}, padding={self.padding.tolist()}, seed={self.seed})"


def make_case(config: MoEConfig, tokens: int, padding: str = "none", crowd: str = "spread", seed: int = 0) -> Case:
    """Draw weights and input in fp64, rounded to bf16 so that every type sees the same values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).double()

    layer = MoELayer(config).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
            scale = 2.0 if name == "gate.weight" else 1.0
            parameter.copy_((draw(*parameter.shape) * scale / fan_in**0.5).to(torch.bfloat16).double())
    x = draw(tokens, config.d_model)
    if tokens and crowd != "spread":
        groups = 1 if crowd == "one_expert" else 2
        centres = x[torch.arange(tokens) % min(groups, tokens)]
        x = (centres + 0.02 * draw(tokens, config.d_model)).to(torch.bfloat16).double()
    if padding == "all":
        mask = torch.ones(tokens, dtype=torch.bool)
    elif padding == "random":
        mask = torch.rand(tokens, generator=generator) < 0.4
    elif padding == "right":
        mask = torch.arange(tokens) >= (2 * tokens + 2) // 3
    else:
        mask = torch.zeros(tokens, dtype=torch.bool)
    survivors = surviving_experts(config, seed, update=0, layer=0)
    return Case(config, layer, x, mask, draw(tokens, config.d_model), seed, survivors)


@st.composite
def configs(draw: Callable, policies: tuple[str, ...] = ("all", "threshold"), cmr: bool | None = None) -> MoEConfig:
    """A config without dropout and masking."""
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 7]))
    top_k = draw(st.integers(1, min(3, num_experts)))
    factors = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.3])
    return MoEConfig(
        d_model=draw(st.sampled_from([1, 4, 6, 9])),
        d_ffn=draw(st.sampled_from([1, 5, 12])),
        num_experts=num_experts,
        top_k=top_k,
        activation=draw(st.sampled_from(["relu", "gelu", "silu"])),
        second_expert_policy=draw(st.sampled_from(policies)),
        second_expert_threshold=draw(st.sampled_from([0.0, 0.2, 0.35])),
        normalize_weights="none" if top_k == 1 else draw(st.sampled_from(["after_drop", "before_drop", "none"])),
        batch_prioritized=draw(st.booleans()),
        capacity_factor=draw(factors),
        eval_capacity_factor=draw(factors),
        eval_capacity_token_fraction=draw(st.sampled_from([0.0, 0.0, 0.2, 1.0])),
        cmr=draw(st.booleans()) if cmr is None else cmr,
        cmr_d_ffn=draw(st.sampled_from([0, 3])),
        load_balance_include_padding=draw(st.booleans()),
    )


@st.composite
def clustered(draw: Callable, config: MoEConfig) -> MoEConfig:
    """The same config with clusters of experts, maybe with MoEC's gate, maybe without some of the experts."""
    clusters, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4]))
    rates = [rate for rate in (0.34, 0.5, 1.0) if size > 1 and int(rate * size)]
    rate = draw(st.sampled_from([0.0, *rates]))
    survivors = max(1, size - int(rate * size))
    top_k = min(config.top_k, clusters * survivors)
    return replace(
        config,
        gate=draw(st.sampled_from(["topk", "moec"])) if top_k == 1 else "topk",
        top_k=top_k,
        normalize_weights="none" if top_k == 1 else config.normalize_weights,
        num_experts=clusters * size,
        cosine_gate_dim=draw(st.sampled_from([2, 5])),
        expert_clusters=clusters,
        cluster_variance_type=draw(st.sampled_from([0, 1, 2] if clusters > 1 else [0, 1])),
        cluster_variance_scale=draw(st.sampled_from(["mean", "sum"])),
        cluster_expert_dropout=rate,
    )


@st.composite
def bilevel(draw: Callable, config: MoEConfig) -> MoEConfig:
    """The same config with SMILE's gate."""
    nodes, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4]))
    return replace(
        config, gate="bilevel", expert_nodes=nodes, num_experts=nodes * size, top_k=min(config.top_k, size),
        normalize_weights="none",
    )  # fmt: skip


@st.composite
def cases(
    draw: Callable,
    policies: tuple[str, ...] = ("all", "threshold"),
    cmr: bool | None = None,
    max_tokens: int = 21,
    clusters: bool = False,
    nodes: bool = False,
) -> Case:
    """A layer with input whose routing does not hang on rounding; `clusters` adds MoEC's options, `nodes` SMILE's."""
    config = draw(configs(policies, cmr))
    if nodes:
        config = draw(bilevel(config))
    if clusters:
        config = draw(clustered(config))
    case = make_case(
        config,
        tokens=draw(st.one_of(st.sampled_from([0, 1, 2]), st.integers(3, max_tokens))),
        padding=draw(st.sampled_from(PADDINGS)),
        crowd=draw(st.sampled_from(CROWDS)),
        seed=draw(st.integers(0, 10**6)),
    )
    assume(clear_cut(case))
    return case


def clear_cut(case: Case, gap: float = 2e-5) -> bool:
    """No two values that routing compares are closer than fp32 can tell apart."""
    config = case.config
    with torch.no_grad():
        logits = case.layer.eval().gate.logits(case.x)
    levels = [logits]
    if config.gate == "bilevel":
        levels = list(logits.split([config.expert_nodes, config.node_experts], dim=1))
    clear = all(bool((level.sort(dim=-1).values.diff(dim=-1) > gap).all()) for level in levels)
    if config.batch_prioritized:
        best = torch.stack([level.softmax(dim=-1).amax(dim=-1) for level in levels]).prod(dim=0)
        clear &= bool((best.sort().values.diff() > gap).all())
    if config.second_expert_policy == "threshold":
        top = levels[-1].softmax(dim=-1).topk(config.top_k, dim=-1).values
        share = top / top.sum(dim=-1, keepdim=True)
        clear &= bool(((share - config.second_expert_threshold).abs() > gap).all())
    return clear


def value_and_gradients(
    y: Tensor, losses: dict[str, Tensor], gate_sum: Tensor | None, direction: Tensor, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Output, losses and the gradients of a mixture of all of them, by name."""
    total = (y.double() * direction).sum()
    for name, loss in losses.items():
        total = total + LOSS_WEIGHTS[name] * loss.double()
    found = {"y": y, **losses}
    if gate_sum is not None:
        total = total + 0.9 * gate_sum.double()
        found["cmr_gate_sum"] = gate_sum
    return found | {f"d {name}": grad for name, grad in gradients(total, inputs).items()}


def run_layer(case: Case, dtype: torch.dtype, training: bool, autocast: bool = False) -> dict[str, Tensor]:
    """The layer under test, its weights and input in `dtype`, or in fp32 under bf16 autocast."""
    layer = MoELayer(case.config).to(dtype).train(training)
    layer.load_state_dict(case.layer.state_dict())
    x = case.x.to(dtype).requires_grad_()
    mask = case.padding if case.padding.any() else None
    torch.manual_seed(case.seed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = layer(x, mask, case.survivors)
        inputs = {"x": x, **dict(layer.named_parameters())}
        return value_and_gradients(output.y, output.losses, output.statistics.cmr_gate_sum, case.direction, inputs)


def run_reference(case: Case, training: bool, combine: str = "loop") -> dict[str, Tensor]:
    """The slow layer in fp64; where a policy draws, with the choices that the layer drew."""
    chosen = None
    if case.config.second_expert_policy in ("sampling", "random"):
        torch.manual_seed(case.seed)
        survivors = case.survivors if training else None
        decision = case.layer.train(training).gate(case.x, ~case.padding, survivors)
        chosen = [[None if number < 0 else number for number in row] for row in decision.expert_index.tolist()]
    x = case.x.clone().requires_grad_()
    parameters = {name: value.detach().clone().requires_grad_() for name, value in case.layer.named_parameters()}
    survivors = case.survivors.tolist() if training and case.survivors is not None else None
    result = reference.moe_layer(
        parameters, x, case.padding.tolist(), case.config, training, chosen, combine, survivors
    )
    return value_and_gradients(
        result.y, result.losses, result.statistics.get("cmr_gate_sum"), case.direction, {"x": x, **parameters}
    )
