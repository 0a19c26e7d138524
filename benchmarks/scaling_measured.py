"""Words a second with several processes, on real cores and on hosts behind slow links, beside what the plan says.

A small MoE model trains on made-up data, fp32, one thread a process. Hosts are network namespaces of this machine (it
takes root) whose links `tc` limits; they share its cores, so their figures tell what links cost, not what more cores
bring. Settings run in turn, round after round, and the table has the median round. Timings need an otherwise idle
machine.

    python -m benchmarks.scaling_measured

prints the table for docs/scaling.md. The plan gets the machine's own rates (a large product, a large copy, bytes over
loopback), its links, and the utilisation of the first setting, one process; the rest are its defaults. So its error in
the first row is none, and in the others that of the plan.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks import namespaces
from benchmarks.faults import records
from benchmarks.large_corpus import write_corpus
from benchmarks.machine import ROOT, describe
from benchmarks.plan import machine_as_gpu, machine_rates
from benchmarks.report import machine_line, table
from mtmoe.files import write_json, write_text
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.hardware import Cluster, Gpu
from mtmoe.planning.layouts import layouts
from mtmoe.planning.model import ModelShape
from mtmoe.planning.plan import Estimate, estimate
from mtmoe.planning.training import TrainingSetup

WORDS = 2000
"""Of the vocabulary: small, so that the exchange of rows, and not the embedding's gradient, fills the links."""

SHAPE = ModelShape(
    vocabulary_size=WORDS + 6, d_model=256, encoder_layers=2, decoder_layers=2, encoder_heads=4, decoder_heads=4,
    encoder_d_ffn=512, decoder_d_ffn=512, encoder_expert_d_ffn=256, decoder_expert_d_ffn=256, num_experts=12,
)  # fmt: skip
"""Its twelve experts can be shared out over two, three and four processes."""

OPTIONS = {
    "encoder-layers": 2, "decoder-layers": 2, "encoder-embed-dim": 256, "decoder-embed-dim": 256,
    "encoder-ffn-embed-dim": 512, "decoder-ffn-embed-dim": 512, "encoder-attention-heads": 4,
    "decoder-attention-heads": 4, "encoder-normalize-before": True, "decoder-normalize-before": True,
    "share-all-embeddings": True, "dropout": 0.0, "moe-freq": 2, "moe-ffn-embed-dim": 256, "num-experts": 12,
    "top-k": 2, "lr": 0.0003, "clip-norm": 1.0, "log-interval": 1, "seed": 3, "cpu": True, "no-save": True,
    "disable-validation": True, "no-epoch-checkpoints": True, "collective-timeout": 300,
}  # fmt: skip

LENGTH = 14
"""Mean tokens of a sentence of the made-up corpus."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Method:
    """A way to train, in fairseq's options and in the plan's."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = True
    """Whether the plan knows it."""


TWO_STEPS = {"hierarchical-exchange": True}
BILEVEL = {"gate": "bilevel", "expert-nodes": 2, "normalize-weights": "none", **TWO_STEPS}
CMR = {"cmr": True}

TOP_2 = Method(name="top-2")
GATING_DROPOUT = Method(
    name="gating dropout 0.3", options={"gating-dropout": 0.3}, setup={"gating_dropout": 0.3}
)  # fmt: skip
BF16 = Method(name="bf16 payload", options={"exchange-dtype": "bfloat16"}, setup={"payload": "bf16"})
METHODS = (
    TOP_2,
    GATING_DROPOUT,
    BF16,
    Method(name="CMR", options=CMR, shape=CMR),
    Method(name="CMR, overlap", options={**CMR, "overlap-exchange": True}, shape=CMR, setup={"overlap": True}),
    Method(name="CMR, gate dropout 0.2", options={**CMR, "cmr-gate-drop": 0.2}, planned=False),
)
OF_NODES = (
    TOP_2,
    Method(name="two steps", options=TWO_STEPS, planned=False),
    Method(name="bilevel, two steps", options=BILEVEL, setup={"bilevel": True}),
    Method(
        name="bilevel, two steps, bf16 payload", options={**BILEVEL, "exchange-dtype": "bfloat16"},
        setup={"bilevel": True, "payload": "bf16"},
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where something trains, and how."""

    method: Method = TOP_2
    hosts: int = 0
    """0: this machine as it is."""
    processes: int = 1
    """On each host."""
    expert_parallel: int = 1
    mbits: int | None = None
    """Mbit/s of a host's link; None = as fast as the machine."""

    @property
    def world_size(self) -> int:
        """Processes."""
        return max(1, self.hosts) * self.processes

    @property
    def place(self) -> str:
        """Processes and hosts, in words."""
        if not self.hosts:
            share = "share the experts" if self.expert_parallel > 1 else "each with all experts"
            return "1 process" if self.processes == 1 else f"{self.processes} processes, {share}"
        link = "unlimited" if self.mbits is None else f"{self.mbits:,} Mbit/s"
        return f"{self.hosts} hosts x {self.processes}, {link}"

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.place}: {self.method.name}"


def settings(rates: Sequence[int | None]) -> list[Setting]:
    """All rows; the first is one process, and the first of each place is what its others are compared with.

    Args:
        rates: of links, in Mbit/s.
    """
    slow = rates[-1]
    return [
        Setting(),
        Setting(processes=2),
        Setting(processes=2, expert_parallel=2),
        *(Setting(method=way, hosts=2, expert_parallel=2, mbits=rate) for rate in rates for way in METHODS),
        *(
            Setting(method=way, hosts=3, expert_parallel=3, mbits=slow)
            for way in (TOP_2, GATING_DROPOUT, BF16)
        ),
        *(Setting(method=way, hosts=2, processes=2, expert_parallel=4, mbits=slow) for way in OF_NODES),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one update, in the mean of a run."""

    seconds: float
    tokens: float
    """Target tokens of all processes."""
    same_host: float
    """Bytes that the exchange of rows sent between processes of a host, all together."""
    other_hosts: float
    """… and to other hosts."""


def train(setting: Setting, data: Path, folder: Path, args: argparse.Namespace) -> Measured:
    """Train in a setting, in an empty folder.

    Raises:
        RuntimeError: a process failed; the text has the end of the output.
    """
    options = OPTIONS | {"max-tokens": args.tokens, "max-update": args.warm_up + args.updates,
                         "expert-parallel-size": setting.expert_parallel, **setting.method.options}  # fmt: skip
    folder.mkdir(parents=True)
    preset = folder / "preset.yaml"
    document = {
        "data": str(data), "output": str(folder / "run"), "arch": "mtmoe_transformer", "threads": 1,
        "criterion": "mtmoe_label_smoothed_cross_entropy", "options": options,
    }  # fmt: skip
    preset.write_text(yaml.safe_dump(document), encoding="utf-8")
    words = [sys.executable, "-m", "mtmoe", "train", preset, "--nproc", setting.processes]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        if setting.hosts:
            rate = None if setting.mbits is None else 1e6 * setting.mbits
            hosts = stack.enter_context(namespaces.hosts(setting.hosts, rate))
            words += ["--nnodes", setting.hosts, "--rdzv-endpoint", f"{hosts[0].address}:29500"]
            commands = [(host.command(words), host.environment() | variables) for host in hosts]
        else:
            commands = [(list(map(str, words)), {**os.environ, **variables})]
        _run_together(commands, folder, args.limit)
    return measure(records(folder / "run")[args.warm_up :])


def _run_together(commands: Sequence[tuple[list[str], dict[str, str]]], folder: Path, limit: float) -> None:
    """Run commands at the same time; whatever happens, none of their processes is left."""
    running, outputs = [], []
    try:
        for number, (words, variables) in enumerate(commands):
            outputs.append(folder / f"{number}.out")
            with outputs[-1].open("w", encoding="utf-8") as output:
                running.append(subprocess.Popen(words, stdout=output, stderr=output, env=variables))
        end = time.monotonic() + limit
        statuses = [process.wait(timeout=max(0.0, end - time.monotonic())) for process in running]
    finally:
        for process in running:
            process.kill()  # what it has started ends with it
            process.wait()
    if any(statuses):
        tails = [path.read_text(encoding="utf-8", errors="replace")[-3000:] for path in outputs]
        raise RuntimeError("\n".join(["training failed", *tails]))


def measure(found: Sequence[Mapping[str, Any]]) -> Measured:
    """The mean over lines of metrics, one for each update."""
    def mean(name: str) -> float:
        return statistics.fmean(record.get(name, 0.0) for record in found)

    return Measured(
        seconds=statistics.fmean(record["wpb"] / record["wps"] for record in found),
        tokens=mean("wpb"),
        same_host=1e6 * mean("sent_same_host_mb"),
        other_hosts=1e6 * mean("sent_other_hosts_mb"),
    )


def median(found: Sequence[Measured]) -> Measured:
    """The round in the middle, by time."""
    return sorted(found, key=lambda each: each.seconds)[len(found) // 2]


def loopback_rate(size: int = 1 << 28) -> float:
    """Bytes/s through a TCP connection of this machine to itself."""
    def drain() -> None:
        with server.accept()[0] as receiving:
            while receiving.recv(1 << 20):
                pass

    block = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drain)
        thread.start()
        begun = time.perf_counter()
        with socket.create_connection(server.getsockname()) as sending:
            for _ in range(size // len(block)):
                sending.sendall(block)
        thread.join()
        return size / (time.perf_counter() - begun)


def predict(setting: Setting, tokens: float, gpu: Gpu, utilisation: float, cores: int) -> Estimate | None:
    """What the plan says of a setting; None where it does not know the method.

    Args:
        setting: the setting.
        tokens: target tokens of all processes in an update.
        gpu: one core; its networks are loopback.
        utilisation: of the core.
        cores: that the processes share.
    """
    if not setting.method.planned:
        return None
    share = min(1.0, cores / setting.world_size)
    between = gpu.network_between_nodes if setting.mbits is None else 1e6 * setting.mbits / 8
    # The processes of a host share its link.
    one = replace(
        gpu, flops={kind: share * rate for kind, rate in gpu.flops.items()},
        memory_bandwidth=share * gpu.memory_bandwidth, network_between_nodes=between / setting.processes,
    )  # fmt: skip
    shape = replace(SHAPE, **setting.method.shape)
    setup = TrainingSetup(
        tokens=max(LENGTH, round(tokens / setting.world_size)), length=LENGTH, dtype="fp32", dropout=False,
        **setting.method.setup,
    )  # fmt: skip
    layout = layouts(shape, Cluster(one, setting.world_size, setting.processes), setting.expert_parallel)[0]
    return estimate(shape, setup, layout, Assumptions(utilisation=utilisation, memory_bandwidth_share=1.0))


def report(found: Mapping[Setting, Sequence[Measured]], gpu: Gpu, cores: int) -> str:
    """The table, as Markdown.

    Args:
        found: of each setting its rounds; the first is one process.
        gpu: one core of the machine, as the plan takes it.
        cores: of the machine.
    """
    middle = {setting: median(rounds) for setting, rounds in found.items()}
    first, alone = next(iter(middle.items()))
    # Time of the products at full rate over the time that was measured.
    full = predict(first, alone.tokens, gpu, 1.0, cores)
    assert full is not None
    rest = full.time.total - full.time.compute - full.time.experts
    utilisation = min(1.0, (full.time.compute + full.time.experts) / max(1e-9, alone.seconds - rest))
    header = ["where", "method", "ms an update", "rounds", "tokens/s", "x",
              "MB to own host", "plan", "MB to other hosts", "plan", "plan's ms", "plan / measured"]  # fmt: skip
    rows, base = [], alone
    for setting, one in middle.items():
        if setting.method is TOP_2:
            base = one if setting.hosts else alone
        times = [1e3 * each.seconds for each in found[setting]]
        planned = predict(setting, one.tokens, gpu, utilisation, cores)
        bytes_planned = None if planned is None else planned.all_to_all * setting.world_size
        rows.append([
            setting.place, setting.method.name, f"{1e3 * one.seconds:.0f}", f"{min(times):.0f} to {max(times):.0f}",
            f"{one.tokens / one.seconds:,.0f}", f"{one.tokens / one.seconds * base.seconds / base.tokens:.2f}",
            f"{one.same_host / 1e6:.2f}", "–" if bytes_planned is None else f"{bytes_planned.in_node / 1e6:.2f}",
            f"{one.other_hosts / 1e6:.2f}",
            "–" if bytes_planned is None else f"{bytes_planned.between_nodes / 1e6:.2f}",
            "–" if planned is None else f"{1e3 * planned.time.total:.0f}",
            "–" if planned is None else f"{planned.time.total / one.seconds:.2f}",
        ])  # fmt: skip
    return (
        table(header, rows)
        + "\n*x*: tokens/s over those of one process; on hosts, over those of top-2 in the same place. MB are of all "
        "processes in an update, as counted where rows are sent. One core has "
        f"{gpu.flops['single'] / 1e9:,.0f} GFLOP/s, of which the first row reaches {utilisation:.2f}, and loopback "
        f"{gpu.network_in_node / 1e9:.1f} GB/s; where there are more processes than the {cores} cores, the plan takes "
        "equal shares of them.\n"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=40, help="timed, of each run (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=10, help="updates before them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="max-tokens of a process (default: %(default)s)")
    parser.add_argument("--rates", default="unlimited,1000,200", help="Mbit/s of links (default: %(default)s)")
    parser.add_argument("--only", default="", help="texts, with commas: rows with one in their name, and the first")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="(default: %(default)s)")
    args = parser.parse_args()
    if min(args.updates, args.warm_up, args.rounds) < 1:
        parser.error("--updates, --warm-up and --rounds must be at least 1")
    try:
        args.rates = [None if each == "unlimited" else int(each) for each in args.rates.split(",")]
    except ValueError:
        parser.error(f"--rates {args.rates} must be whole numbers, or unlimited, with commas")
    return args


def main() -> int:
    """Parse, run, print and write."""
    args = parse()
    wanted = [text.strip() for text in args.only.split(",")]
    chosen = [each for each in settings(args.rates) if each == Setting() or any(t in each.name for t in wanted)]
    reason = namespaces.why_not()
    if reason:
        print(f"without hosts: {reason}", file=sys.stderr)
        chosen = [each for each in chosen if not each.hosts]
    rates = machine_rates(False, 5, 20.0)
    loopback = loopback_rate()
    gpu = replace(machine_as_gpu(rates), network_in_node=loopback, network_between_nodes=loopback)
    found: dict[Setting, list[Measured]] = {each: [] for each in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        write_corpus(data, 20_000, words=WORDS)
        for number in range(args.rounds):
            for place, setting in enumerate(chosen):
                print(f"round {number + 1}: {setting.name}", file=sys.stderr, flush=True)
                found[setting].append(train(setting, data, Path(temporary) / f"{number}-{place}", args))
    cores = len(os.sched_getaffinity(0))
    text = f"{machine_line(describe())}\n\n{report(found, gpu, cores)}"
    print(text)
    write_text(args.output / "scaling_measured.md", text)
    write_json(args.output / "scaling_measured.json", {
        "machine": describe(), "rates": rates | {"loopback": loopback},
        "rows": {each.name: [asdict(one) for one in rounds] for each, rounds in found.items()},
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
