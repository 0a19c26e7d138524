"""Bytes on paper against tensors of real trainings."""

from dataclasses import replace

import pytest
import torch
from fairseq.optim.fp16_optimizer import FP16Optimizer

from benchmarks.plan import batch_of, build, saved_bytes
from benchmarks.step import training_step
from mtmoe.planning.activations import activation_bytes
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.hardware import GPUS, Cluster
from mtmoe.planning.layouts import Layout
from mtmoe.planning.memory import memory_of, usable_memory
from mtmoe.planning.model import ModelShape
from mtmoe.planning.parameters import count_parameters
from mtmoe.planning.training import TrainingSetup

SHAPE = ModelShape(
    vocabulary_size=101, d_model=64, encoder_layers=2, decoder_layers=2, encoder_heads=4, decoder_heads=4,
    encoder_d_ffn=160, decoder_d_ffn=96, encoder_expert_d_ffn=128, decoder_expert_d_ffn=128, num_experts=4,
)  # fmt: skip
DENSE = replace(SHAPE, encoder_moe_freq=0, decoder_moe_freq=0)
A100 = GPUS["a100-80"]


def memory(shape, setup, gpus=1, expert_parallel=1, **assumed):
    return memory_of(shape, setup, Layout(Cluster(A100, gpus, 8), expert_parallel), Assumptions(**assumed))


def total(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("shape", [DENSE, SHAPE, replace(SHAPE, cmr=True)], ids=["dense", "moe", "cmr"])
@pytest.mark.parametrize("dtype", ["fp32", "autocast"])
def test_weights_gradients_and_states_are_those_of_a_training(shape, dtype):
    setup = TrainingSetup(tokens=64, length=16, dtype=dtype, dropout=False)
    parts = build(shape)
    training_step(parts, batch_of(setup, shape.vocabulary_size), dtype == "autocast")
    model, _, optimizer = parts
    planned = memory(shape, setup)
    assert planned.weights == total(model.parameters())
    assert planned.gradients == total(parameter.grad for parameter in model.parameters())
    states = [value for state in optimizer.optimizer.state.values() for key, value in state.items() if "exp_" in key]
    assert planned.optimiser == total(states)
    assert planned.master == planned.host == 0


def test_half_precision_has_master_copies_of_weights_and_gradients():
    model, _, _ = build(SHAPE)
    model.bfloat16()
    master = FP16Optimizer.build_fp32_params(None, list(model.parameters()), flatten=False)
    setup = TrainingSetup(tokens=64, length=16, dtype="bf16")
    planned = memory(SHAPE, setup)
    assert planned.weights == total(model.parameters())
    assert planned.master == total(master) + total(parameter.grad for parameter in master)
    optimizer = torch.optim.AdamW(master)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if "exp_" in key]
    assert planned.optimiser == total(states)
    assert memory(SHAPE, setup, master_gradients=False).master == total(master)


@pytest.mark.parametrize("dtype", ["fp32", "autocast"])
@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_moe_freq": 0, "decoder_moe_freq": 0},
        {},
        {"encoder_moe_freq": 1},
        {"cmr": True},
        {"top_k": 1, "num_experts": 16},
        {"d_model": 256, "num_experts": 8, "cmr": True, "cmr_d_ffn": 64},
        {"encoder_layers": 5, "decoder_layers": 1, "encoder_d_ffn": 640},
    ],
)
def test_activations_are_what_autograd_saves(changes, dtype):
    from mtmoe.kernels import extension

    if not extension.available():
        pytest.skip("the plan counts what the compiled kernels save; plain torch on a CPU saves masks and scores too")
    shape = replace(SHAPE, **changes)
    setup = TrainingSetup(tokens=512, length=32, dtype=dtype, dropout=False)
    model, criterion, _ = build(shape, dropout=0.1)  # the compiled kernels draw masks again instead of saving them
    model.train()
    batch = batch_of(setup, shape.vocabulary_size)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return criterion(model, batch)[0]

    counted = activation_bytes(shape, setup, device="cpu")
    assert counted.saved + counted.copies == pytest.approx(saved_bytes(model, forward), rel=0.005)


@pytest.mark.parametrize("shape", [DENSE, replace(SHAPE, encoder_moe_freq=1, decoder_moe_freq=1)], ids=["dense", "moe"])
def test_recomputed_layers_leave_their_inputs(shape):
    from benchmarks.plan import MtmoeTransformerModel, options_of
    from benchmarks.step import task_of

    setup = TrainingSetup(tokens=512, length=32, dtype="autocast", dropout=False, recompute=True)
    options = options_of(shape)
    options.checkpoint_activations = True
    options.offload_activations = False
    model = MtmoeTransformerModel.build_model(options, task_of(shape.vocabulary_size))
    _, criterion, _ = build(shape)
    model.train()
    batch = batch_of(setup, shape.vocabulary_size)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return criterion(model, batch)[0]

    planned = activation_bytes(shape, setup, device="cpu")
    full = activation_bytes(shape, replace(setup, recompute=False), device="cpu")
    assert planned.saved == pytest.approx(saved_bytes(model, forward), rel=0.05)
    assert planned.saved < full.saved / 3
    assert planned.working > full.working  # a layer's activations exist once more while its gradients are computed


def test_zero1_shards_the_states_of_what_is_replicated():
    setup = TrainingSetup(tokens=64, length=16, dtype="bf16")
    counted = count_parameters(SHAPE)
    plain, sharded = memory(SHAPE, setup, 4, 2), memory(SHAPE, replace(setup, zero1=True), 4, 2)
    assert plain.optimiser == 8 * (counted.replicated + counted.experts / 2)
    assert sharded.optimiser == 8 * (counted.replicated / 4 + counted.experts / 2)
    assert sharded.master == 8 * (counted.replicated / 4 + counted.experts / 2)
    assert (sharded.weights, sharded.gradients) == (plain.weights, plain.gradients)


def test_offload_moves_the_states_of_experts_to_the_host():
    setup = TrainingSetup(tokens=64, length=16, dtype="bf16", offload=True)
    counted = count_parameters(SHAPE)
    planned = memory(SHAPE, setup, 8, 2)
    assert planned.optimiser == 8 * counted.replicated
    assert planned.master == 8 * counted.replicated
    assert planned.host == 8 * (counted.experts / 2) * (8 + 8)  # the states of 8 GPUs


def test_the_fullest_gpu_counts():
    setup = TrainingSetup(tokens=4096, length=64)
    even, full = memory(SHAPE, setup, 8, 4), memory(SHAPE, setup, 8, 4, rank_imbalance=1.5)
    assert full.activations > even.activations
    assert full.exchange == 1.25 * even.exchange
    assert memory(SHAPE, setup, 8, 1).exchange == 0


def test_usable_memory():
    layout = Layout(Cluster(A100, 1, 8), 1)
    assumed = Assumptions(reserved_memory=0, usable_memory=0.5)
    assert usable_memory(layout, assumed) == A100.memory / 2
