"""Master copies of weights, in the model's memory or the CPU's, against torch's AdamW on fp32 copies of all weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from reference.expert_bank import Bank, optimizer_for, random_run, runs, train, train_twice
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from mtmoe import kernels
from mtmoe.training import master_weights
from mtmoe.training.expert_adamw import ExpertAdamW

OPTIONS = {"weight_decay": 0.01, "betas": (0.9, 0.98)}


class OnCopies(torch.optim.AdamW):
    """The slow obvious way: all weights and gradients once more in fp32, all of them updated each time."""

    def __init__(self, params, **options):
        self.model = list(params)
        super().__init__([nn.Parameter(each.detach().float()) for each in self.model], **options)
        self.masters = self.param_groups[0]["params"]

    def zero_grad(self, set_to_none=True):
        for each in self.model:
            each.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for each, master in zip(self.model, self.masters, strict=True):
            master.grad = None if each.grad is None else each.grad.float()
        super().step()
        for each, master in zip(self.model, self.masters, strict=True):
            each.copy_(master)


def masters_of(bank, optimizer):
    states = optimizer.state_dict()["state"]
    return [states[number]["master"] for number, _ in enumerate(bank.parameters())]


@pytest.mark.parametrize("updates", ["dense", "exact"])
@pytest.mark.parametrize("offload", [False, True])
def test_masters_are_fp32_weights_and_the_model_has_them_rounded(updates, offload):
    if offload and updates == "dense":
        with pytest.raises(ValueError, match="offload_experts needs expert_updates='exact' or 'lazy'"):
            ExpertAdamW([nn.Parameter(torch.ones(2))], expert_updates="dense", offload_experts=True)
        return

    @given(run=runs(max_updates=15))
    @settings(max_examples=12)
    def check(run):
        num_experts, batches, rates, options, _ = run
        banks = [Bank(num_experts, torch.bfloat16), Bank(num_experts, torch.bfloat16)]
        reference = OnCopies(banks[0].parameters(), **options)
        optimizer = optimizer_for(banks[1], updates, master_weights=True, offload_experts=offload, **options)
        for bank, each in zip(banks, (reference, optimizer), strict=True):
            train(bank, each, batches, rates)
        if not any(optimizer.state.values()):
            return
        for expected, actual, weight in zip(
            reference.masters, masters_of(banks[1], optimizer), banks[1].parameters(), strict=True
        ):
            assert actual.dtype == torch.float32
            assert_close(actual, expected.detach(), rtol=0, atol=1e-5)
            assert torch.equal(weight, actual.bfloat16())

    check()


@pytest.mark.parametrize("updates", ["exact", "lazy"])
def test_offloading_changes_no_bit_and_no_checkpoint(updates):
    batches, rates = random_run(60)
    banks = [Bank(5, torch.float32), Bank(5, torch.float32)]
    optimizers = [optimizer_for(bank, updates, offload_experts=bank is banks[1], **OPTIONS) for bank in banks]
    for bank, optimizer in zip(banks, optimizers, strict=True):
        train(bank, optimizer, batches, rates, clip=0.5)
    expected, actual = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for name, value in banks[0].state_dict().items():
        assert torch.equal(banks[1].state_dict()[name], value), name
    for number, state in expected.items():
        assert state.keys() == actual[number].keys()  # fp32 weights are their own master copies
        assert all(torch.equal(v, actual[number][k]) for k, v in state.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(("dtype", "offload"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
@pytest.mark.parametrize("updates", ["exact", "lazy", "dense"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(updates, dtype, offload):
    offload = offload and updates != "dense"
    batches, rates = random_run(60)
    options = {"master_weights": True, "offload_experts": offload, **OPTIONS}
    (whole, optimizer), (broken, second) = train_twice(updates, dtype, batches, rates, (7, 30), options)
    for name, value in whole.state_dict().items():
        assert torch.equal(broken.state_dict()[name], value), name
    expected, actual = (each.state_dict()["state"] for each in (optimizer, second))
    for number, state in expected.items():
        assert state.keys() == actual[number].keys()
        assert all(torch.equal(v, actual[number][k]) for k, v in state.items() if isinstance(v, torch.Tensor))


def test_small_updates_add_up_only_in_a_master_copy():
    weights = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    for weight, master in zip(weights, (False, True), strict=True):
        optimizer = ExpertAdamW([weight], lr=1e-3, master_weights=master)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert torch.equal(weights[0], torch.ones(4, dtype=torch.bfloat16))  # 0.999 rounds to 1
    assert_close(weights[1].float(), torch.full((4,), 0.98), atol=4e-3, rtol=0)


def test_a_run_may_go_on_in_fp32_with_the_digits_of_the_master_copies():
    batches, rates = random_run(20)
    narrow, wide = Bank(5, torch.bfloat16), Bank(5, torch.float32)
    first = optimizer_for(narrow, "exact", master_weights=True, **OPTIONS)
    train(narrow, first, batches, rates)
    saved = copy.deepcopy(first.state_dict())
    wide.load_state_dict(narrow.state_dict())
    second = optimizer_for(wide, "exact", master_weights=True, **OPTIONS)
    second.load_state_dict(saved)
    for parameter, master in zip(wide.parameters(), masters_of(narrow, first), strict=True):
        assert torch.equal(parameter, master)
        assert "master" not in second.state[parameter]


def test_what_forgets_its_moments_keeps_its_weights():
    batches, rates = random_run(20)
    bank = Bank(5, torch.bfloat16)
    optimizer = optimizer_for(bank, "exact", master_weights=True, **OPTIONS)
    train(bank, optimizer, batches, rates)
    before = copy.deepcopy(masters_of(bank, optimizer))
    optimizer.forget()
    train(bank, optimizer, [[[]]], [0.0])
    for one, other in zip(before, masters_of(bank, optimizer), strict=True):
        assert torch.equal(one, other)
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_master_copies_of_a_state_dict_are_found_by_their_weights():
    batches, rates = random_run(3)
    for dtype in (torch.bfloat16, torch.float32):
        bank = Bank(5, dtype)
        optimizer = optimizer_for(bank, "exact", master_weights=True, **OPTIONS)
        train(bank, optimizer, batches, rates)
        copies = optimizer.master_copies(optimizer.state_dict())
        assert copies.keys() == (set(bank.parameters()) if dtype == torch.bfloat16 else set())
        assert all(torch.equal(copy.bfloat16(), weight) for weight, copy in copies.items())


# Another device: a type of tensor that refuses to meet one of the CPU other than in a copy, as a GPU's does.

COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
PLACES = (torch.ops.aten.empty_like.default, torch.ops.aten.zeros_like.default, torch.ops.aten._to_copy.default)


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta", requires_grad=False
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if function not in COPIES and any(type(each) is torch.Tensor and each.dim() for each in tensors):
            raise RuntimeError(f"{function} was given tensors of two devices")
        stays = not (function in PLACES and str(kwargs.get("device")) == "cpu")
        if str(kwargs.get("device")) == "meta":
            kwargs["device"] = torch.device("cpu")
        inner = tree_map(lambda each: each.inner if isinstance(each, Elsewhere) else each, (args, kwargs))
        result = function(*inner[0], **inner[1])
        if function is torch.ops.aten.copy_.default:
            return args[0]
        return tree_map(lambda each: Elsewhere(each) if isinstance(each, torch.Tensor) and stays else each, result)


def test_only_copies_of_used_experts_cross_to_and_from_another_device(monkeypatch):
    crossed = []
    for name in ("fetch", "publish"):
        original = getattr(master_weights, name)

        def counted(first, second, third, name=name, original=original):
            experts = second if name == "fetch" else third
            crossed.append((name, tuple(experts)))
            return original(first, second, third)

        monkeypatch.setattr(master_weights, name, counted)

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            values = Bank(4, torch.bfloat16)
            self.w, self.b = (nn.Parameter(Elsewhere(each.detach().clone())) for each in (values.w, values.b))

        def forward(self, x, plan):
            return None

    far, near = Far(), Bank(4, torch.bfloat16)
    with pytest.raises(RuntimeError, match="two devices"):
        far.w.data.add_(torch.ones(4, 9, 15))
    optimizers = []
    for module in (far, near):
        optimizer = ExpertAdamW([module.w, module.b], lr=0.01, master_weights=True, offload_experts=module is far)
        assert optimizer.watch(module, [module.w, module.b])
        optimizers.append(optimizer)
    refused = ExpertAdamW([far.w, far.b], master_weights=True)
    assert not refused.watch(far, [far.w, far.b])

    for update, experts in enumerate(([0, 1, 3], [1], [1, 2], [0, 3])):
        plan = kernels.plan_dispatch(torch.tensor(experts)[:, None], 4)
        generator = torch.Generator().manual_seed(update)
        gradients = [torch.randn(each.shape, generator=generator).bfloat16() for each in (near.w, near.b)]
        for module, optimizer in zip((far, near), optimizers, strict=True):
            optimizer.zero_grad()
            crossed.clear()
            for hook in module._forward_pre_hooks.values():
                hook(module, (None, plan))
            for parameter, gradient in zip((module.w, module.b), gradients, strict=True):
                parameter.grad = Elsewhere(gradient.clone()) if module is far else gradient.clone()
            behind = {expert for name, listed in crossed for expert in listed}
            assert behind <= set(experts)
            crossed.clear()
            optimizer.step(factor=0.5)
            assert crossed == [(name, tuple(experts)) for _ in range(2) for name in ("fetch", "publish")]
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for parameter, own in zip((far.w, far.b), (near.w, near.b), strict=True):
        assert torch.equal(parameter.detach().inner, own)
    for number, state in states[1].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert type(states[0][number][name]) is torch.Tensor  # it lies on the CPU
                assert torch.equal(states[0][number][name], value), name
