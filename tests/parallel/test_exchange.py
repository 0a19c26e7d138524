"""Collectives against what they say, in four processes: rows of every type, none at all, gradients, bytes by link."""

import pytest
import torch
from reference.world import run_world
from torch import Tensor

from mtmoe.errors import ConfigError
from mtmoe.parallel import ExpertParallel, Layout, build_groups, reduce_expert_gradients, total_norm

WORLD = 4


def start(rank: int, size: int, hosts: tuple[int, ...] | None = None, world: int = WORLD) -> ExpertParallel:
    return ExpertParallel(
        build_groups(Layout(world_size=world, expert_parallel_size=size, rank=rank, hosts=hosts))
    )


def rows_between(seed: int, ranks: int) -> list[list[int]]:
    """Rows from each rank to each; some none, and some ranks send or get nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (ranks, ranks), generator=generator)
    if seed % 3 == 1:
        counts[seed % ranks] = 0
    if seed % 3 == 2:
        counts[:, seed % ranks] = 0
    return (counts * (seed != 7)).tolist()


def value(source: int, target: int, row: int) -> float:
    return source * 16.0 + target * 4.0 + row


def exchange_rows(rank: int) -> None:
    parallel = start(rank, WORLD, hosts=(0, 0, 1, 1))
    for seed, dtype in enumerate([torch.float64, torch.float32, torch.bfloat16] * 3):
        counts = rows_between(seed, WORLD)
        send, receive = counts[rank], [row[rank] for row in counts]
        segments = parallel.whole.segments(torch.tensor([number for n in send for number in (n, 0)]))
        assert (segments.sent, segments.received) == (send, receive)
        assert segments.received_per_expert.tolist() == [[number, 0] for number in receive]
        x = torch.tensor([[value(rank, to, i)] * 3 for to in range(WORLD) for i in range(send[to])], dtype=dtype)
        x = x.view(-1, 3).requires_grad_()
        before = parallel.traffic.same_host, parallel.traffic.other_hosts, parallel.traffic.to_itself
        arrived = parallel.whole.exchange(x, send, receive)
        after = parallel.traffic.same_host, parallel.traffic.other_hosts, parallel.traffic.to_itself
        near = sum(send[to] for to in range(WORLD) if to // 2 == rank // 2 and to != rank)
        far = sum(send[to] for to in range(WORLD) if to // 2 != rank // 2)
        width = 3 * x.element_size()
        assert [b - a for a, b in zip(before, after, strict=True)] == [near * width, far * width, send[rank] * width]
        expected = [value(source, rank, i) for source in range(WORLD) for i in range(receive[source])]
        assert arrived[:, 1].tolist() == expected
        arrived.backward(arrived.detach() * 2)
        assert torch.equal(x.grad, 2 * x.detach())
    assert parallel.traffic.calls == 18


def test_rows_arrive_and_gradients_come_back_and_bytes_are_counted():
    run_world(WORLD, exchange_rows)


def sums_and_gradients(rank: int) -> None:
    parallel = start(rank, 2)
    x = torch.tensor([1.0, 2.0], dtype=torch.float32).mul(rank + 1).requires_grad_()
    count = torch.tensor(2**40 + rank)
    total, number = parallel.sum(x.square(), count)
    assert total.tolist() == [30.0, 120.0] and total.dtype == torch.float32
    assert int(number) == WORLD * 2**40 + 6
    # Each rank's loss weighs the sum in its own way; the gradient is that of all losses together: weights add up.
    ((rank + 1) * total).sum().backward()
    assert torch.equal(x.grad, 10 * 2 * x.detach())


def test_sums_have_the_gradient_of_all_ranks_losses():
    run_world(WORLD, sums_and_gradients)


def expert_gradients(rank: int) -> None:
    parallel = start(rank, 2)
    shared: list[Tensor] = []
    for scale, factor in (("world_size", 1 / 4), ("sqrt_world_size", 2**0.5 / 4)):
        weight = torch.nn.Parameter(torch.zeros(3))
        unused = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.full((3,), float(10**rank))
        reduce_expert_gradients([weight, unused], parallel, scale)
        assert torch.allclose(weight.grad, torch.full((3,), factor * (101.0 if rank % 2 == 0 else 1010.0)))
        assert torch.equal(unused.grad, torch.zeros(2))
        shared.append(weight.grad)
    norm = total_norm(torch.tensor(3.0), torch.tensor(4.0 if rank % 2 else 12.0), parallel)
    assert float(norm) == 13.0
    with pytest.raises(ValueError, match="scale='cube' is unknown; choose one of: world_size, sqrt_world_size"):
        reduce_expert_gradients([], parallel, "cube")
    gathered = parallel.gather_experts(torch.tensor([[rank, 0], [rank, 1]]))
    first = rank // 2 * 2
    expected = [[first, 0], [first, 1], [first + 1, 0], [first + 1, 1]]
    assert (gathered is None) if rank % 2 else (gathered.tolist() == expected)


def test_expert_gradients_are_those_of_the_data_parallel_group_and_the_norm_that_of_the_model():
    run_world(WORLD, expert_gradients)


def wrong_worlds(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"the layout is for rank \d of 8, torch\.distributed says \d of 2"):
        start(rank, 2, world=8)


def test_a_layout_of_another_world_is_refused():
    run_world(2, wrong_worlds)
    with pytest.raises(ConfigError, match=r"needs torch\.distributed: start the processes with torchrun or Slurm"):
        start(0, 1)


def hang(rank: int) -> None:
    if rank:
        torch.distributed.barrier()


def test_the_test_world_itself_reports_a_rank_that_waits_for_ever():
    with pytest.raises(AssertionError, match=r"are not done|[Tt]imed out|rank 1"):
        run_world(2, hang, seconds=3)
