"""Ways to send less, or while something else is done: experts get the same rows, and what is sent is counted."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
from reference.cases import make_case
from reference.compare import assert_close
from reference.layouts import SEED, UPDATE, Batch, compare, draw_batch, one_process, start
from reference.world import run_world
from torch import Tensor
from torch.autograd import Function

from mtmoe import kernels
from mtmoe.kernels import reference as plain_kernels
from mtmoe.kernels.plan import plan_on_device
from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.experts import ExpertBank
from mtmoe.moe.keyed import DrawKeys
from mtmoe.moe.routing import RoutingDecision
from mtmoe.moe.sharding import ShardedExperts
from mtmoe.parallel.exchange import Exchange

WORLD, WIDTH, LOCAL = 4, 6, 2
HOSTS = (0, 0, 1, 1)
WAYS = {
    "one step": {"hosts": HOSTS},
    "two steps": {"hosts": HOSTS, "hierarchical": True},
    "two steps, a rank a host": {"hosts": (0, 1, 2, 3), "hierarchical": True},
    "two steps, one host": {"hosts": (0, 0, 0, 0), "hierarchical": True},
}


def drawn_decision(rank: int, top_k: int, seed: int, nodes: int) -> tuple[Tensor, RoutingDecision]:
    """Tokens of a rank, some with choices taken away; with `nodes` all choices of a token are on one of them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = [0, 1, 9, 14][(rank + seed) % 4]
    experts = WORLD * LOCAL
    if nodes:
        inside = torch.rand(tokens, experts // nodes, generator=generator).argsort(dim=1)[:, :top_k]
        index = inside + torch.randint(0, nodes, (tokens, 1), generator=generator) * (experts // nodes)
    else:
        index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    gone = torch.rand(tokens, top_k, generator=generator) < 0.2
    weight = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).masked_fill(gone, 0)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x, RoutingDecision(index.masked_fill(gone, -1), weight.requires_grad_(), torch.empty(0), {})


# Two steps


class Scaling:
    """Stands for experts: multiplies a row by the number of its expert, and keeps what it saw. Exact, in any order."""

    def __init__(self, local: range) -> None:
        self.local, self.seen = local, {}

    def __call__(self, rows, plan):
        ends = plan.offsets.tolist()
        for place, expert in enumerate(self.local):
            self.seen[expert] = sorted(rows[ends[place] : ends[place + 1]].tolist())
        numbers = torch.arange(self.local.start + 1, self.local.stop + 1).repeat_interleave(plan.tokens_per_expert)
        return rows * numbers[:, None]


def same_rows(rank: int) -> None:
    config = MoEConfig(d_model=WIDTH, d_ffn=1, num_experts=WORLD * LOCAL)
    links = {name: start(rank, WORLD, **options) for name, options in WAYS.items()}
    for seed in range(4):
        for top_k, nodes in ((1, 0), (1, 2), (3, 2), (3, 0)):
            x, decision = drawn_decision(rank, top_k, seed, nodes)
            found = {}
            for name, parallel in links.items():
                sharded = ShardedExperts(config, parallel)
                experts = Scaling(sharded.local)
                inputs = x.clone().requires_grad_(), decision.weight
                y = sharded.run(inputs[0], decision, experts, stays=False)
                gradients = torch.autograd.grad((y * y.detach().cos()).sum(), inputs)
                found[name] = experts.seen, (y, *gradients)
            seen, expected = found["one step"]
            for name, (rows, tensors) in found.items():
                assert rows == seen, name
                for tensor, value in zip(tensors, expected, strict=True):
                    # Sums over the hosts of a token are in another order; where it has one host there are none.
                    assert_close(tensor, value, torch.float64, name)
                    assert torch.equal(tensor, value) or top_k == 3


def test_two_steps_bring_each_expert_the_rows_of_one():
    run_world(WORLD, same_rows)


def compare_ways(rank: int, batches: list[tuple[Batch, tuple]], overlap: bool) -> None:
    for name, options in WAYS.items():
        parallel = start(rank, WORLD, overlap=overlap, **options)
        for number, (batch, expected) in enumerate(batches):
            try:
                compare(rank, parallel, batch, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}, batch {number}: {error}\n{batch.config}") from error


@pytest.mark.parametrize(("dtype", "overlap"), [(torch.float64, False), (torch.float64, True), (torch.float32, True)])
def test_every_way_equals_one_process(dtype, overlap):
    generator = random.Random(5)
    batches = [draw_batch(generator, WORLD, dtype, nodes=nodes) for nodes in (0, 0, 2, 2, 4)]
    run_world(WORLD, compare_ways, [(batch, one_process(batch)) for batch in batches], overlap)


def test_every_way_with_plans_of_a_gpu_whose_unrouted_rows_stay_at_home(monkeypatch):
    monkeypatch.setattr(kernels, "plan_dispatch", plan_on_device)
    monkeypatch.setattr(kernels, "load_backend", lambda name, device: plain_kernels)
    generator = random.Random(6)
    batches = [draw_batch(generator, WORLD, torch.float64, nodes=nodes) for nodes in (0, 2)]
    assert all(batch.padding.any() or batch.config.eom for batch in batches)
    run_world(WORLD, compare_ways, [(batch, one_process(batch)) for batch in batches], True)


# Bytes


def traffic_of(parallel) -> tuple[int, int, int]:
    traffic = parallel.traffic
    return traffic.to_itself, traffic.same_host, traffic.other_hosts


def counted(rank: int) -> None:
    """One way of one step, against counting the pairs of tokens and experts, or of tokens and hosts, one by one."""
    config = MoEConfig(d_model=WIDTH, d_ffn=1, num_experts=WORLD * LOCAL)
    for payload, size in ((None, 8), (torch.bfloat16, 2)):
        for top_k, nodes in ((1, 0), (3, 2), (3, 0)):
            x, decision = drawn_decision(rank, top_k, 2, nodes)
            row = WIDTH * size
            owners = [{(t, e) for e in row_ if e >= 0} for t, row_ in enumerate(decision.expert_index.tolist())]
            pairs = sorted(set().union(*owners))
            flat = start(rank, WORLD, hosts=HOSTS, payload=payload)
            with torch.no_grad():
                ShardedExperts(config, flat).run(x, decision, lambda rows, plan: rows * 1, stays=False)
            expected = [0, 0, 0]
            for _, expert in pairs:
                owner = expert // LOCAL
                expected[0 if owner == rank else 1 if HOSTS[owner] == HOSTS[rank] else 2] += row
            # The outputs that this rank returned to others are their rows that it got: counted by all ranks together.
            sent = torch.tensor(traffic_of(flat))
            torch.distributed.all_reduce(sent)
            twice = 2 * torch.tensor(expected)
            torch.distributed.all_reduce(twice)
            assert torch.equal(sent, twice)

            by_hosts = start(rank, WORLD, hosts=HOSTS, hierarchical=True, payload=payload)
            with torch.no_grad():
                ShardedExperts(config, by_hosts).run(x, decision, lambda rows, plan: rows * 1, stays=False)
            hosts = {(token, HOSTS[expert // LOCAL]) for token, expert in pairs}
            far = sum(host != HOSTS[rank] for _, host in hosts) * (2 * row + top_k * (4 + 8))
            far = torch.tensor(far)
            torch.distributed.all_reduce(far)
            sent = torch.tensor(traffic_of(by_hosts)[2])
            torch.distributed.all_reduce(sent)
            assert int(sent) == int(far)


def test_a_token_crosses_once_to_a_host_and_bytes_are_those_of_the_payload():
    run_world(WORLD, counted)


def closed_gates(rank: int) -> None:
    config = MoEConfig(d_model=WIDTH, d_ffn=3, num_experts=4, cmr=True, cmr_gate_drop=0.4, eom=0.3)
    parallel = start(rank, 2)
    layer = MoELayer(config, parallel=parallel).train()
    keys = DrawKeys(SEED, UPDATE, 0, torch.arange(40) + 100 * rank)
    output = layer(torch.randn(40, WIDTH, requires_grad=True), keys=keys)
    output.y.sum().backward()
    closed = keys.uniform("cmr", 1) < 0.4
    left = int(((keys.uniform("eom", 2) >= 0.3) & ~closed).sum())
    assert 0 < left < int((~closed).sum()) * 2
    sent = torch.tensor([sum(traffic_of(parallel)), 4 * left * WIDTH * 4])
    torch.distributed.all_reduce(sent)
    assert int(sent[0]) == int(sent[1])  # there and back, forward and backward


def test_tokens_whose_gate_is_closed_send_nothing():
    run_world(2, closed_gates)


# Payloads in bf16


class Rounded(Function):
    """To bf16 and back, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(torch.bfloat16).to(grad.dtype)


def slow_run(x: Tensor, decision: RoutingDecision, bank: ExpertBank, host_of: list[int] | None) -> Tensor:
    """Token by token: round where a row is sent, to an expert and back, or to a host, to an expert, and back twice."""

    def expert(number: int, row: Tensor) -> Tensor:
        hidden = torch.relu(bank.w_in[number] @ Rounded.apply(row) + bank.b_in[number])
        return Rounded.apply(bank.w_out[number] @ hidden + bank.b_out[number])

    rows = []
    for token, numbers in enumerate(decision.expert_index.tolist()):
        pairs = [(number, decision.weight[token, i]) for i, number in enumerate(numbers) if number >= 0]
        y = torch.zeros_like(x[token])
        if host_of is None:
            for number, weight in pairs:
                y = y + weight * expert(number, x[token])
        else:
            for host in sorted({host_of[number // LOCAL] for number, _ in pairs}):
                there, part = Rounded.apply(x[token]), torch.zeros_like(y)
                for number, weight in pairs:
                    if host_of[number // LOCAL] == host:
                        part = part + weight * expert(number, there)
                y = y + Rounded.apply(part)
        rows.append(y)
    return torch.stack(rows) if rows else x * 0


def rounded(rank: int, payload: torch.dtype | None) -> None:
    config = MoEConfig(d_model=WIDTH, d_ffn=5, num_experts=WORLD * LOCAL)
    torch.manual_seed(3)
    whole = ExpertBank(config).double()
    for hierarchical in (False, True):
        parallel = start(rank, WORLD, hosts=HOSTS, hierarchical=hierarchical, payload=payload)
        sharded = ShardedExperts(config, parallel)
        for seed in range(3):
            for top_k, nodes in ((1, 2), (3, 2), (3, 0)):
                bank = ExpertBank(config, local=sharded.local).double()
                bank.load_state_dict(whole.state_dict())
                total = {}
                for source in range(WORLD):  # all ranks' tokens, whose gradients this rank's experts get
                    x, decision = drawn_decision(source, top_k, seed, nodes)
                    x.requires_grad_()
                    y = slow_run(x, decision, whole, HOSTS if hierarchical else None)
                    inputs = [x, decision.weight, *whole.parameters()]
                    loss = (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
                    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
                    for i, grad in enumerate(found[2:]):
                        total[i] = total.get(i, 0) + grad[sharded.local.start : sharded.local.stop]
                    if source == rank:
                        mine, expected = (x, decision), (y, *found[:2])
                x, decision = mine
                y = sharded.run(x, decision, bank, stays=False)
                loss = (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
                found = torch.autograd.grad(loss, [x, decision.weight, *bank.parameters()])
                for actual, value in zip((y, *found), (*expected, *total.values()), strict=True):
                    assert_close(actual, value, torch.float64)


def test_rows_and_gradients_in_bf16_are_rounded_where_they_are_sent():
    run_world(WORLD, rounded, torch.bfloat16)


def test_the_slow_run_without_rounding_is_another():
    with pytest.raises(AssertionError, match="off by"):
        run_world(WORLD, rounded, None)


# Overlap


def one_step(rank: int, config: MoEConfig, autocast: bool, **options) -> dict[str, Tensor]:
    """Everything that a step of one layer finds on a rank, ordinary dropout included."""
    parallel = start(rank, WORLD, hosts=HOSTS, **options)
    case = make_case(config, [7, 0, 12, 5][rank], "random", seed=rank)
    layer = MoELayer(config, parallel=parallel).train()
    layer.load_state_dict(make_case(config, 1, seed=9).layer.float().state_dict())
    x = case.x.float().requires_grad_()
    torch.manual_seed(rank)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x, case.padding, keys=DrawKeys(SEED, UPDATE, 0, torch.arange(len(x)) + 100 * rank))
    total = (output.y.float() * case.direction).sum() + sum(output.losses.values()) + output.statistics.cmr_gate_sum
    total.backward()
    gradients = {name: each.grad for name, each in layer.named_parameters()}
    return {"y": output.y.detach(), "d x": x.grad, **output.losses, **gradients}


def same_bits(rank: int) -> None:
    options = {"d_model": 6, "d_ffn": 8, "num_experts": 8, "cmr": True, "cmr_gate_drop": 0.2, "eom": 0.2}
    for activation in ("relu", "gelu"):
        config = MoEConfig(**options, activation=activation, dropout=0.2, activation_dropout=0.1)
        for autocast in (False, True):
            for hierarchical in (False, True):
                plain = one_step(rank, config, autocast, hierarchical=hierarchical)
                overlapped = one_step(rank, config, autocast, hierarchical=hierarchical, overlap=True)
                for name, value in plain.items():
                    assert torch.equal(overlapped[name], value), (name, activation, autocast, hierarchical)


def test_overlap_changes_no_bit():
    run_world(WORLD, same_bits)


def order_of_events(rank: int, overlap: bool) -> list[str]:
    """When rows set out and are awaited, and when the shared network runs, in one step of a layer."""
    config = MoEConfig(d_model=6, d_ffn=8, num_experts=4, cmr=True)
    layer = MoELayer(config, parallel=start(rank, 2, overlap=overlap))
    shared, events = layer.conditional.shared, []
    start_rows, wait = Exchange.start, Exchange.wait
    Exchange.start = lambda *args, **kwargs: (events.append("start"), start_rows(*args, **kwargs))[1]
    Exchange.wait = lambda exchange: (events.append("wait"), wait(exchange))[1]
    halves = shared.in_two_steps

    def watched(x):
        for half in halves(x):
            events.append("half")
            yield half

    shared.in_two_steps = watched
    for parameter in (shared.fc1.weight, shared.fc2.weight):
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("half"))
    layer(torch.randn(5, 6, requires_grad=True)).y.sum().backward()
    return events


def test_halves_of_the_shared_network_run_while_rows_travel_in_forward_and_backward():
    apart, overlapped = ["start", "wait", "half"] * 2, ["start", "half", "wait"] * 2
    for events in run_world(2, order_of_events, True):
        assert events == overlapped * 2
    for events in run_world(2, order_of_events, False):
        assert events[:6] == apart


def freed(rank: int) -> None:
    parallel = start(rank, 2)
    gc.disable()
    arrived = parallel.whole.exchange(torch.randn(4, 3, requires_grad=True), [2, 2], [2, 2])
    beginning = weakref.ref(arrived.grad_fn.next_functions[0][0])
    assert beginning() is not None
    del arrived
    assert beginning() is None


def test_an_exchange_without_backward_leaves_nothing_behind():
    run_world(2, freed)


# Training options


def test_a_batch_of_bilevel_gates_uses_them():
    batch = draw_batch(random.Random(1), WORLD, torch.float64, nodes=2)
    assert (batch.config.gate, batch.config.node_experts) == ("bilevel", batch.config.num_experts // 2)
    assert {"node_balance", "inner_balance"} <= one_process(replace(batch, recompute=False))[0].keys()
