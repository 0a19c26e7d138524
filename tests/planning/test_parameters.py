"""Parameters on paper against those of real models, to the last one."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.models import toy_config

from benchmarks.plan import build_model, options_of
from benchmarks.step import task_of
from fairseq_plugins.models import mtmoe_transformer as architectures
from fairseq_plugins.models.mtmoe_transformer import MtmoeTransformerModel
from mtmoe.checkpoint.stored import expected_shapes
from mtmoe.inference.model import Transformer
from mtmoe.planning import presets
from mtmoe.planning.model import ModelShape
from mtmoe.planning.parameters import count_parameters

SMALL = ModelShape(
    vocabulary_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_heads=2, decoder_heads=2,
    encoder_d_ffn=24, decoder_d_ffn=20, encoder_expert_d_ffn=12, decoder_expert_d_ffn=12, num_experts=4,
)  # fmt: skip


def real_parameters(shape: ModelShape) -> dict[str, int]:
    with torch.device("meta"):
        model = build_model(shape)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@st.composite
def shapes(draw):
    moec = draw(st.booleans())
    experts, frequency = draw(st.integers(1, 5)), st.integers(0, 3)
    shared = draw(st.booleans())
    width = draw(st.integers(1, 9))
    return replace(
        SMALL,
        vocabulary_size=draw(st.integers(5, 60)),
        encoder_layers=draw(st.integers(1, 4)),
        decoder_layers=draw(st.integers(1, 4)),
        encoder_d_ffn=draw(st.integers(1, 30)),
        decoder_d_ffn=draw(st.integers(1, 30)),
        encoder_expert_d_ffn=width,
        decoder_expert_d_ffn=width,
        encoder_moe_freq=draw(frequency),
        decoder_moe_freq=draw(frequency),
        num_experts=experts,
        top_k=1 if moec else draw(st.integers(1, min(2, experts))),
        gate="moec" if moec else "topk",
        cosine_gate_dim=draw(st.integers(1, 7)),
        cmr=draw(st.booleans()),
        cmr_d_ffn=draw(st.sampled_from([0, 7])),
        share_all_embeddings=shared,
        share_decoder_input_output_embed=shared or draw(st.booleans()),
        encoder_learned_positions=draw(st.booleans()),
        decoder_learned_positions=draw(st.booleans()),
        max_source_positions=draw(st.integers(3, 9)),
        encoder_pre_norm=draw(st.booleans()),
        decoder_pre_norm=draw(st.booleans()),
        layernorm_embedding=draw(st.booleans()),
    )


@given(shape=shapes())
@settings(max_examples=30)
def test_every_shape_has_the_parameters_of_the_real_model(shape):
    real = real_parameters(shape)
    counted = count_parameters(shape)
    experts = sum(size for name, size in real.items() if ".experts." in name)
    gates = sum(size for name, size in real.items() if ".moe.gate." in name or ".conditional.gate." in name)
    assert counted.experts == experts
    assert counted.gates == gates
    assert counted.shared == sum(size for name, size in real.items() if ".conditional.shared." in name)
    assert counted.norms == sum(size for name, size in real.items() if "norm" in name)
    assert counted.attention == sum(size for name, size in real.items() if "_attn." in name)
    assert counted.total == sum(real.values())
    moe_layers = sum(shape.moe_layers(side) for side in ("encoder", "decoder"))
    if moe_layers:
        assert counted.active == counted.replicated + counted.experts * shape.top_k // shape.num_experts


@pytest.mark.parametrize("name", sorted(presets.ARCHITECTURES))
def test_architectures_are_those_of_fairseq(name):
    args = Namespace()
    getattr(architectures, name)(args)
    with torch.device("meta"):
        model = MtmoeTransformerModel.build_model(args, task_of(1000))
    shape = presets.by_name(name, 1000)
    assert count_parameters(shape).total == sum(parameter.numel() for parameter in model.parameters())
    for option in ("top_k", "num_experts", "eom", "capacity_factor", "cmr"):
        assert getattr(shape, option) == getattr(args, option)
    assert (shape.encoder_heads, shape.decoder_heads) == (args.encoder_attention_heads, args.decoder_attention_heads)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": True},
        {"moec": True},
        {"moe": True, "encoder_moe_freq": 1},
        {"share_all_embeddings": False, "share_decoder_input_output_embed": False},
        {"share_all_embeddings": False, "encoder_learned_positions": True, "layernorm_embedding": True},
        {"decoder_pre_norm": False, "encoder_layers": 3, "moe": True},
    ],
)
def test_the_portable_model(changes):
    config = toy_config(**changes)
    counted = count_parameters(presets.from_config(config.to_json(), "toy"))
    stored = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    assert counted.total == stored
    with torch.device("meta"):
        model = Transformer(config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())


def test_options_of_a_preset_give_the_shape_that_training_builds():
    options = {"encoder-layers": 3, "moe-freq": 1, "moe-ffn-embed-dim": 32, "cmr": True, "num-experts": 4,
               "decoder-ffn-embed-dim": 48, "encoder-embed-dim": 64, "dropout": 0.1, "fp16": False}  # fmt: skip
    shape = presets.from_options(options, "mtmoe_transformer_tiny", 100)
    args = Namespace(**{key.replace("-", "_"): value for key, value in options.items()})
    architectures.mtmoe_transformer_tiny(args)
    with torch.device("meta"):
        model = MtmoeTransformerModel.build_model(args, task_of(100))
    assert count_parameters(shape).total == sum(parameter.numel() for parameter in model.parameters())


def test_published_sizes():
    nllb = count_parameters(presets.by_name("mtmoe_transformer_nllb", 256_206))
    assert nllb.total == pytest.approx(54.5e9, rel=2e-3)  # NLLB Team 2022
    switch = count_parameters(presets.by_name("switch-1.6t"))
    assert switch.total == pytest.approx(1571e9, rel=2e-3)  # Fedus et al. 2021


def test_the_benchmark_builds_what_it_is_asked_for():
    assert options_of(replace(SMALL, cmr=True)).cmr
    assert options_of(replace(SMALL, top_k=1)).normalize_weights == "none"
