"""Optimiser state shared out over processes: the bits of an unsharded run, and checkpoints of any number of them."""

import copy
import multiprocessing
import pickle
import socket
import traceback

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.expert_bank import Bank, random_run
from torch import distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from mtmoe import kernels
from mtmoe.training import master_weights
from mtmoe.training.expert_adamw import ExpertAdamW
from mtmoe.training.state_shards import shared_out

OPTIONS = {"lr": 0.01, "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-8}
SECONDS = 120
"""After which a process that waits for another is given up."""


def in_processes(function, size):
    """Run `function(rank)` in that many processes of one gloo group; their results in the order of ranks."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    results = context.Queue()

    def work(rank):
        try:
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
            result = function(rank)
            dist.destroy_process_group()
        except BaseException:
            results.put((rank, traceback.format_exc()))
        else:
            results.put((rank, pickle.dumps(result)))  # tensors by value: the process may end first

    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=SECONDS) for _ in processes)
    finally:
        for process in processes:
            process.kill()
    failed = "\n".join(each for each in found.values() if isinstance(each, str))
    assert not failed, failed
    return [pickle.loads(found[rank]) for rank in range(size)]


class Model(nn.Module):
    """A bank of experts, and replicated weights of many sizes, one of which never gets a gradient."""

    def __init__(self, dtype, seed=0):
        super().__init__()
        self.bank = Bank(5, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        sizes = [(30, 7), (3,), (12, 5), (20, 9), (), (0, 4), (41,)]
        self.dense = nn.ParameterList(torch.randn(size, generator=generator).to(dtype) for size in sizes)


def optimizer_for(model, updates, sharded, offload=False):
    optimizer = ExpertAdamW(
        model.parameters(), expert_updates=updates, master_weights=True, offload_experts=offload, **OPTIONS
    )
    optimizer.watch(model.bank, [model.bank.w, model.bank.b])
    if sharded:
        optimizer.shard()
    return optimizer


def train(model, optimizer, first, last):
    """Updates with gradients that are the same in all processes, as after an all-reduce."""
    batches, rates = random_run(last)
    for update in range(first, last):
        generator = torch.Generator().manual_seed(update)
        optimizer.param_groups[0]["lr"] = rates[update]
        optimizer.zero_grad()
        index = torch.tensor(batches[update][0], dtype=torch.int64)[:, None]
        x = torch.randn(len(index), 15, generator=generator).to(model.bank.w.dtype)
        model.bank(x, kernels.plan_dispatch(index, 5)).sum().backward()
        for parameter in list(model.dense)[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step(factor=0.5)


def contents(model, optimizer):
    """All that a checkpoint would hold, by this process."""
    optimizer.gather_state()
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


def assert_same(one, other):
    weights, states = zip(one, other, strict=True)
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    assert states[0]["param_groups"] == states[1]["param_groups"]
    filled = [{number: state for number, state in each["state"].items() if state} for each in states]
    assert filled[0].keys() == filled[1].keys()
    for number, state in filled[0].items():
        assert state.keys() == filled[1][number].keys()
        for name, value in state.items():
            found = filled[1][number][name]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, (number, name)


def bytes_of(optimizer):
    """Bytes of the state that this process keeps for other weights than experts."""
    kept = (state for parameter, state in optimizer.state.items() if parameter not in optimizer._watched)
    return sum(v.nbytes for state in kept for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step")


@pytest.mark.parametrize(
    ("size", "updates", "bits"), [(2, "dense", 32), (3, "exact", 32), (2, "exact", 16), (3, "lazy", 16)]
)
def test_sharded_runs_have_the_bits_of_unsharded_ones_through_any_number_of_processes(
    monkeypatch, size, updates, bits
):
    dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
    monkeypatch.setattr(master_weights, "COPIED_AT_ONCE", 50)  # several messages from one process
    whole = Model(dtype)
    unsharded = optimizer_for(whole, updates, sharded=False)
    train(whole, unsharded, 0, 10)
    middle = copy.deepcopy((dict(whole.state_dict()), unsharded.state_dict()))
    train(whole, unsharded, 10, 25)
    expected = contents(whole, unsharded)

    def one_run(rank):
        model = Model(dtype)
        optimizer = optimizer_for(model, updates, sharded=True)
        train(model, optimizer, 0, 10)
        saved = contents(model, optimizer)
        train(model, optimizer, 10, 25)
        return saved, contents(model, optimizer), bytes_of(optimizer)

    def resumed(rank):
        model = Model(dtype, seed=1)
        model.load_state_dict(saved[0])
        optimizer = optimizer_for(model, updates, sharded=True)
        state = saved[1] if rank == 0 else None
        optimizer.load_state_dict(optimizer.distribute(state))
        assert len(optimizer.state_dict()["state"]) < len(saved[1]["state"])
        train(model, optimizer, 10, 25)
        return contents(model, optimizer)

    results = in_processes(one_run, size)
    saved = results[0][0]
    assert_same(saved, middle)
    for _, (weights, _), _ in results:
        assert all(torch.equal(value, expected[0][name]) for name, value in weights.items())
    assert_same(results[0][1], expected)
    kept = [each for _, _, each in results]
    assert sum(kept) == bytes_of(unsharded)
    assert max(kept) < 0.7 * sum(kept)
    for other in (size + 1 if size == 2 else 2,):
        assert_same(in_processes(resumed, other)[0], expected)

    # And without sharding, in one process.
    model = Model(dtype, seed=1)
    model.load_state_dict(saved[0])
    optimizer = optimizer_for(model, updates, sharded=False)
    optimizer.load_state_dict(optimizer.distribute(saved[1]))
    train(model, optimizer, 10, 25)
    assert_same(contents(model, optimizer), expected)


def test_it_agrees_with_torchs_own_sharded_optimizer():
    def run(rank, ours):
        model = Model(torch.float32)
        parameters = list(model.dense)[:-1]
        if ours:
            optimizer = ExpertAdamW(parameters, expert_updates="dense", **OPTIONS)
            optimizer.shard()
        else:
            optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, fused=True, **OPTIONS)
        for update in range(6):
            generator = torch.Generator().manual_seed(update)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return [each.detach() for each in parameters]

    ours, theirs = in_processes(lambda rank: (run(rank, True), run(rank, False)), 2)[1]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_checkpoint_of_fp32_masters_gives_the_same_fp32_weights_everywhere():
    """Only the owner of a weight gets its master copy; the others get the weight from it."""
    narrow = Model(torch.bfloat16)
    optimizer = optimizer_for(narrow, "exact", sharded=False)
    train(narrow, optimizer, 0, 5)
    saved = contents(narrow, optimizer)

    def resumed(rank):
        model = Model(torch.float32)
        model.load_state_dict(saved[0])
        second = optimizer_for(model, "exact", sharded=True)
        second.load_state_dict(second.distribute(saved[1] if rank == 0 else None))
        return [each.detach() for each in model.parameters()]

    for weights in in_processes(resumed, 2):
        for number, weight in enumerate(weights):
            master = saved[1]["state"].get(number, {}).get("master")
            assert master is None or torch.equal(weight, master)


def test_what_sharding_needs_is_said():
    model = Model(torch.float32)
    optimizer = optimizer_for(model, "exact", sharded=True)  # one process: it owns all
    with pytest.raises(RuntimeError, match="watch experts before the state is sharded"):
        optimizer.watch(model.bank, [model.bank.w, model.bank.b])
    train(model, optimizer, 0, 1)
    with pytest.raises(RuntimeError, match="shard the state before the first update"):
        optimizer.shard()


def test_parameters_of_one_process_alone_are_not_shared_out():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    parameters[1].expert = True
    optimizer = ExpertAdamW(parameters)
    optimizer.shard()
    assert list(optimizer._shards.owner) == parameters[:1]


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), processes=st.integers(1, 9))
def test_parts_differ_by_no_more_than_the_largest_parameter(sizes, processes):
    parameters = [torch.empty(size, device="meta") for size in sizes]
    owner = shared_out(parameters, processes)
    loads = [sum(each.numel() for each in parameters if owner[each] == rank) for rank in range(processes)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)
