"""Time the MoE layer beside its peers, a dense network of the same FLOPs and the machine's limits.

Every peer gets the same weights and tokens; its output and its gradient of the input are compared with a plain loop
over experts in fp32 first, and a peer that is off is named and not timed. The others run in turn within one process.
Look at the ratios; milliseconds are this machine's.

    python -m benchmarks.layer                  the goals' shapes and the curve over experts: 10 minutes on 2 cores
    python -m benchmarks.layer --grid full      every combination: many hours; goes on where it was stopped
    python -m benchmarks.layer --device cuda --zero-biases      the same on a GPU, beside MegaBlocks and Tutel
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, plots, report
from benchmarks.cases import PASSES, Case
from benchmarks.compare import check, expected_results
from benchmarks.limits import limit_runs, limits, rates
from benchmarks.machine import describe, restart_with_quick_environment
from benchmarks.peers import PEERS, Built, Unavailable, available_bytes, leaf, make_weights, touched_experts
from benchmarks.store import Store
from benchmarks.timing import alternate, device_clock, peak_memory
from mtmoe.files import write_json

CURVE_PEERS = ("ours", "dense", "deepspeed", "deepspeed_dropless")


def measure(case: Case, peers: Iterable[str], args: argparse.Namespace) -> dict[str, Any]:
    """Compare, weigh and time all peers on one case.

    Returns:
        ``peers``: name -> ``status`` (ok, wrong or unavailable), ``reason``, ``comparison``, ``memory_bytes``, and for
        each pass ``median``, ``min`` and ``rounds``; ``limits``: pass -> seconds; ``rates``; ``touched_experts``.
    """
    weights, x = make_weights(case, zero_biases=args.zero_biases)
    expected = expected_results(case, weights, x)
    touched = touched_experts(x, weights, case.top_k)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Built] = {}
    for name in peers:
        found[name], built = prepare(name, lambda name=name: PEERS[name](case, weights), case, x, expected)
        if built is not None:
            ready[name] = built
    del expected
    for name, built in ready.items():
        found[name]["memory_bytes"] = peak_memory(pass_of(built, case, x, "forward_backward"), case.device)
        forget_gradients(ready.values())
    machine: dict[str, float] = {}
    least: dict[str, dict[str, float]] = {}
    for which in args.passes:
        runs: dict[str, Callable[[], object]] = {
            name: pass_of(built, case, x, which) for name, built in ready.items()
        }
        times = alternate(
            {**runs, **limit_runs(case)},
            rounds=args.rounds,
            budget=args.budget,
            warmup=args.warmup,
            reset=lambda: forget_gradients(ready.values()),
            clock=device_clock(case.device),
        )
        machine = rates(case, times)
        least[which] = limits(case, which, touched, machine)
        for name in ready:
            found[name][which] = asdict(times[name])
    forget_gradients(ready.values())
    return {"peers": found, "limits": least, "rates": machine, "touched_experts": touched}


def prepare(
    name: str, build: Callable[[], Built], case: Case, x: Tensor, expected: dict[str, Any]
) -> tuple[dict[str, Any], Built | None]:
    """Build a peer and compare it; None instead of the peer if it must not be timed. Whatever fails is its own."""
    try:
        built = build()
        comparisons = check(built, case, x, expected)
    except Unavailable as error:
        return {"status": "unavailable", "reason": str(error)}, None
    except Exception as error:
        return {"status": "unavailable", "reason": f"{type(error).__name__}: {error}"[:300]}, None
    found: dict[str, Any] = {"comparison": {key: asdict(value) for key, value in comparisons.items()}}
    wrong = [key for key, value in comparisons.items() if not value.ok]
    if wrong:
        worst = max(comparisons[key].rows_off for key in wrong)
        reason = f"{' and '.join(wrong)} off for {100 * worst:.1f} % of the tokens; not timed"
        return {"status": "wrong", "reason": reason, **found}, None
    return {"status": "ok", **found}, built


def pass_of(built: Built, case: Case, x: Tensor, which: str) -> Callable[[], object]:
    """What is timed: a forward pass without gradients, or forward and backward with those of input and weights."""
    call = built.timed or built.call
    gradient = torch.ones(case.tokens, case.d_model, device=case.device, dtype=case.compute_dtype)

    def forward() -> Tensor:
        with torch.no_grad(), torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
            return call(x)

    def forward_backward() -> None:
        rows = leaf(x)
        with torch.autocast(case.device, torch.bfloat16, enabled=case.autocast):
            y = call(rows)
        y.backward(gradient.to(y.dtype))

    return forward if which == "forward" else forward_backward


def forget_gradients(peers: Iterable[Built]) -> None:
    """Set the gradients of all parameters to None."""
    for built in peers:
        for parameter in built.parameters:
            parameter.grad = None


def too_large(case: Case) -> str | None:
    """Why a case does not fit in memory, or None.

    At its peak a case holds the weights, their fp32 copies and gradients for the comparison, or the gradients of one
    peer and its copies in the compute type, and activations of 6 x (tokens, top_k, d_ffn).
    """
    wide = case.num_experts * 2 * case.d_model * case.d_ffn * 4
    needed = case.weight_bytes() + 2 * wide + 6 * case.tokens * case.top_k * case.d_ffn * 4
    free = available_bytes(case)
    if needed > 0.9 * free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None


def run_cases(
    title: str, wanted: Iterable[Case], peers: tuple[str, ...], store: Store, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure the cases that are not done yet; return the records of all of them."""
    machine = describe(args.device)
    records = []
    for case in wanted:
        if args.device != "cpu":
            case = replace(case, device=args.device)
        settings = {"passes": list(args.passes), "rounds": args.rounds, "peers": list(peers)}
        key = {"case": case.as_dict(), "settings": settings, "machine": machine}
        if key not in store:
            reason = too_large(case)
            if reason is not None:
                print(f"{title}: {case}: skipped: {reason}", flush=True)
                continue
            started = time.perf_counter()
            store.add(key, **measure(case, peers, args))
            gc.collect()
            line = report.summary(store[key])
            print(f"{title}: {case}: {line} [{time.perf_counter() - started:.0f} s]", flush=True)
        records.append(store[key])
    return records


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("default", "headline", "curve", "full", "smoke"), default="default",
                        help="what to measure; default is headline and curve")  # fmt: skip
    parser.add_argument("--dtypes", default="", help="only these of fp32, bf16 and autocast, with commas")
    parser.add_argument("--experts", default="", help="only these numbers of experts, with commas")
    parser.add_argument("--peers", default="", help=f"only these of {', '.join(PEERS)}, with commas")
    parser.add_argument("--passes", default="forward,forward_backward", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--zero-biases", action="store_true", help="for peers whose experts have no biases")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds that a peer may take in the rounds of a "
                        "case; slower ones get fewer rounds, but two (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes OMP_NUM_THREADS")
    parser.add_argument("--allocator", choices=("auto", "system"), default="auto",
                        help="auto preloads tcmalloc where it is installed, as mtmoe train does")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    args.passes = tuple(name for name in PASSES if name in args.passes.split(","))
    unknown = set(filter(None, args.peers.split(","))) - PEERS.keys()
    if unknown or not args.passes:
        parser.error(f"unknown peers or passes; peers are {', '.join(PEERS)}; passes are {', '.join(PASSES)}")
    return args


def selection(args: argparse.Namespace) -> dict[str, tuple[list[Case], tuple[str, ...]]]:
    """Title -> the cases and peers that the command line asks for."""
    grids = {
        "headline": (cases.HEADLINE, tuple(PEERS)),
        "curve": (cases.CURVE, CURVE_PEERS),
        "full": (tuple(cases.full_grid()), tuple(PEERS)),
        "smoke": (cases.SMOKE, tuple(PEERS)),
    }
    titles = ("headline", "curve") if args.grid == "default" else (args.grid,)
    chosen = {}
    for title in titles:
        wanted, peers = grids[title]
        wanted = [case for case in wanted if not args.dtypes or case.dtype in args.dtypes.split(",")]
        experts = {int(word) for word in args.experts.split(",") if word}
        wanted = [case for case in wanted if not experts or case.num_experts in experts]
        chosen[title] = (wanted, tuple(name for name in peers if not args.peers or name in args.peers.split(",")))
    return chosen


def main() -> int:
    """Parse, measure, print tables, and write Markdown, JSON and plots."""
    args = parse()
    if args.allocator == "auto" and args.device == "cpu":
        restart_with_quick_environment("benchmarks.layer")
    if args.threads:
        torch.set_num_threads(args.threads)
    store = Store(args.output / "layer.jsonl")
    records = {
        title: run_cases(title, wanted, peers, store, args) for title, (wanted, peers) in selection(args).items()
    }
    text = report.layer_report(describe(args.device), records)
    print(text)
    (args.output / "layer.md").write_text(text, encoding="utf-8")
    write_json(args.output / "layer.json", records)
    plots.plot_layer(records, args.output)
    print(f"written to {args.output}: layer.md, layer.json, layer.jsonl and the plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
