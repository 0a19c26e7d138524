"""The systems that are compared, each built from the same weights.

A peer is a function from (case, weights) to a `Built`: what to call, and the tensors that get gradients. It imports
what it needs itself and raises `Unavailable` where it cannot run, so that one missing package leaves the others
working. Where a peer keeps a parameter for each expert, that parameter is a view of the stacked weights: the weights
exist once, however many peers there are.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import Case
from mtmoe.moe import MoEConfig, MoELayer


class Unavailable(Exception):
    """A peer cannot run a case here; the text says why."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Gate and experts of one case."""

    gate: Tensor
    """(num_experts, d_model)"""
    w_in: Tensor
    """(num_experts, d_ffn, d_model)"""
    b_in: Tensor
    """(num_experts, d_ffn)"""
    w_out: Tensor
    """(num_experts, d_model, d_ffn)"""
    b_out: Tensor
    """(num_experts, d_model)"""


@dataclass(frozen=True, slots=True)
class Built:
    """A peer that is ready to run."""

    call: Callable[[Tensor], Tensor]
    """(tokens, d_model) -> (tokens, d_model)"""
    parameters: tuple[Tensor, ...]
    """What backward writes gradients to."""
    reference: str = "moe"
    """What its output must be: ``moe``, the experts' weighted sum; or ``dense``, the first expert's network."""
    timed: Callable[[Tensor], Tensor] | None = None
    """Called instead where time is taken, if a peer's default drops tokens and so cannot be compared."""


def make_weights(case: Case, seed: int = 1, zero_biases: bool = False) -> tuple[Weights, Tensor]:
    """Random weights, drawn as torch's Linear draws its own, and an input.

    Args:
        case: shapes and types.
        seed: of the draws.
        zero_biases: for peers whose experts have no biases.

    Returns:
        The weights; and (tokens, d_model), standard normal.
    """
    generator = torch.Generator(case.device).manual_seed(seed)

    def uniform(*shape: int, fan_in: int) -> Tensor:
        drawn = torch.empty(shape, dtype=case.weight_dtype, device=case.device)
        return drawn.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)

    experts, d_model, d_ffn = case.num_experts, case.d_model, case.d_ffn
    weights = Weights(
        gate=uniform(experts, d_model, fan_in=d_model),
        w_in=uniform(experts, d_ffn, d_model, fan_in=d_model),
        b_in=uniform(experts, d_ffn, fan_in=d_model),
        w_out=uniform(experts, d_model, d_ffn, fan_in=d_ffn),
        b_out=uniform(experts, d_model, fan_in=d_ffn),
    )
    if zero_biases:
        weights.b_in.zero_()
        weights.b_out.zero_()
    x = torch.randn(case.tokens, d_model, generator=generator, device=case.device).to(case.weight_dtype)
    return weights, x


def experts_loop(x: Tensor, weights: Weights, top_k: int, rounded: torch.dtype | None = None) -> Tensor:
    """What every MoE peer must compute: a loop over experts, in the type of its inputs.

    The weights of a token are its experts' probabilities, divided by their sum for `top_k` > 1 (GShard, NLLB) and as
    they are for 1 (Switch).

    Args:
        x: (tokens, d_model).
        weights: of the same type.
        top_k: experts a token.
        rounded: the experts' inputs and matrices are rounded to this type first, as autocast does: a rounded weight
            moves hidden units across ReLU's corner, which would look like an error of the gradient.

    Returns:
        (tokens, d_model).
    """

    def seen(tensor: Tensor) -> Tensor:
        return tensor if rounded is None else tensor.to(rounded).to(tensor.dtype)

    probs = (x @ weights.gate.T).softmax(dim=-1)  # (tokens, num_experts)
    weight, expert_index = probs.topk(top_k, dim=-1)
    if top_k > 1:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    y, rows = torch.zeros_like(x), seen(x)
    for expert in range(len(weights.gate)):
        token, choice = (expert_index == expert).nonzero(as_tuple=True)
        hidden = F.relu(F.linear(rows[token], seen(weights.w_in[expert]), seen(weights.b_in[expert])))
        result = F.linear(hidden, seen(weights.w_out[expert]), seen(weights.b_out[expert]))
        y = y.index_add(0, token, weight[token, choice, None] * result)
    return y


def touched_experts(x: Tensor, weights: Weights, top_k: int) -> int:
    """Experts that have at least one token."""
    logits = x.float() @ weights.gate.float().T
    return len(logits.topk(top_k, dim=-1).indices.unique())


def ours(case: Case, weights: Weights) -> Built:
    """`mtmoe.moe.MoELayer`, dropless."""
    config = MoEConfig(
        d_model=case.d_model,
        d_ffn=case.d_ffn,
        num_experts=case.num_experts,
        top_k=case.top_k,
        normalize_weights="after_drop" if case.top_k > 1 else "none",
    )
    with torch.device("meta"):
        layer = MoELayer(config).to(case.weight_dtype)
    state = {"gate.weight": weights.gate} | {
        f"experts.{name}": getattr(weights, name) for name in ("w_in", "b_in", "w_out", "b_out")
    }
    layer.load_state_dict(state, assign=True)
    return Built(lambda x: layer(x).y, tuple(_trainable(layer)))


def dense(case: Case, weights: Weights) -> Built:
    """The first expert's network applied `top_k` times: the same FLOPs, no routing. Not the same function."""
    tensors = [leaf(each[0]) for each in (weights.w_in, weights.b_in, weights.w_out, weights.b_out)]
    w_in, b_in, w_out, b_out = tensors

    def call(x: Tensor) -> Tensor:
        repeated = x.repeat(case.top_k, 1) if case.top_k > 1 else x
        y = F.linear(F.relu(F.linear(repeated, w_in, b_in)), w_out, b_out)
        return y.view(case.top_k, -1, x.shape[1]).mean(0)

    return Built(call, tuple(tensors), reference="dense")


class _FeedForward(nn.Module):
    """One expert, as DeepSpeed wants it given; it makes copies of it."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) -> the same."""
        return self.fc2(torch.relu(self.fc1(x)))


def deepspeed_dropless(case: Case, weights: Weights) -> Built:
    """``deepspeed.moe.layer.MoE(drop_tokens=False)``, which pads every expert to the fullest one."""
    layer = _deepspeed_layer(case, weights)
    return Built(lambda x: layer(x)[0], tuple(_trainable(layer)))


def deepspeed(case: Case, weights: Weights) -> Built:
    """The same with its default ``capacity_factor=1.0``: an even share for each expert, the tokens above it dropped.

    Compared without dropping, timed with it: it computes less than the others.
    """
    layer = _deepspeed_layer(case, weights)
    gate = layer.deepspeed_moe.gate

    def run(x: Tensor, drop_tokens: bool) -> Tensor:
        gate.drop_tokens = drop_tokens
        return layer(x)[0]

    return Built(
        lambda x: run(x, False), tuple(_trainable(layer)), timed=lambda x: run(x, True)
    )


def _deepspeed_layer(case: Case, weights: Weights) -> Any:
    if case.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module = _import("deepspeed.moe.layer")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with torch.device("meta"):
        # No process group: its exchange between ranks is skipped for ep_size 1. Sampling off: the same routing as ours.
        layer = module.MoE(
            case.d_model,
            _FeedForward(case.d_model, case.d_ffn),
            num_experts=case.num_experts,
            k=case.top_k,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
    layer.deepspeed_moe.gate.wg.weight = leaf(weights.gate)
    _share(layer.deepspeed_moe.experts.deepspeed_experts, weights)
    return layer


def hugging_face(case: Case, weights: Weights) -> Built:
    """``NllbMoeSparseMLP`` of transformers 4.57, at a capacity that drops nothing."""
    if case.top_k != 2:
        raise Unavailable("NllbMoeSparseMLP has a top-2 router only")
    module = _import("transformers.models.nllb_moe.modeling_nllb_moe")
    version = _import("transformers").__version__
    if not version.startswith("4."):
        raise Unavailable(f"transformers {version}: NllbMoe of 5.x is wrong, install 4.57.x")
    # One tensor of (experts, tokens, d_model), and a copy of it for each in-place write that backward undoes.
    needed = 4 * case.num_experts * case.tokens * case.d_model * case.weight_dtype.itemsize
    if needed > available_bytes(case):
        raise Unavailable(f"needs about {needed / 2**30:.0f} GiB for (experts, tokens, d_model) tensors")
    config = module.NllbMoeConfig(
        d_model=case.d_model,
        num_experts=case.num_experts,
        expert_capacity=case.tokens,
        router_bias=False,
        activation_function="relu",
        activation_dropout=0.0,
        moe_token_dropout=0.0,
        router_dtype="float32",
        second_expert_policy="all",
    )
    with torch.device("meta"):
        layer = module.NllbMoeSparseMLP(config, case.d_ffn)
    layer.router.classifier.weight = leaf(weights.gate)
    _share(layer.experts.values(), weights)
    return Built(lambda x: layer(x[None], None)[0][0], tuple(_trainable(layer)))


def grouped_mm(case: Case, weights: Weights) -> Built:
    """Torch's own grouped GEMM between a sort by expert and a weighted index_add: the plain way to use it."""
    multiply = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if multiply is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
    gate, *tensors = (leaf(getattr(weights, name)) for name in Weights.__dataclass_fields__)
    w_in, b_in, w_out, b_out = tensors

    def call(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), gate.float()).softmax(dim=-1)
        weight, expert_index = probs.topk(case.top_k, dim=-1)
        if case.top_k > 1:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        expert, order = expert_index.flatten().sort(stable=True)
        token = order // case.top_k
        offsets = torch.bincount(expert, minlength=case.num_experts).cumsum(0).int()
        dtype = case.compute_dtype
        rows = x[token].to(dtype)
        hidden = F.relu(multiply(rows, w_in.to(dtype).transpose(1, 2), offs=offsets) + b_in.to(dtype)[expert])
        y = multiply(hidden, w_out.to(dtype).transpose(1, 2), offs=offsets) + b_out.to(dtype)[expert]
        # In fp32: in bf16 the gate's part of the gradient is off by more than the tolerance for one token in thirty.
        weighted = y.float() * weight.flatten()[order, None]
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, weighted).to(dtype)

    return Built(call, (gate, *tensors))


def megablocks(case: Case, weights: Weights) -> Built:
    """MegaBlocks' dropless layer over grouped GEMM; its experts have no biases."""
    if case.device == "cpu":
        raise Unavailable("runs on GPUs only")
    _no_biases(weights)
    arguments = _import("megablocks.layers.arguments").Arguments(
        hidden_size=case.d_model,
        ffn_hidden_size=case.d_ffn,
        moe_num_experts=case.num_experts,
        moe_top_k=case.top_k,
        moe_normalize_expert_weights=1 if case.top_k > 1 else None,
        activation_fn=F.relu,
        mlp_type="mlp",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        bf16=case.weight_dtype == torch.bfloat16,
        fp16=False,
        device=torch.device(case.device),
    )
    layer = _import("megablocks.layers.dmoe").dMoE(arguments)
    layer.router.layer.weight = leaf(weights.gate)
    # (experts * d_ffn, d_model) both: the second matrix of an expert is kept transposed.
    layer.experts.mlp.w1 = leaf(weights.w_in.flatten(0, 1))
    layer.experts.mlp.w2 = leaf(weights.w_out.transpose(1, 2).flatten(0, 1).contiguous())

    def call(x: Tensor) -> Tensor:
        y = layer(x[:, None])
        return (y[0] if isinstance(y, tuple) else y)[:, 0]

    return Built(call, tuple(_trainable(layer)))


def tutel(case: Case, weights: Weights) -> Built:
    """Tutel's layer at a capacity that follows the fullest expert."""
    if case.device == "cpu":
        raise Unavailable("its CPU path is a fallback; compared on GPUs only")
    module = _import("tutel.moe")
    layer = module.moe_layer(
        gate_type={"type": "top", "k": case.top_k, "capacity_factor": 0.0, "fp32_gate": True},
        experts={
            "type": "ffn",
            "num_experts_per_device": case.num_experts,
            "hidden_size_per_expert": case.d_ffn,
            "activation_fn": F.relu,
        },
        model_dim=case.d_model,
        normalize_gate=case.top_k > 1,
    ).to(case.device, case.weight_dtype)
    layer.gates[0].wg.weight = leaf(weights.gate.float())
    experts = layer.experts
    experts.batched_fc1_w = leaf(weights.w_in)
    experts.batched_fc1_bias = leaf(weights.b_in)
    experts.batched_fc2_w = leaf(weights.w_out.transpose(1, 2).contiguous())
    experts.batched_fc2_bias = leaf(weights.b_out)
    return Built(layer, tuple(_trainable(layer)))


PEERS: dict[str, Callable[[Case, Weights], Built]] = {
    "ours": ours,
    "dense": dense,
    "deepspeed": deepspeed,
    "deepspeed_dropless": deepspeed_dropless,
    "hugging_face": hugging_face,
    "grouped_mm": grouped_mm,
    "megablocks": megablocks,
    "tutel": tutel,
}
"""Name -> builder. `ours` and `dense` are what the ratios are about; the others may be missing."""

TITLES = {
    "ours": "ours",
    "dense": "dense FFN of the same FLOPs",
    "deepspeed": "DeepSpeed, capacity factor 1.0 (drops tokens)",
    "deepspeed_dropless": "DeepSpeed, nothing dropped",
    "hugging_face": "Hugging Face NllbMoeSparseMLP",
    "grouped_mm": "torch grouped_mm",
    "megablocks": "MegaBlocks dMoE",
    "tutel": "Tutel",
}


def available_bytes(case: Case) -> int:
    """Memory that is free on the device of a case."""
    if case.device != "cpu":
        return torch.cuda.mem_get_info()[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def leaf(tensor: Tensor) -> nn.Parameter:
    """A parameter over the same memory, with a gradient of its own."""
    return nn.Parameter(tensor.detach())


def _share(experts: Iterable[Any], weights: Weights) -> None:
    """Make each expert's two Linear modules views of the stacked weights."""
    for number, expert in enumerate(experts):
        expert.fc1.weight, expert.fc1.bias = leaf(weights.w_in[number]), leaf(weights.b_in[number])
        expert.fc2.weight, expert.fc2.bias = leaf(weights.w_out[number]), leaf(weights.b_out[number])


def _trainable(layer: nn.Module) -> Iterable[nn.Parameter]:
    for name, parameter in layer.named_parameters():
        if parameter.is_meta:
            raise Unavailable(f"its parameter {name} got no weights; the layer has another layout than expected")
        yield parameter


def _no_biases(weights: Weights) -> None:
    if weights.b_in.any() or weights.b_out.any():
        raise Unavailable("its experts have no biases; run with --zero-biases to compare")


def _import(name: str) -> Any:
    """Import a peer's module, without what it prints.

    Raises:
        Unavailable: it is not installed, or does not load here.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    except Exception as error:
        raise Unavailable(f"does not load here: {type(error).__name__}: {error}") from error
