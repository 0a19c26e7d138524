"""Layers that run twice instead of keeping their activations: the same training, in less memory."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from torch.autograd.graph import saved_tensors_hooks

from fairseq_plugins.models import recomputation
from fairseq_plugins.models.mtmoe_transformer import MtmoeTransformerModel
from mtmoe.moe import MoELayer

METHODS = {
    "dense": {"moe_freq": 0},
    "MoE": {},
    "dropout": {"dropout": 0.3, "moe_dropout": 0.4, "activation_dropout": 0.1, "attention_dropout": 0.1},
    "EOM": {"eom": 0.3},
    "FOM": {"fom": 0.3},
    "CMR": {"cmr": True, "cmr_gate_drop": 0.3, "dropout": 0.1},
    "gating dropout": {"gating_dropout": 0.5, "gating_dropout_ranks": 2},
    "gate-expert dropout": {"gating_dropout": 0.5, "gating_dropout_mode": "gate_expert"},
    "cluster dropout": {"expert_clusters": 2, "cluster_expert_dropout": 0.5},
    "random second expert": {"second_expert_policy": "random"},
    "capacity": {"capacity_factor": 0.5},
}


def build(options, recompute=False, offload=False, layers=2, d_model=16):
    dictionary = Dictionary()
    for number in range(40):
        dictionary.add_symbol(f"w{number}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    args = {
        "encoder_layers": layers, "decoder_layers": layers, "encoder_embed_dim": d_model,
        "encoder_ffn_embed_dim": 2 * d_model, "encoder_attention_heads": 4, "num_experts": 4, "dropout": 0.0,
        "checkpoint_activations": recompute, "offload_activations": offload, "moe_freq": 2, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    return MtmoeTransformerModel.build_model(Namespace(**args), task)


def batch(sentences=6, length=9):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 44, (2, sentences, length), generator=generator)
    lengths = torch.randint(1, length + 1, (2, sentences), generator=generator)
    lengths[:, 0] = length
    tokens[torch.arange(length) >= lengths[..., None]] = 1
    return {"src_tokens": tokens[0], "src_lengths": lengths[0], "prev_output_tokens": tokens[1]}


def loss_of(output, extra):
    loss = output.float().logsumexp(-1).square().mean()
    for _, record in extra["routing"]:
        loss = loss + sum(record.losses.values())
        if record.statistics.cmr_gate_sum is not None:
            loss = loss + record.statistics.cmr_gate_sum / record.statistics.cmr_gate_count
    return loss


def step(model, autocast, seed):
    """Forward under autocast, backward outside of it, as the task does."""
    model.zero_grad()
    model.set_num_updates(seed)
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, extra = model(**batch())
        loss = loss_of(output, extra)
    before = len(extra["routing"])
    torch.rand(seed)  # what others draw between the passes must not matter
    loss.backward()
    assert len(extra["routing"]) == before
    records = [record for _, record in extra["routing"]]
    statistics = [value for each in records for value in (each.statistics.load, *each.losses.values())]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, statistics, gradients, torch.get_rng_state()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_second_time_is_the_first_bit_by_bit(method, autocast):
    """Masks, roundings and routing: one that differed would give another gradient, or other shapes."""
    plain, recomputed = (build(METHODS[method], recompute) for recompute in (False, True))
    for seed in range(1, 5):
        expected, actual = step(plain, autocast, seed), step(recomputed, autocast, seed)
        assert torch.equal(expected[0], actual[0])
        assert all(torch.equal(one, other) for one, other in zip(expected[1], actual[1], strict=True))
        for name, gradient in expected[2].items():
            assert (gradient is None) == (actual[2][name] is None)
            assert gradient is None or torch.equal(gradient, actual[2][name]), name
        assert torch.equal(expected[3], actual[3])  # the next micro-batch draws what it would have drawn


def test_each_layer_runs_twice_in_training_and_once_otherwise(monkeypatch):
    calls, forward = [], MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda self, *given: (calls.append(self), forward(self, *given))[1])
    model = build({"moe_freq": 1}, recompute=True)
    step(model, False, 1)
    assert len(calls) == 8
    assert all(calls.count(layer) == 2 for layer in calls)
    calls.clear()
    with torch.no_grad():
        model(**batch())
    model.eval()
    loss_of(*model(**batch())).backward()
    assert len(calls) == 8


def saved_bytes(model, data):
    """Bytes of what autograd keeps for the backward pass, each storage once; parameters do not count."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        features, extra = model(**data, features_only=True)
        loss_of(features, extra)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("method", ["dense", "MoE", "EOM", "CMR"])
def test_memory_falls_to_little_more_than_the_input_of_each_layer(method):
    data = batch(sentences=8, length=32)
    options = {**METHODS[method], "encoder_normalize_before": True, "decoder_normalize_before": True}
    plain, recomputed = (saved_bytes(build(options, each, layers=4, d_model=32), data) for each in (False, True))
    tokens, residual = 8 * 32, 8 * 32 * 32 * 4
    assert plain > 5 * recomputed
    # One residual for each of 8 layers, the encoder's output, and what embedding, last norms and loss keep.
    assert recomputed < (8 + 1 + 8) * residual + 64 * tokens


def test_the_list_of_what_layers_computed_keeps_no_activations():
    _, extra = build({"moe_freq": 1})(**batch())
    assert [record.y.shape for _, record in extra["routing"]] == [(0, 16)] * 4


def test_offloaded_inputs_wait_on_the_cpu_and_come_back(monkeypatch):
    packed, returned = [], []
    monkeypatch.setattr(recomputation, "to_cpu", lambda tensor: packed.append(tensor) or (tensor.device, tensor))
    monkeypatch.setattr(recomputation, "from_cpu", lambda kept: returned.append(kept[1]) or kept[1])
    plain, offloading = build(METHODS["EOM"]), build(METHODS["EOM"], offload=True)
    expected, actual = step(plain, True, 3), step(offloading, True, 3)
    assert all(torch.equal(value, actual[2][name]) for name, value in expected[2].items())
    assert {id(tensor) for tensor in returned} == {id(tensor) for tensor in packed}
    residuals = [tensor for tensor in packed if tensor.is_floating_point() and tensor.shape == (9, 6, 16)]
    assert len(residuals) == 4 + 2  # the input of each layer, the encoder's output for each of the decoder's


def test_a_layer_that_fills_its_decoding_state_runs_once():
    model = build(METHODS["MoE"], recompute=True)
    data = batch()
    encoder_out, state = model.encoder(data["src_tokens"], data["src_lengths"]), {}
    for size in (1, 2):
        model.decoder(data["prev_output_tokens"][:, :size], encoder_out=encoder_out, incremental_state=state)[0].sum()
    caches = [value["prev_key"] for value in state.values() if value["prev_key"].shape[2] == 2]
    assert len(caches) == 2  # self-attention of both layers: one step a call
