"""AdamW that lets unused experts wait, against torch's AdamW run on every update."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.expert_bank import Bank, optimizer_for, random_run, runs, train, train_twice
from torch import nn
from torch.testing import assert_close

from mtmoe import kernels
from mtmoe.kernels import adamw as adamw_kernels
from mtmoe.kernels import extension
from mtmoe.training import expert_adamw
from mtmoe.training.expert_adamw import ExpertAdamW
from mtmoe.training.waiting_experts import horizon

BACKENDS = ["torch", pytest.param("compiled", marks=pytest.mark.skipif(not extension.available(), reason="not built"))]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(adamw_kernels, "extension", SimpleNamespace(available=lambda: False))
    return request.param


@pytest.mark.parametrize("updates", ["dense", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torch_on_every_update(backend, updates, dtype):
    @given(run=runs())
    @settings(max_examples=40)
    def check(run):
        num_experts, batches, rates, options, clip = run
        banks = [Bank(num_experts, torch.float64), Bank(num_experts, dtype)]
        norms = [
            train(bank, optimizer_for(bank, kind, **options), batches, rates, clip)
            for bank, kind in zip(banks, ("eager", updates), strict=True)
        ]
        for expected, actual in zip(*norms, strict=True):
            assert_close(actual.double(), expected.double(), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
        # A wrong update would be off by a learning rate, 1e-4 or more.
        expected, actual = (bank.state_dict() for bank in banks)
        for name, value in expected.items():
            assert_close(actual[name].double(), value, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-9)

    check()


@pytest.mark.parametrize(("betas", "weight_decay"), [((0.9, 0.98), 0.0), ((0.9, 0.98), 0.1), ((0.9, 0.999), 0.1)])
def test_what_is_left_out_after_the_horizon_is_below_rounding(backend, betas, weight_decay):
    """Thousands of updates without gradient, in fp64, where the rounding of fp32 does not hide anything."""
    lr = 0.01
    batches = [[[0, 1]]] * 5 + [[[0]]] * (expert_adamw.HISTORY + 2 * horizon(betas))
    banks = [Bank(3, torch.float64), Bank(3, torch.float64)]
    for bank, updates in zip(banks, ("eager", "exact"), strict=True):
        optimizer = optimizer_for(bank, updates, betas=betas, eps=1e-6, weight_decay=weight_decay)
        train(bank, optimizer, batches, [lr] * len(batches))
    expected, actual = (bank.state_dict() for bank in banks)
    for name in ("w", "b"):
        assert (expected[name] - actual[name]).abs().max() < lr * 2**-25


def test_horizon():
    assert horizon((0.9, 0.98)) == 213
    assert horizon((0.0, 0.9)) == 0
    with pytest.raises(ValueError, match="need beta1\\*\\*2 < beta2; choose dense updates"):
        ExpertAdamW([nn.Parameter(torch.ones(2))], betas=(0.95, 0.9))
    with pytest.raises(ValueError, match="expert_updates='sparse' is unknown; choose one of: dense, exact, lazy"):
        ExpertAdamW([nn.Parameter(torch.ones(2))], expert_updates="sparse")


@pytest.mark.parametrize("updates", ["dense", "exact", "lazy"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(backend, updates):
    batches, rates = random_run(300)
    options = {"weight_decay": 0.01, "betas": (0.9, 0.98)}
    stops = (1, 17, 120)  # where the unbroken run did not save
    (whole, optimizer), (broken, second) = train_twice(updates, torch.float32, batches, rates, stops, options)
    for name, value in whole.state_dict().items():
        assert torch.equal(broken.state_dict()[name], value), name
    states = [each.state_dict()["state"] for each in (optimizer, second)]
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        for name, value in state.items():
            other = states[1][index][name]
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


@pytest.mark.parametrize("updates", ["dense", "exact", "lazy"])
def test_what_forgets_its_moments_begins_as_a_new_one(backend, updates):
    batches, rates = random_run(80)
    options = {"weight_decay": 0.01, "betas": (0.9, 0.98)}
    bank = Bank(5, torch.float32)
    optimizer = optimizer_for(bank, updates, **options)
    train(bank, optimizer, batches[:50], rates[:50])
    optimizer.forget()
    fresh = Bank(5, torch.float32, seed=1)
    fresh.load_state_dict(bank.state_dict())
    assert not any(optimizer.state.values())
    for each, its in ((bank, optimizer), (fresh, optimizer_for(fresh, updates, **options))):
        train(each, its, batches[50:], rates[50:], first=50)
    for name, value in fresh.state_dict().items():
        assert torch.equal(bank.state_dict()[name], value), name


@pytest.mark.parametrize("before", ["eager", "dense", "exact"])
@pytest.mark.parametrize("after", ["dense", "exact"])
def test_a_checkpoint_goes_on_in_another_mode(backend, before, after):
    batches, rates = random_run(80)
    whole, broken = Bank(5, torch.float64), Bank(5, torch.float64)
    train(whole, optimizer_for(whole, "eager"), batches, rates)
    first = optimizer_for(broken, before, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.01)
    train(broken, first, batches[:50], rates[:50])
    saved = copy.deepcopy((broken.state_dict(), first.state_dict()))
    broken = Bank(5, torch.float64)
    broken.load_state_dict(saved[0])
    second = optimizer_for(broken, after, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.01)
    second.load_state_dict(saved[1])
    train(broken, second, batches[50:], rates[50:], first=50)
    for name, value in whole.state_dict().items():
        assert_close(broken.state_dict()[name], value, rtol=0, atol=1e-9)


def test_a_forward_pass_sees_weights_of_now(backend):
    """Also one that computes no gradient, and one between two others whose graph still holds the weights."""
    batches, rates = random_run(30)
    eager, exact = Bank(5, torch.float64), Bank(5, torch.float64)
    train(eager, optimizer_for(eager, "eager"), batches, rates)
    optimizer = optimizer_for(exact, "exact", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    train(exact, optimizer, batches, rates)
    for experts in ([2], [0, 3], [4], [1]):
        plan = kernels.plan_dispatch(torch.tensor(experts)[:, None], 5)
        x = torch.ones(len(experts), 15, dtype=torch.float64)
        with torch.no_grad():
            assert_close(exact(x, plan), eager(x, plan), rtol=0, atol=1e-9)
    train(exact, optimizer, [[[0]]], [0.1])
    plans = [kernels.plan_dispatch(torch.tensor([[expert]]), 5) for expert in (0, 3)]
    first, second = (exact(torch.ones(1, 15, dtype=torch.float64, requires_grad=True), plan) for plan in plans)
    (first.sum() + second.sum()).backward()  # the second pass caught up expert 3 in place


def test_untouched_experts_are_not_read_or_written(backend):
    """Their gradient is NaN here, which would spread if it were read."""
    bank = Bank(4, torch.float32)
    optimizer = optimizer_for(bank, "exact", weight_decay=0.1)
    train(bank, optimizer, [[[0, 1, 2, 3]]], [0.1])
    before = {name: value.clone() for name, value in bank.named_parameters()}
    optimizer.zero_grad()
    bank(torch.ones(1, 15), kernels.plan_dispatch(torch.tensor([[2]]), 4)).sum().backward()
    for parameter in (bank.w, bank.b):
        parameter.grad[[0, 1, 3]] = torch.nan
    assert torch.isfinite(optimizer.gradient_norm())
    optimizer.step()
    for name in ("w", "b"):
        changed = (bank.get_parameter(name) != before[name]).flatten(1).any(1)
        assert changed.tolist() == [False, False, True, False]


def test_processes_agree_on_used_experts():
    """Two processes with other tokens each; gradients summed as fairseq does."""
    batches, rates = random_run(60)
    others, _ = random_run(60, seed=1)
    eager = Bank(5, torch.float64)
    banks = [Bank(5, torch.float64), Bank(5, torch.float64)]
    reference = torch.optim.AdamW(eager.parameters())
    optimizers = [optimizer_for(bank, "exact", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01) for bank in banks]
    for update, parts in enumerate(zip(batches, others, strict=True)):
        flags = []
        for bank, optimizer, [experts] in zip(banks, optimizers, parts, strict=True):
            optimizer.zero_grad()
            x = torch.full((len(experts), 15), update - 30.0, dtype=torch.float64)
            bank(x, kernels.plan_dispatch(torch.tensor(experts, dtype=torch.int64)[:, None], 5)).sum().backward()
            optimizer.share_used(lambda tensor, flags=flags: flags.append(tensor.clone()))
        for name, parameter in eager.named_parameters():
            total = sum(bank.get_parameter(name).grad for bank in banks)
            for bank in banks:
                bank.get_parameter(name).grad = total.clone()
            parameter.grad = total
        for optimizer in (*optimizers, reference):
            optimizer.param_groups[0]["lr"] = rates[update]
        for optimizer in optimizers:
            optimizer.share_used(lambda tensor, flags=flags: tensor.copy_(torch.maximum(*flags)))
            optimizer.step()
        reference.step()
    for name, value in eager.state_dict().items():
        assert torch.equal(banks[0].state_dict()[name], banks[1].state_dict()[name])
        assert_close(banks[0].state_dict()[name], value, rtol=0, atol=1e-9)


def test_lazy_leaves_unused_experts_where_they_are(backend):
    """It differs from exact by what momentum would do in a gap: at most C r / (1 - r) updates of size lr."""
    batches, rates = [[[0, 1]]] * 3 + [[[0]]] * 300, [0.01] * 303
    banks = [Bank(2, torch.float32), Bank(2, torch.float32)]
    for bank, updates in zip(banks, ("exact", "lazy"), strict=True):
        optimizer = optimizer_for(bank, updates, betas=(0.9, 0.98), eps=1e-8)
        train(bank, optimizer, batches[:3], rates[:3])
        if updates == "lazy":
            before = bank.w[1].clone()
        train(bank, optimizer, batches[3:], rates[3:], first=3)
    exact, lazy = (bank.state_dict()["w"] for bank in banks)
    assert torch.equal(lazy[1], before)
    assert_close(lazy[0], exact[0], rtol=0, atol=1e-6)
    ratio = 0.9 / 0.98**0.5
    young = 1.5  # bias correction of the first moments
    bound = young * 0.1 / (0.02 * (1 - ratio**2)) ** 0.5 * ratio / (1 - ratio) * 0.01
    assert 0.01 < (lazy[1] - exact[1]).abs().max() < bound


def test_a_bank_without_gradient_stands_still_and_half_a_one_is_refused():
    bank = Bank(3, torch.float32)
    optimizer = optimizer_for(bank, "exact")
    train(bank, optimizer, [[[0, 1]]], [0.1])
    before = bank.state_dict()["w"].clone()
    optimizer.zero_grad()
    bank.dense.grad = torch.ones(3)
    optimizer.step()  # as torch, which steps over parameters without gradient
    assert torch.equal(bank.state_dict()["w"], before)
    bank.w.grad = torch.zeros_like(bank.w)
    with pytest.raises(RuntimeError, match="freeze all or none"):
        optimizer.step()


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 70_000)), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=20)
def test_total_norm(sizes, dtype):
    generator = torch.Generator().manual_seed(len(sizes))
    pairs, squares = [], 0.0
    for number, (experts, elements) in enumerate(sizes):
        grad = torch.randn(experts, elements, generator=generator).to(dtype)
        listed = None if number % 2 else list(range(0, experts, 2))
        squares += (grad if listed is None else grad[listed]).double().square().sum()
        pairs.append((grad, listed))
    assert float(adamw_kernels.total_norm(pairs)) == pytest.approx(float(squares) ** 0.5, rel=1e-5)


def test_norm_of_many_elements_keeps_its_digits(backend):
    grad = torch.full((4, 1 << 20), 1.0)  # torch's own norm stops growing
    assert float(adamw_kernels.total_norm([(grad, [0, 1, 2, 3]), (grad, None)])) == pytest.approx(2**11.5, rel=1e-6)
