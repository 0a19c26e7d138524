"""Time the MoE layer against a dense feed-forward network of the same FLOPs, forward and backward.

Both run alternately in one process, so that a change of the machine's speed meets both alike; compare ratios, not
milliseconds. The layers compute the same function here (every expert holds the dense network's weights), and their
outputs are compared before anything is timed.

    OMP_NUM_THREADS=2 python benchmarks/layer.py --experts 8,32,128 --tokens 2048 --d-model 512 --d-ffn 2048
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mtmoe.files import write_json
from mtmoe.moe import MoEConfig, MoELayer


class SameFlops(nn.Module):
    """The dense network applied `top_k` times: what a token's experts cost without any routing."""

    def __init__(self, d_model: int, d_ffn: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.fc1, self.fc2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, d_model) -> (tokens, d_model): the mean of `top_k` equal passes, as the gate's weights sum to 1."""
        x = x.repeat(self.top_k, 1)
        return self.fc2(torch.relu(self.fc1(x))).view(self.top_k, -1, x.shape[1]).mean(0)


def make_pair(config: MoEConfig) -> tuple[MoELayer, SameFlops]:
    """A MoE layer and the dense network that all its experts are copies of."""
    sparse, dense = MoELayer(config), SameFlops(config.d_model, config.d_ffn, config.top_k)
    with torch.no_grad():
        for stacked, single in (
            (sparse.experts.w_in, dense.fc1.weight),
            (sparse.experts.b_in, dense.fc1.bias),
            (sparse.experts.w_out, dense.fc2.weight),
            (sparse.experts.b_out, dense.fc2.bias),
        ):
            stacked.copy_(single.expand_as(stacked))
    return sparse, dense


def one_pass(layer: Callable[[Tensor], Tensor], x: Tensor, autocast: bool) -> Tensor:
    """Forward and backward, gradients of inputs and weights included."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().square().mean().backward()
    return y.detach()


def measure(args: argparse.Namespace, experts: int, autocast: bool) -> dict[str, object]:
    """Median times of both, in alternating rounds."""
    config = MoEConfig(d_model=args.d_model, d_ffn=args.d_ffn, num_experts=experts, top_k=args.top_k)
    torch.manual_seed(args.seed)
    sparse, dense = make_pair(config)
    x = torch.randn(args.tokens, args.d_model, requires_grad=True)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"moe": lambda x: sparse(x).y, "dense": dense}
    outputs = {name: one_pass(run, x, autocast) for name, run in runs.items()}
    tolerance = 0.05 if autocast else 1e-4
    torch.testing.assert_close(outputs["moe"].float(), outputs["dense"].float(), atol=tolerance, rtol=tolerance)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.warmup + args.rounds):
        for name, run in runs.items():
            for module in (sparse, dense):
                module.zero_grad()
            started = time.perf_counter()
            one_pass(run, x, autocast)
            if turn >= args.warmup:
                times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "experts": experts,
        "dtype": "bf16 autocast" if autocast else "fp32",
        "moe_ms": round(medians["moe"], 2),
        "dense_ms": round(medians["dense"], 2),
        "ratio": round(medians["moe"] / medians["dense"], 3),
    }


def main() -> int:
    """Parse, measure, print a table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="8,32", help="numbers of experts, with commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a batch (default: %(default)s)")
    parser.add_argument("--d-model", type=int, default=512, help="width of a token (default: %(default)s)")
    parser.add_argument("--d-ffn", type=int, default=2048, help="width inside an expert (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="rounds before those (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    print(f"{args.tokens} tokens, d_model {args.d_model}, d_ffn {args.d_ffn}, top-{args.top_k}, forward + backward")
    print(f"{torch.get_num_threads()} threads, median of {args.rounds} alternating rounds")
    print(f"{'experts':>8} {'type':>14} {'MoE':>10} {'dense':>10} {'MoE / dense':>12}")
    rows = []
    for autocast in (True, False):
        for experts in (int(word) for word in args.experts.split(",")):
            row = measure(args, experts, autocast)
            rows.append(row)
            times = f"{row['moe_ms']:>7} ms {row['dense_ms']:>7} ms"
            print(f"{row['experts']:>8} {row['dtype']:>14} {times} {row['ratio']:>12}")
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        write_json(args.output, {"settings": settings, "threads": torch.get_num_threads(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
