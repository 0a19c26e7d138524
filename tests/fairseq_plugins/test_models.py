"""The architecture: what its options build, and that it computes what fairseq's Transformer computes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModelBase
from fairseq.modules import MultiheadAttention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fairseq_plugins.models import mtmoe_transformer as architecture
from fairseq_plugins.models.attention import FusedAttention
from fairseq_plugins.models.configuration import FROM_FAIRSEQ, MtmoeTransformerConfig, is_moe_layer
from fairseq_plugins.models.layers import MoEDecoderLayer, MoEEncoderLayer
from fairseq_plugins.models.mtmoe_transformer import MtmoeTransformerModel
from mtmoe.errors import ConfigError
from mtmoe.moe import MoEConfig


def small_task(symbols: int = 40) -> SimpleNamespace:
    dictionary = Dictionary()
    for number in range(symbols):
        dictionary.add_symbol(f"w{number}")
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def build(seed: int = 0, **options: object) -> MtmoeTransformerModel:
    defaults = {
        "encoder_layers": 2, "decoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_experts": 4, "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(seed)
    return MtmoeTransformerModel.build_model(Namespace(**{**defaults, **options}), small_task())


def batch(seed: int = 1, sentences: int = 5, length: int = 7) -> dict[str, torch.Tensor]:
    """Right-padded sentences; the first has full length."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 44, (2, sentences, length), generator=generator)
    lengths = torch.randint(1, length + 1, (2, sentences), generator=generator)
    lengths[:, 0] = length
    tokens[torch.arange(length) >= lengths[..., None]] = 1
    return {"src_tokens": tokens[0], "src_lengths": lengths[0], "prev_output_tokens": tokens[1]}


def loss_of(model: MtmoeTransformerModel, data: dict[str, torch.Tensor]) -> torch.Tensor:
    output, extra = model(**data)
    real = data["prev_output_tokens"] != 1
    auxiliary = sum(sum(record.losses.values()) for _, record in extra["routing"])
    return output[real].float().logsumexp(-1).square().mean() + auxiliary


@pytest.mark.parametrize("name", ["", "_tiny", "_base", "_big", "_nllb"])
def test_each_size_builds_with_experts_on_both_sides(name):
    args = Namespace(encoder_embed_dim=32, encoder_ffn_embed_dim=16, num_experts=4)
    getattr(architecture, f"mtmoe_transformer{name}")(args)
    model = MtmoeTransformerModel.build_model(args, small_task())
    freq = 4 if name == "_nllb" else 2
    for layers, kind in ((model.encoder.layers, MoEEncoderLayer), (model.decoder.layers, MoEDecoderLayer)):
        assert [isinstance(layer, kind) for layer in layers] == [(i + 1) % freq == 0 for i in range(len(layers))]
    assert model.encoder.embed_tokens.weight is model.decoder.output_projection.weight


def test_the_nllb_preset_has_54_billion_parameters():
    args = Namespace()
    architecture.mtmoe_transformer_nllb(args)
    with torch.device("meta"):
        model = MtmoeTransformerModel.build_model(args, small_task(symbols=256_000))
    expert = 2 * 2048 * 8192 + 8192 + 2048
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts == 12 * 128 * expert
    assert 54.3e9 < sum(p.numel() for p in model.parameters()) < 54.7e9


@pytest.mark.parametrize(("freq", "expected"), [(0, []), (1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3]), (5, [])])
def test_moe_layers_are_where_the_frequency_says(freq, expected):
    assert [index for index in range(4) if is_moe_layer(index, freq)] == expected


def test_each_side_may_have_its_own_frequency():
    model = build(moe_freq=1, encoder_moe_freq=0, decoder_moe_freq=2)
    assert not any("encoder" in name and ".moe." in name for name, _ in model.named_parameters())
    assert {name.split(".")[2] for name, _ in model.named_parameters() if ".moe." in name} == {"1"}


def test_every_field_of_the_config_is_an_option_with_its_own_help(capsys):
    parser = ArgumentParser()
    MtmoeTransformerModel.add_args(parser)
    text = " ".join(parser.format_help().split())
    for field in fields(MoEConfig):
        if field.name not in FROM_FAIRSEQ:
            assert f"--{field.name.replace('_', '-')}" in text
    assert "Experts that each token uses; 1 is Switch, 2 is GShard." in text
    args = parser.parse_args(["--num-experts", "16", "--eom", "0.2", "--cmr", "--second-expert-policy", "random"])
    assert (args.num_experts, args.eom, args.cmr, args.second_expert_policy) == (16, 0.2, True, "random")


def test_defaults_are_those_of_the_config():
    made = MtmoeTransformerConfig()
    for field in fields(MoEConfig):
        if field.name not in FROM_FAIRSEQ:
            assert getattr(made, field.name) == field.default


def test_wrong_options_are_explained():
    with pytest.raises(ValueError, match="top_k=9 must be between 1 and num_experts=4"):
        build(top_k=9)
    with pytest.raises(ValueError, match="gate='tokp' is unknown; choose one of: "):
        build(gate="tokp")
    with pytest.raises(ConfigError, match="set decoder_moe_freq=0"):
        build(cross_self_attention=True)
    with pytest.raises(ConfigError, match="quant_noise_pq"):
        build(quant_noise_pq=0.1)


def test_dropout_reaches_the_experts_unless_they_have_their_own():
    assert build(dropout=0.3).encoder.layers[1].moe.config.dropout == 0.3
    assert build(dropout=0.3, moe_dropout=0.4).encoder.layers[1].moe.config.dropout == 0.4
    assert build(dropout=0.3, activation_dropout=0.1).decoder.layers[1].moe.config.activation_dropout == 0.1


@pytest.mark.parametrize(("kernel", "backend"), [("auto", None), ("cpu", "cpu"), ("reference", "reference")])
def test_a_kernel_can_be_forced(kernel, backend):
    forced, automatic = build(moe_kernel=kernel), build()
    moe = forced.encoder.layers[1].moe
    assert (moe.backend, moe.experts.backend) == (backend, backend)
    assert_close(loss_of(forced, batch()), loss_of(automatic, batch()))


def reference_of(model: MtmoeTransformerModel) -> TransformerModelBase:
    """fairseq's own Transformer with the weights of a dense model of ours."""
    reference = TransformerModelBase.build_model(model.cfg, small_task())
    reference.load_state_dict(model.state_dict())
    return reference


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_without_experts_it_is_fairseqs_transformer(before, training):
    model = build(moe_freq=0, encoder_normalize_before=before, decoder_normalize_before=before)
    reference = reference_of(model)
    model.train(training), reference.train(training)
    data = batch()
    ours, theirs = model(**data)[0], reference(**data)[0]
    real = data["prev_output_tokens"] != 1
    assert_close(ours[real], theirs[real], atol=2e-5, rtol=2e-5)
    ours[real].square().sum().backward(), theirs[real].square().sum().backward()
    for (name, mine), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert_close(mine.grad, other.grad, atol=2e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("before", [True, False])
def test_equal_experts_are_the_dense_network(before):
    """Every expert is the dense layer's network, nothing drops, and weights sum to 1: the same model."""
    options = {"encoder_normalize_before": before, "decoder_normalize_before": before}
    dense, sparse = build(moe_freq=0, **options).eval(), build(moe_freq=2, **options).eval()
    weights = dense.state_dict()
    state = sparse.state_dict()
    for name in state:
        if ".moe.gate." in name:
            continue
        if ".moe.experts." in name:
            layer, kind = name.split(".moe.experts.")
            source = {"w_in": "fc1.weight", "b_in": "fc1.bias", "w_out": "fc2.weight", "b_out": "fc2.bias"}[kind]
            state[name] = weights[f"{layer}.{source}"].expand_as(state[name]).clone()
        else:
            state[name] = weights[name]
    sparse.load_state_dict(state)
    data = batch()
    real = data["prev_output_tokens"] != 1
    assert_close(sparse(**data)[0][real], dense(**data)[0][real], atol=1e-5, rtol=1e-5)


def test_routing_of_each_moe_layer_is_returned_and_padding_is_not_counted():
    model = build(moe_freq=1, cmr=True)
    data = batch()
    _, extra = model(**data)
    assert [name for name, _ in extra["routing"]] == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    for name, output in extra["routing"]:
        tokens = data["src_tokens" if name.startswith("encoder") else "prev_output_tokens"]
        assert output.statistics.tokens == (tokens != 1).sum()
        assert output.statistics.cmr_gate_count == (tokens != 1).sum()
    assert build(moe_freq=0)(**data)[1]["routing"] == []


def test_padding_changes_nothing():
    model = build(moe_freq=1).eval()
    data = batch(sentences=1)
    padded = {name: torch.nn.functional.pad(value, (0, 3), value=1) for name, value in data.items() if value.dim() == 2}
    expected = model(**data)[0]
    actual = model(**padded, src_lengths=data["src_lengths"])[0]
    assert_close(actual[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)


def test_step_by_step_decoding_equals_the_whole_sequence():
    model = build(moe_freq=1, cmr=True, eom=0.2, fom=0.1).eval()
    data = batch(sentences=2)
    data["prev_output_tokens"] = torch.randint(4, 44, (2, 6))
    encoder_out = model.encoder(data["src_tokens"], data["src_lengths"])
    whole = model.decoder(data["prev_output_tokens"], encoder_out=encoder_out)[0]
    state: dict = {}
    for step in range(1, 7):
        prefix = data["prev_output_tokens"][:, :step]
        last = model.decoder(prefix, encoder_out=encoder_out, incremental_state=state)[0]
        assert_close(last[:, -1], whole[:, step - 1], atol=1e-5, rtol=1e-5)


def test_bf16_autocast_is_close_and_trains():
    data = batch()
    model = build(moe_freq=1, cmr=True)
    expected = loss_of(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, data)
    assert_close(loss, expected, rtol=0.05, atol=0.0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_attention_weights_are_still_to_be_had():
    model = build().eval()
    data = batch()
    attention = model(**data, alignment_layer=1)[1]["attn"][0]
    assert attention.shape == (5, 7, 7)
    assert_close(attention.sum(-1), torch.ones(5, 7))


@settings(max_examples=25)
@given(
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    sentences=st.integers(1, 4),
    self_attention=st.booleans(),
    causal=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fused_attention_equals_fairseqs(queries, keys, sentences, self_attention, causal, padded, seed):
    torch.manual_seed(seed)
    attention = MultiheadAttention(12, 3, self_attention=self_attention, encoder_decoder_attention=not self_attention)
    fused = FusedAttention(12, 3, self_attention=self_attention, encoder_decoder_attention=not self_attention)
    fused.load_state_dict(attention.state_dict())
    keys = queries if self_attention else keys
    query = torch.randn(queries, sentences, 12, requires_grad=True)
    key = query if self_attention else torch.randn(keys, sentences, 12, requires_grad=True)
    padding = (torch.arange(keys) >= torch.randint(1, keys + 1, (sentences, 1))) if padded else None
    mask = torch.full((queries, keys), -torch.inf).triu(1) if causal and self_attention else None
    results = []
    for module in (attention, fused):
        output, _ = module(query, key, key, key_padding_mask=padding, attn_mask=mask, need_weights=False)
        inputs = [query] if self_attention else [query, key]
        results.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, *module.parameters()])])
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
