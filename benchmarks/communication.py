"""Count the bytes that a MoE layer's exchange of rows sends, by link, under each method that saves some.

Real processes over gloo run one layer forward and backward; hosts are emulated by the layout's map of ranks to hosts.
Bytes are counted where they are handed to the all-to-all. Gates are as drawn, on random tokens, so routing is nearly
even: what training does to it is not in here. Nothing is timed.

    OMP_NUM_THREADS=1 python -m benchmarks.communication --hosts 0,0,1,1
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.keyed import DrawKeys
from mtmoe.parallel import ExpertParallel, Layout, build_groups

TOP_1 = {"top_k": 1, "normalize_weights": "none"}
TWO_STEPS = {"hierarchical": True}
BF16 = {"payload": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """A method under a name."""

    name: str
    layer: dict[str, Any] = field(default_factory=dict)
    """Fields of MoEConfig."""
    exchange: dict[str, Any] = field(default_factory=dict)
    """``hierarchical`` and ``payload``."""


@dataclass(frozen=True)
class Row:
    """What all ranks together sent in an update, on average; in bytes."""

    name: str
    same_host: float
    """To other ranks of the sender's host."""
    other_hosts: float
    """To ranks of other hosts."""


def ways(nodes: int) -> list[Way]:
    """What is compared; the first is what shares are of."""
    bilevel = {"gate": "bilevel", "expert_nodes": nodes, "normalize_weights": "none"}
    return [
        Way("top-2"),
        Way("top-2, two steps", {}, TWO_STEPS),
        Way("top-2, bf16 payload", {}, BF16),
        Way("top-2, EOM 0.2", {"eom": 0.2}),
        Way("top-2, CMR, gates not dropped", {"cmr": True}),
        Way("top-2, CMR, gate dropout 0.2", {"cmr": True, "cmr_gate_drop": 0.2}),
        Way("top-2, gating dropout 0.3", {"gating_dropout": 0.3}),
        Way("top-1", TOP_1),
        Way("bilevel, top-1", bilevel | TOP_1),
        Way("bilevel, top-1, two steps", bilevel | TOP_1, TWO_STEPS),
        Way("bilevel, top-2", bilevel),
        Way("bilevel, top-2, two steps", bilevel, TWO_STEPS),
        Way("bilevel, top-2, two steps, bf16 payload", bilevel, TWO_STEPS | BF16),
    ]


def sent(args: argparse.Namespace, rank: int, way: Way) -> Row:
    """Run a layer for some updates, and add up over ranks what it sent."""
    layout = Layout(
        world_size=len(args.hosts), expert_parallel_size=len(args.hosts), rank=rank, hosts=tuple(args.hosts)
    )
    parallel = ExpertParallel(
        build_groups(layout, hierarchical=way.exchange.get("hierarchical", False)), way.exchange.get("payload")
    )
    torch.manual_seed(args.seed)
    config = MoEConfig(d_model=args.d_model, d_ffn=args.d_model, num_experts=args.experts)
    layer = MoELayer(replace(config, **way.layer), parallel=parallel).train()
    generator = torch.Generator().manual_seed(args.seed + 1 + rank)
    for update in range(args.updates):
        x = torch.randn(args.tokens, args.d_model, generator=generator).requires_grad_()
        keys = DrawKeys(args.seed, update, 0, torch.arange(args.tokens) + rank * args.tokens)
        layer(x, keys=keys).y.sum().backward()
    total = torch.tensor([parallel.traffic.same_host, parallel.traffic.other_hosts], dtype=torch.int64)
    distributed.all_reduce(total)
    same_host, other_hosts = (total.double() / args.updates).tolist()
    return Row(way.name, same_host, other_hosts)


def run_rank(rank: int, args: argparse.Namespace, store: Path, rows: Any) -> None:
    """One process of the world; the first hands over the rows."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=len(args.hosts), timeout=timedelta(minutes=5)
    )
    found = [sent(args, rank, way) for way in ways(len(set(args.hosts)))]
    if rank == 0:
        rows.put(found)
    distributed.barrier()
    distributed.destroy_process_group()


def measure(args: argparse.Namespace) -> list[Row]:
    """All ways, one after the other, in processes that end with this call."""
    context = multiprocessing.get_context("fork")
    rows = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            run_rank, (args, Path(folder) / "store", rows), nprocs=len(args.hosts), start_method="fork"
        )
        return rows.get()  # type: ignore[no-any-return]


def table(rows: list[Row]) -> str:
    """Markdown; shares are of the first row."""
    lines = ["| | same host, MB | other hosts, MB | share | all links, share |", "|---|---:|---:|---:|---:|"]
    first = rows[0]
    for row in rows:
        far = row.other_hosts / first.other_hosts
        whole = (row.other_hosts + row.same_host) / (first.other_hosts + first.same_host)
        lines.append(
            f"| {row.name} | {row.same_host / 1e6:.2f} | {row.other_hosts / 1e6:.2f} | {far:.2f} | {whole:.2f} |"
        )
    return "\n".join(lines)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="0,0,1,1", help="host of each rank, two at least (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a rank (default: %(default)s)")
    parser.add_argument("--d-model", type=int, default=128, help="width of a token (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="experts over all ranks (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=400, help="forward and backward passes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, tokens and draws (default: %(default)s)")
    args = parser.parse_args(words)
    args.hosts = [int(host) for host in args.hosts.split(",")]
    if len(set(args.hosts)) < 2:
        parser.error("--hosts names one host, so nothing goes to others; name two at least, such as 0,0,1,1")
    return args


if __name__ == "__main__":
    print(table(measure(parse())))
