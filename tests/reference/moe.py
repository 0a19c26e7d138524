"""The MoE layer as the papers write it: a loop over tokens, and GShard's einsum over (tokens, experts, capacity).

Written from the description of the methods, not from `mtmoe.moe`; gradients come from autograd. Everything is as wide
as its inputs: give fp64 for a yardstick. Random choices are not made here, they come in as arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mtmoe.moe import MoEConfig

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass
class Reference:
    """What the slow layer computed."""

    y: Tensor
    losses: dict[str, Tensor]
    chosen: list[list[int | None]]
    """Experts of each token before capacity; None where the policy or padding took a choice away."""
    kept: list[list[int | None]]
    """The same after capacity."""
    weights: list[list[Tensor]]
    capacity: int | None
    statistics: dict[str, Tensor] = field(default_factory=dict)


def slots(config: MoEConfig, tokens: int, training: bool) -> int | None:
    """Slots an expert, None for no limit."""
    if not training and config.eval_capacity_token_fraction > 0:
        return max(1, math.ceil(config.eval_capacity_token_fraction * tokens))
    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor == 0:
        return None
    even_share = -(-tokens // config.num_experts)
    return max(1, int(config.top_k * factor * even_share))


def feed_forward(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, activation: str) -> Tensor:
    """One network, on one token or on many."""
    return ACTIVATIONS[activation](x @ w_in.T + b_in) @ w_out.T + b_out


def expert(parameters: dict[str, Tensor], number: int) -> list[Tensor]:
    """The four tensors of one expert."""
    return [parameters[f"experts.{name}"][number] for name in ("w_in", "b_in", "w_out", "b_out")]


def best_experts(probs: list[float], top_k: int) -> list[int]:
    """Experts by falling probability."""
    return sorted(range(len(probs)), key=lambda number: -probs[number])[:top_k]


def seat(
    chosen: list[list[int | None]], order: list[int], num_experts: int, capacity: int | None
) -> list[list[int | None]]:
    """Walk through all first choices, then all second choices, …, and turn away whoever finds the expert full."""
    taken = [0] * num_experts
    kept: list[list[int | None]] = [[None] * len(choices) for choices in chosen]
    for choice in range(max(map(len, chosen), default=0)):
        for token in order:
            number = chosen[token][choice]
            if number is not None and (capacity is None or taken[number] < capacity):
                taken[number] += 1
                kept[token][choice] = number
    return kept


def moe_layer(
    parameters: dict[str, Tensor],
    x: Tensor,
    padding: list[bool],
    config: MoEConfig,
    training: bool,
    chosen: list[list[int | None]] | None = None,
    combine: str = "loop",
    survivors: list[int] | None = None,
) -> Reference:
    """One forward pass, token by token, without dropout and masking.

    Args:
        parameters: named as in `MoELayer`.
        x: (tokens, d_model).
        padding: True for tokens that are padding.
        config: of the layer.
        training: which capacity applies.
        chosen: experts of each token, where a random policy has drawn them.
        combine: ``loop`` over tokens or ``einsum`` over (tokens, experts, capacity).
        survivors: experts that take part; None for all.
    """
    tokens = len(x)
    real = [token for token in range(tokens) if not padding[token]]
    logits = cosines(parameters, x) / 0.07 if config.gate == "moec" else x @ parameters["gate.weight"].T
    levels = list(logits.split([config.expert_nodes, config.node_experts], 1)) if config.gate == "bilevel" else []
    experts = list(range(config.num_experts)) if survivors is None else survivors
    absent = [number for number in range(config.num_experts) if number not in experts]
    if levels:
        probs = joint(*levels)
    else:
        probs = torch.softmax(logits.index_fill(1, torch.tensor(absent, dtype=torch.int64), -math.inf), dim=-1)

    if chosen is None and levels:
        chosen = [
            [None] * config.top_k if padding[token] else best_inside(*(level[token] for level in levels), config)
            for token in range(tokens)
        ]
    if chosen is None:
        chosen = []
        for token in range(tokens):
            best: list[int | None] = list(best_experts(probs[token].tolist(), config.top_k))
            if config.second_expert_policy == "threshold":
                total = sum(probs[token, number] for number in best)
                for choice in range(1, config.top_k):
                    if probs[token, best[choice]] / total <= config.second_expert_threshold:
                        best[choice] = None
            chosen.append([None] * config.top_k if padding[token] else best)

    order = list(range(tokens))
    if config.batch_prioritized:
        order.sort(key=lambda token: -probs[token].max().item())
    capacity = slots(config, tokens, training)
    kept = seat(chosen, order, config.num_experts, capacity)

    weights = []
    for token in range(tokens):
        row = [probs.new_zeros(()) if number is None else probs[token, number] for number in kept[token]]
        if config.normalize_weights == "before_drop":
            # Over the choices as drawn, also those that a policy or capacity has taken away since.
            drawn = drawn_choices(probs[token], chosen[token], config.top_k)
            total = sum(probs[token, number] for number in drawn)
            row = [weight / total for weight in row]
        elif config.normalize_weights == "after_drop":
            total = torch.stack(row).sum().clamp(min=torch.finfo(torch.float32).eps)
            row = [weight / total for weight in row]
        if config.gate == "moec":
            temperature = torch.exp(parameters["gate.log_temperature"][0])
            cosine = [None if number is None else logits[token, number] * 0.07 for number in kept[token]]
            row = [probs.new_zeros(()) if c is None else 1 / (1 + torch.exp(-c / temperature)) for c in cosine]
        weights.append(row)

    mix = combine_by_einsum if combine == "einsum" else combine_by_loop
    y = mix(parameters, x, kept, weights, config)

    statistics = count(probs.detach(), chosen, kept, real, config, experts)
    if config.cmr:
        y, gate_sum = conditional(parameters, x, y, padding, config)
        statistics["cmr_gate_sum"], statistics["cmr_gate_count"] = gate_sum, torch.tensor(len(real))

    firsts = best_experts_of_all(probs, padding)
    if levels:
        return Reference(y, two_balances(*levels, padding, config), chosen, kept, weights, capacity, statistics)
    losses = {
        "load_balance": load_balance(probs[:, experts], positions(firsts, experts), padding,
                                     config.load_balance_include_padding),
        "router_z": router_z(logits[:, experts], real),
    }  # fmt: skip
    if config.expert_clusters:
        losses["cluster_variance"] = cluster_variance(probs, experts, real, config)
    return Reference(y, losses, chosen, kept, weights, capacity, statistics)


def joint(node_logits: Tensor, inner_logits: Tensor) -> Tensor:
    """SMILE: (tokens, experts) probability of a node times that of a place in it."""
    p, q = torch.softmax(node_logits, dim=-1), torch.softmax(inner_logits, dim=-1)
    return torch.stack([p[:, i] * q[:, j] for i in range(p.shape[1]) for j in range(q.shape[1])], dim=1)


def best_inside(node_logits: Tensor, inner_logits: Tensor, config: MoEConfig) -> list[int | None]:
    """SMILE: the best node of a token, and the best places there, by the policy; as numbers of experts."""
    node = best_experts(node_logits.tolist(), 1)[0]
    places: list[int | None] = list(best_experts(inner_logits.tolist(), config.top_k))
    if config.second_expert_policy == "threshold":
        exponentials = [math.exp(inner_logits[place].item()) for place in places]
        for choice in range(1, config.top_k):
            if exponentials[choice] / sum(exponentials) <= config.second_expert_threshold:
                places[choice] = None
    return [None if place is None else node * config.node_experts + place for place in places]


def two_balances(
    node_logits: Tensor, inner_logits: Tensor, padding: list[bool], config: MoEConfig
) -> dict[str, Tensor]:
    """SMILE: the balance of each level as if the other did not exist, and the z-losses of routers with a choice."""
    real = [token for token in range(len(padding)) if not padding[token]]
    losses, total = {}, node_logits.sum() * 0
    for name, logits in (("node_balance", node_logits), ("inner_balance", inner_logits)):
        probs = torch.softmax(logits, dim=-1)
        firsts = best_experts_of_all(probs, padding)
        losses[name] = load_balance(probs, firsts, padding, config.load_balance_include_padding)
        if logits.shape[1] > 1:
            total = total + router_z(logits, real)
    return losses | {"router_z": total}


def cosines(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """(tokens, experts): cosine of the angle between each token, projected, and each expert's row."""
    rows = []
    for token in x:
        place = parameters["gate.projection"] @ token
        directions = parameters["gate.weight"]
        rows.append(torch.stack([(place * row).sum() / (place.norm() * row.norm()) for row in directions]))
    return torch.stack(rows) if rows else x.new_zeros(0, len(parameters["gate.weight"]))


def positions(firsts: list[int | None], experts: list[int]) -> list[int | None]:
    """First choices, counted among the experts that take part."""
    return [None if number is None else experts.index(number) for number in firsts]


def cluster_variance(probs: Tensor, experts: list[int], real: list[int], config: MoEConfig) -> Tensor:
    """MoEC's variance loss, cluster by cluster and token by token."""
    if not real:
        return probs.sum() * 0
    size = config.num_experts // config.expert_clusters
    mean = {number: sum(probs[token, number] for token in real) / len(real) for number in experts}
    if config.cluster_variance_type == 0:
        groups = [experts]
    else:
        groups = [[n for n in experts if n // size == cluster] for cluster in range(config.expert_clusters)]
    variances = []
    for group in groups:
        centre = sum(mean[number] for number in group) / len(group)
        variances.append(sum((mean[number] - centre) ** 2 for number in group) / len(group))
    variance = sum(variances) / len(variances)
    if config.cluster_variance_type == 2:
        wide, gap = len(experts) // config.expert_clusters, 0.0
        for token in real:
            ranked = sorted(probs[token, experts], key=lambda p: -p.item())
            gap = gap + (sum(ranked[:wide]) - sum(ranked[wide : 2 * wide])) / wide / len(real)
        variance = variance / torch.exp(gap)
    # With sums over tokens the variance is tokens² as large; the criterion multiplies by tokens once.
    return variance * len(experts) * (len(real) if config.cluster_variance_scale == "sum" else 1)


def drawn_choices(probs: Tensor, chosen: list[int | None], top_k: int) -> list[int]:
    """All choices of a token, those that a policy took away put back (they are the best that are left)."""
    known = [number for number in chosen if number is not None]
    rest = [number for number in best_experts(probs.tolist(), len(probs)) if number not in known]
    return known + rest[: top_k - len(known)]


def best_experts_of_all(probs: Tensor, padding: list[bool]) -> list[int | None]:
    """First choice of each token, None for padding."""
    return [None if pad else best_experts(row, 1)[0] for row, pad in zip(probs.tolist(), padding, strict=True)]


def combine_by_loop(
    parameters: dict[str, Tensor],
    x: Tensor,
    kept: list[list[int | None]],
    weights: list[list[Tensor]],
    config: MoEConfig,
) -> Tensor:
    """``y[t] += w * FFN_e(x[t])`` for each token and each expert that kept it."""
    rows = []
    for token in range(len(x)):
        y = torch.zeros_like(x[token])
        for number, weight in zip(kept[token], weights[token], strict=True):
            if number is not None:
                y = y + weight * feed_forward(x[token], *expert(parameters, number), config.activation)
        rows.append(y)
    return torch.stack(rows) if rows else x * 0


def combine_by_einsum(
    parameters: dict[str, Tensor],
    x: Tensor,
    kept: list[list[int | None]],
    weights: list[list[Tensor]],
    config: MoEConfig,
) -> Tensor:
    """GShard's form: ``X_e = D^T x``, the experts on (experts, capacity, d_model), ``y = W · X_e``."""
    tokens = len(x)
    width = max(1, sum(number is not None for row in kept for number in row))  # never too narrow
    weight_sec = x.new_zeros(tokens, config.num_experts, width)
    taken = [0] * config.num_experts
    for choice in range(config.top_k):
        for token in range(tokens):
            number = kept[token][choice]
            if number is not None:
                place = x.new_zeros(tokens, config.num_experts, width)
                place[token, number, taken[number]] = 1
                weight_sec = weight_sec + place * weights[token][choice]
                taken[number] += 1
    dispatch_sec = (weight_sec != 0).to(x.dtype)
    x_ecm = torch.einsum("sec,sm->ecm", dispatch_sec, x)
    y_ecm = torch.stack(
        [
            feed_forward(x_ecm[number], *expert(parameters, number), config.activation)
            for number in range(config.num_experts)
        ]
    )
    return torch.einsum("sec,ecm->sm", weight_sec, y_ecm)


def conditional(
    parameters: dict[str, Tensor], x: Tensor, experts_output: Tensor, padding: list[bool], config: MoEConfig
) -> tuple[Tensor, Tensor]:
    """CMR without gate dropout: the mixed output, and the sum of the gates over real tokens."""
    rows, total = [], x.sum() * 0
    shared_weights = [
        parameters[f"conditional.shared.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    for token in range(len(x)):
        if padding[token]:
            rows.append(x[token] * 0)
            continue
        score = (parameters["conditional.gate.weight"][0] * x[token]).sum() + parameters["conditional.gate.bias"][0]
        gate = 1 / (1 + torch.exp(-score))
        shared = feed_forward(x[token], *shared_weights, config.activation)
        rows.append((1 - gate) * shared + gate * experts_output[token])
        total = total + gate
    return (torch.stack(rows) if rows else x * 0), total


def load_balance(probs: Tensor, firsts: list[int | None], padding: list[bool], include_padding: bool) -> Tensor:
    """``E * sum_e f_e P_e``; with padding (NLLB's release) both means are over all tokens, but padding chooses none."""
    counted = [token for token in range(len(probs)) if include_padding or not padding[token]]
    if all(padding):
        return probs.sum() * 0
    total = probs.new_zeros(())
    for number in range(probs.shape[1]):
        share = sum(firsts[token] == number for token in counted) / len(counted)
        mean = sum((probs[token, number] for token in counted), probs.new_zeros(())) / len(counted)
        total = total + share * mean
    return probs.shape[1] * total


def router_z(logits: Tensor, real: list[int]) -> Tensor:
    """Mean over real tokens of the squared log-sum-exp."""
    total = logits.sum() * 0
    for token in real:
        total = total + torch.log(torch.exp(logits[token]).sum()) ** 2 / len(real)
    return total


def count(
    probs: Tensor,
    chosen: list[list[int | None]],
    kept: list[list[int | None]],
    real: list[int],
    config: MoEConfig,
    experts: list[int],
) -> dict[str, Tensor]:
    """The statistics of a layer, by counting."""
    choices, firsts = [0] * config.num_experts, [0] * config.num_experts
    dropped, entropy, probability = 0, 0.0, [0.0] * config.num_experts
    for token in real:
        for choice, number in enumerate(chosen[token]):
            if number is not None:
                choices[number] += 1
                firsts[number] += choice == 0
                dropped += kept[token][choice] is None
        for number, p in enumerate(probs[token].tolist()):
            probability[number] += p
            entropy -= p * math.log(p) if p > 0 else 0.0
    total = max(1, sum(choices))
    return {
        "tokens": torch.tensor(len(real)),
        "tokens_per_expert": torch.tensor(choices),
        "first_choice_per_expert": torch.tensor(firsts),
        "probability_per_expert": torch.tensor(probability),
        "dropped": torch.tensor(dropped),
        "dropped_share": torch.tensor(dropped / total),
        "load": torch.tensor([choices[number] * len(experts) / total for number in experts]),
        "entropy": torch.tensor(entropy / max(1, len(real))),
    }


def local_buffers(
    parameters: dict[str, Tensor],
    x: Tensor,
    kept: list[list[int | None]],
    weights: list[list[Tensor]],
    config: MoEConfig,
) -> Tensor:
    """Gating dropout as on a real machine: each rank fills its (experts, capacity, d_model) buffer, and keeps it.

    Rank ``r`` holds experts ``[r * E/R, (r+1) * E/R)`` and the ``r``-th block of tokens. The exchange that is skipped
    would have sent block ``e`` of the buffer to the owner of expert ``e``; now its own expert at that offset runs it.
    """
    ranks, tokens = config.gating_dropout_ranks or config.num_experts, len(x)
    local_experts = config.num_experts // ranks
    y = [torch.zeros_like(row) for row in x]
    for rank in range(ranks):
        block = [token for token in range(tokens) if token * ranks // tokens == rank]
        buffer: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for token in block:
            for number, weight in zip(kept[token], weights[token], strict=True):
                if number is not None:
                    owner, offset = divmod(number, local_experts)
                    buffer.setdefault((owner, offset), []).append((token, weight))
        for (_, offset), entries in buffer.items():
            for token, weight in entries:
                here = rank * local_experts + offset
                y[token] = y[token] + weight * feed_forward(x[token], *expert(parameters, here), config.activation)
    return torch.stack(y)
