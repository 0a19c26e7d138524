"""What the forward pass leaves in memory for the backward pass, tensor by tensor as autograd saves them.

Small things of a few bytes a token (indices, probabilities, norms' statistics) are counted where they are of the size
of experts or heads. Tests compare the count with the tensors that a real model saves on a CPU (``device="cpu"``). On a
GPU there are masks of dropout besides, a copy of attention's output, and, under autocast, a copy of each weight in the
type of the products; these follow from the sources of the layers and of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtmoe.planning.model import SIDES, ModelShape
from mtmoe.planning.training import TrainingSetup

LOGITS_AT_ONCE = 1 << 27
"""Elements of logits that exist at once, as in `mtmoe.training.cross_entropy`."""

STATISTICS = 8
"""Bytes a token of a layer norm: mean and deviation, fp32."""

CHOICE = 24
"""Bytes of a choice: index, weights before and after normalisation, rows of the dispatch plan."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes on one GPU."""

    saved: float
    """Kept from the forward to the backward pass."""
    copies: float
    """Weights joined or cast for products, kept as long."""
    working: float
    """What comes on top for a moment: logits and their gradient, or one layer's gradients, whichever is more."""


def activation_bytes(model: ModelShape, setup: TrainingSetup, imbalance: float = 1.0, device: str = "cuda",
                     local_experts: int | None = None) -> Activations:  # fmt: skip
    """Count the bytes of one batch on one GPU.

    Args:
        model: its shape.
        setup: batch, number type, recomputation.
        imbalance: rows that this GPU's experts get, over the mean.
        device: "cuda", or "cpu" for the compiled CPU kernels.
        local_experts: experts of a layer on this GPU; None for all.
    """
    sizes, tokens = setup.bytes, setup.tokens
    on_gpu = device == "cuda"
    layers = {side: _layer_bytes(model, setup, side, imbalance, on_gpu) for side in SIDES}
    inner = 0.0
    for side in SIDES:
        moe_layers = model.moe_layers(side)
        inner += moe_layers * layers[side][1] + (model.layers(side) - moe_layers) * layers[side][0]
    deepest = max(max(pair) if model.moe_layers(side) else pair[0] for side, pair in layers.items())
    ends = sum(
        tokens * (8 + 4)  # token numbers and the padding mask
        + bool(getattr(model, f"{side}_pre_norm")) * tokens * (sizes.residual * model.d_model + STATISTICS)
        + model.layernorm_embedding * tokens * (sizes.residual * model.d_model + STATISTICS)
        + (on_gpu and setup.dropout) * tokens * model.d_model
        for side in SIDES
    )
    if setup.recompute or sizes.product == sizes.residual:
        ends += tokens * sizes.residual * model.d_model  # the encoder's output, which all cross-attentions read
    copies = _weight_copies(model, setup, on_gpu, model.num_experts if local_experts is None else local_experts)
    gradients = _gradients_of_one_layer(model, setup, imbalance)
    if setup.recompute:
        inputs = sum(model.layers(side) for side in SIDES) * tokens * model.d_model * sizes.residual
        count = sum(model.layers(side) for side in SIDES)
        return Activations(inputs + ends, copies / count, max(_loss_bytes(model, setup), deepest + gradients))
    return Activations(inner + ends, copies, max(_loss_bytes(model, setup), gradients))


def _layer_bytes(
    model: ModelShape, setup: TrainingSetup, side: str, imbalance: float, on_gpu: bool
) -> tuple[float, float]:
    """Bytes that a dense and a MoE layer of a side save."""
    tokens, sizes, d_model = setup.tokens, setup.bytes, model.d_model
    c, heads = sizes.product, getattr(model, f"{side}_heads")
    masks = on_gpu and setup.dropout
    residual = sizes.residual * d_model + STATISTICS
    # In fp32 the norm's output is the products' input, in autocast a cast of it; either way one tensor is kept.
    attention = residual + c * d_model * (1 + 3 + 1 + on_gpu) + 4 * heads + masks * d_model
    layer = float(attention)
    if side == "decoder":
        # Queries, keys, values and output as before; where products are narrower, a cast of the encoder's output.
        layer += attention + (c * d_model if c != sizes.residual else 0)
    layer *= tokens
    if side == "decoder":
        layer += 4 * setup.length**2  # the causal mask
    dense = tokens * (residual + c * (d_model + model.d_ffn(side)) + masks * d_model)
    routed = tokens * model.routed_a_token * imbalance
    # The gate reads fp32, which is the norm's output unless all is in half precision.
    moe: float = tokens * (residual + 4 * d_model + 4 * model.num_experts + model.top_k * CHOICE)
    moe += routed * (c * (2 * d_model + model.expert_d_ffn(side)) + masks * d_model)
    if model.cmr:
        own_input = c * d_model if c != 4 else 0
        second_gate_input = 4 * d_model if sizes.residual != 4 else 0
        moe += tokens * (own_input + second_gate_input + c * (model.shared_d_ffn(side) + d_model) + masks * d_model)
    return layer + dense, layer + moe


def _weight_copies(model: ModelShape, setup: TrainingSetup, on_gpu: bool, local_experts: int) -> float:
    """Bytes of weights that exist a second time for products: joined to one matrix, or in a narrower type."""
    sizes, d_model = setup.bytes, model.d_model
    cast = on_gpu and sizes.product != sizes.weight
    # Queries, keys and values of self-attention are one product, keys and values of cross-attention another.
    joined = (3 * model.encoder_layers + (3 + 2) * model.decoder_layers) * d_model**2
    if not cast:
        return joined * sizes.weight
    values = joined + (model.encoder_layers + (1 + 2) * model.decoder_layers) * d_model**2
    for side in SIDES:
        moe_layers = model.moe_layers(side)
        values += (model.layers(side) - moe_layers) * 2 * d_model * model.d_ffn(side)
        values += moe_layers * 2 * d_model * model.shared_d_ffn(side)
        values += moe_layers * local_experts * 2 * d_model * model.expert_d_ffn(side)
    return values * sizes.product


def _loss_bytes(model: ModelShape, setup: TrainingSetup) -> float:
    """Logits of a block of tokens, and the gradients that the fused loss makes with them."""
    tokens, product, vocabulary = setup.tokens, setup.bytes.product, model.vocabulary_size
    block = min(tokens, max(1, LOGITS_AT_ONCE // vocabulary))
    weight = vocabulary * model.d_model
    cast = weight * product if product != setup.bytes.weight else 0
    sums = weight * 4 if block < tokens else 0  # of several blocks, in fp32
    return block * vocabulary * product + weight * product + cast + sums + 2 * tokens * model.d_model * product


def _gradients_of_one_layer(model: ModelShape, setup: TrainingSetup, imbalance: float) -> float:
    """Gradients of the widest sublayer's activations: residual, rows in and out, what is between the products."""
    sizes, d_model, widest = setup.bytes, model.d_model, 0.0
    for side in SIDES:
        dense = sizes.product * (2 * d_model + model.d_ffn(side))
        routed = model.routed_a_token * imbalance if model.moe_layers(side) else 0.0
        moe = routed * sizes.product * (2 * d_model + model.expert_d_ffn(side))
        widest = max(widest, dense, moe)
    return setup.tokens * (widest + 2 * sizes.residual * d_model)
