"""FLOPs on paper against those that torch counts in a real step."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plan import batch_of, build
from mtmoe.planning.flops import BACKWARD, forward_flops
from mtmoe.planning.model import ModelShape
from mtmoe.planning.training import TrainingSetup

SHAPE = ModelShape(
    vocabulary_size=90, d_model=32, encoder_layers=2, decoder_layers=3, encoder_heads=4, decoder_heads=4,
    encoder_d_ffn=48, decoder_d_ffn=40, encoder_expert_d_ffn=24, decoder_expert_d_ffn=24, num_experts=4,
)  # fmt: skip
SETUP = TrainingSetup(tokens=96, length=12)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_moe_freq": 0, "decoder_moe_freq": 0},
        {},
        {"cmr": True, "cmr_d_ffn": 20},
        {"top_k": 1, "encoder_moe_freq": 1},
        {"gate": "moec", "top_k": 1, "cosine_gate_dim": 8},
        {"num_experts": 16, "share_all_embeddings": False, "share_decoder_input_output_embed": False},
    ],
)
def test_a_step_counts_what_torch_counts(changes):
    shape = replace(SHAPE, **changes)
    model, criterion, _ = build(shape)
    model.double().train()  # the compiled kernels, whose products torch does not see, are for narrower types
    with FlopCounterMode(display=False) as counter:
        loss, _, _ = criterion(model, batch_of(SETUP, shape.vocabulary_size))
        loss.backward()
    expected = forward_flops(shape, SETUP.tokens, SETUP.tokens, SETUP.length).total * (1 + BACKWARD)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_eom_leaves_its_share_of_the_experts_out():
    tokens = 20_000
    shape = replace(SHAPE, encoder_layers=1, decoder_layers=1, encoder_moe_freq=1, decoder_moe_freq=0, eom=0.25)
    full, masked = (forward_flops(each, tokens, tokens, 12) for each in (replace(shape, eom=0.0), shape))
    assert masked.experts == 0.75 * full.experts
    model, _, _ = build(shape)
    model.double().train()
    batch = batch_of(TrainingSetup(tokens=tokens // 10, length=20), shape.vocabulary_size)
    layer = model.encoder.layers[0].moe.experts
    rows = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model(**batch["net_input"])
    handle.remove()
    assert rows[0] == pytest.approx(tokens // 10 * shape.routed_a_token, rel=0.05)
