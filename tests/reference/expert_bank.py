"""A bank of experts without a model around it, and short trainings of it by any optimiser."""

import copy
import itertools

import torch
from hypothesis import strategies as st
from torch import nn

from mtmoe import kernels
from mtmoe.training.expert_adamw import ExpertAdamW


class Bank(nn.Module):
    """Stacked matrices and vectors of experts, and a weight that every update uses."""

    def __init__(self, num_experts, dtype, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(num_experts, 9, 15, generator=generator, dtype=torch.float64).to(dtype))
        self.b = nn.Parameter(torch.randn(num_experts, 9, generator=generator, dtype=torch.float64).to(dtype))
        self.dense = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, x, plan):
        return kernels.grouped_linear(x, plan, self.w, self.b) + self.dense.sum()


def optimizer_for(bank, updates, **options):
    if updates == "eager":
        return torch.optim.AdamW(bank.parameters(), **options)
    optimizer = ExpertAdamW(bank.parameters(), expert_updates=updates, **options)
    assert optimizer.watch(bank, [bank.w, bank.b]) == (updates != "dense")
    return optimizer


def train(bank, optimizer, batches, learning_rates, clip=0.0, first=0):
    """One update a list of micro-batches, each a list of used experts; returns the norms."""
    norms = []
    for update, (micro_batches, lr) in enumerate(zip(batches, learning_rates, strict=True), first):
        generator = torch.Generator().manual_seed(update)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        for experts in micro_batches:
            index = torch.tensor(experts, dtype=torch.int64).repeat_interleave(2)[:, None]
            x = torch.randn(len(index), 15, generator=generator, dtype=torch.float64).to(bank.w.dtype)
            plan = kernels.plan_dispatch(index, len(bank.w))
            # Linear: a gradient does not depend on the weights, so that rounding does not add up to another training.
            y = bank(x, plan)
            weight = torch.randn(y.shape, generator=generator, dtype=torch.float64) * 10.0 ** (update % 5 - 3)
            (y * weight.to(y.dtype)).sum().backward()
        if isinstance(optimizer, ExpertAdamW):
            norm = optimizer.gradient_norm()
            optimizer.step(factor=(clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0)
        else:
            norm = nn.utils.clip_grad_norm_(bank.parameters(), clip or float("inf"))
            optimizer.step()
        norms.append(norm)
    return norms


def train_twice(updates, dtype, batches, rates, stops, options):
    """The same training unbroken, and stopped after some updates, each time going on with objects made anew.

    Returns:
        Bank and optimiser of the unbroken one, and of the other.
    """
    whole = Bank(5, dtype)
    optimizer = optimizer_for(whole, updates, **options)
    train(whole, optimizer, batches, rates)
    broken = Bank(5, dtype)
    second = optimizer_for(broken, updates, **options)
    for start, end in itertools.pairwise([0, *stops, len(batches)]):
        train(broken, second, batches[start:end], rates[start:end], first=start)
        saved = copy.deepcopy((broken.state_dict(), second.state_dict()))
        broken = Bank(5, dtype, seed=1)
        broken.load_state_dict(saved[0])
        second = ExpertAdamW(broken.parameters(), expert_updates=updates, **options)
        # fairseq loads before the first update tells which weights are experts; others may load later.
        early = end % 2
        if early:
            second.load_state_dict(saved[1])
        second.watch(broken, [broken.w, broken.b])
        if not early:
            second.load_state_dict(saved[1])
    return (whole, optimizer), (broken, second)


@st.composite
def runs(draw, max_updates=40):
    num_experts = draw(st.integers(1, 6))
    used = st.lists(st.integers(0, num_experts - 1), max_size=num_experts, unique=True)
    batches = draw(st.lists(st.lists(used, min_size=1, max_size=2), min_size=1, max_size=max_updates))
    rates = draw(st.lists(st.sampled_from([0.0, 1e-4, 1e-3, 1e-2]), min_size=len(batches), max_size=len(batches)))
    options = {"betas": draw(st.sampled_from([(0.9, 0.98), (0.9, 0.999), (0.5, 0.9), (0.0, 0.9)]))}
    options["weight_decay"] = draw(st.sampled_from([0.0, 0.1]))
    options["eps"] = draw(st.sampled_from([1e-6, 1e-3]))
    return num_experts, batches, rates, options, draw(st.sampled_from([0.0, 0.5]))


def random_run(updates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(updates, 5, generator=generator) < torch.tensor([0.9, 0.3, 0.1, 0.03, 0.0])
    return [[row.nonzero()[:, 0].tolist()] for row in chosen], [1e-3 * (1 + update % 7) for update in range(updates)]
