"""Time AdamW over a bank of experts of which an update touches only some, gradient norm included.

Dense is torch's fused kernel over all experts; exact lets untouched experts wait and makes up for their updates when
they are next used, so it includes the catching up before a forward pass; lazy leaves them as they are. Each computes
the norm, clips and updates; all see the same experts, drawn anew for each update. Modes alternate; compare ratios.

    OMP_NUM_THREADS=2 python benchmarks/optimiser.py --experts 8,32,128 --share 1,0.5,0.1
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from torch import nn

from mtmoe.kernels.extension import available
from mtmoe.training.expert_adamw import EXPERT_UPDATES, ExpertAdamW


class Bank(nn.Module):
    """Weights of the size of a MoE layer's experts, whose gradients are given."""

    def __init__(self, experts: int, d_model: int, d_ffn: int, grads: list[torch.Tensor]) -> None:
        super().__init__()
        shapes = [(experts, d_ffn, d_model), (experts, d_ffn), (experts, d_model, d_ffn), (experts, d_model)]
        self.stacked = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        for parameter, grad in zip(self.stacked, grads or map(torch.randn, shapes), strict=True):
            parameter.grad = grad

    def forward(self, x: object, plan: object) -> None:
        """Only tell the optimiser which experts are used."""


def one_update(bank: Bank, optimizer: ExpertAdamW, plan: SimpleNamespace) -> float:
    """Milliseconds of catching up, norm, clipping and update."""
    started = time.perf_counter()
    bank(None, plan)
    norm = optimizer.gradient_norm()
    optimizer.step(factor=(1.0 / (norm + 1e-6)).clamp(max=1.0))
    elapsed = 1e3 * (time.perf_counter() - started)
    for each in optimizer._banks:  # as zero_grad, which would forget the gradients that all modes share
        each.used.clear()
    return elapsed


def measure(args: argparse.Namespace, experts: int, share: float) -> dict[str, float]:
    """Mean milliseconds of an update in each mode, and of torch's norm with a fused step alone as ``norm``."""
    torch.manual_seed(args.seed)
    grads: list[torch.Tensor] = []
    runs = {}
    for mode in EXPERT_UPDATES:
        bank = Bank(experts, args.d_model, args.d_ffn, grads)
        grads = [parameter.grad for parameter in bank.stacked]
        optimizer = ExpertAdamW(bank.parameters(), expert_updates=mode)
        optimizer.watch(bank, list(bank.stacked))
        runs[mode] = (bank, optimizer)
    times: dict[str, list[float]] = {mode: [] for mode in (*runs, "norm", "torch norm")}
    for turn in range(args.warmup + args.rounds):
        # The first updates touch all, so that each expert has a momentum to catch up.
        used = torch.randperm(experts)[: max(1, round(share * experts))].sort()[0].tolist() if turn else range(experts)
        plan = SimpleNamespace(segments=tuple((expert, 0, 1) for expert in used))
        sample = {mode: one_update(*run, plan) for mode, run in runs.items()}
        for name, norm in (("norm", runs["dense"][1].gradient_norm), ("torch norm", lambda: total_norm(grads))):
            started = time.perf_counter()
            norm()
            sample[name] = 1e3 * (time.perf_counter() - started)
        for name, value in sample.items() if turn >= args.warmup else ():
            times[name].append(value)
    # The mean, not the median: what an expert missed is paid at some updates and not at others.
    return {name: statistics.mean(values) for name, values in times.items()}


def total_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """The norm of several gradients, by torch."""
    return nn.utils.get_total_norm(grads)


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="8,32,128", help="numbers of experts (default: 8,32,128)")
    parser.add_argument("--share", default="1,0.5,0.1", help="shares of experts an update touches (default: 1,0.5,0.1)")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ffn", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=10, help="updates before timing; experts fall behind in them")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, compiled kernels: {'yes' if available() else 'no'}\n")
    print("| experts | touched | dense | exact | lazy | exact / dense | lazy / dense | norm / torch's norm |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for experts in map(int, args.experts.split(",")):
        for share in map(float, args.share.split(",")):
            ms = measure(args, experts, share)
            ratios = (ms["exact"] / ms["dense"], ms["lazy"] / ms["dense"], ms["norm"] / ms["torch norm"])
            cells = [f"{ms[mode]:.1f} ms" for mode in EXPERT_UPDATES] + [f"{ratio:.2f}" for ratio in ratios]
            print(f"| {experts} | {share:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
