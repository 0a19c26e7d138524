"""Words a second of `fairseq-train`, end to end, and the loss curves beside them.

Plain fairseq (its Transformer, loss and Adam, fp32, the system's allocator) against our dense model and MoE models of
the same active FLOPs, as `mtmoe train` would run them. All see the same batches in the same order: plain fairseq runs
with our task, too, since its own multilingual task draws other batches; the time of this task is in all figures.
`fairseq-own-task` is fairseq with its translation_multi_simple_epoch as well, for the speed alone.

The systems run in turn, a slice of updates each, and go on from their checkpoints: A B C A B C. A machine's speed
drifts, so ratios are taken within a turn; slices in which other processes took much of the machine do not count.

    python -m benchmarks.training --data runs/demo/data --data runs/tatoeba20/data
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, code_fingerprint, describe
from benchmarks.plots import plot_losses
from benchmarks.report import machine_line, number, table
from mtmoe.files import write_json, write_text
from mtmoe.training.preset import TrainConfig, build_command, load_config
from mtmoe.training.process import build_environment, run_process
from mtmoe.training.run_log import parse_metrics

KEPT = ("max-tokens", "required-batch-size-multiple", "clip-norm", "label-smoothing", "cpu", "seed",
        "sampling-temperature", "skip-invalid-size-inputs-valid-test", "no-epoch-checkpoints", "keep-interval-updates",
        "validate-interval", "save-interval", "valid-limit")  # fmt: skip
"""Options of the demo's preset that all systems take; those of methods (CMR, EOM, identity warm-up) are left out."""

SHAPE = {
    "encoder-layers": 3, "decoder-layers": 2, "encoder-embed-dim": 256, "decoder-embed-dim": 256,
    "encoder-ffn-embed-dim": 1024, "decoder-ffn-embed-dim": 1024, "encoder-attention-heads": 8,
    "decoder-attention-heads": 8, "share-all-embeddings": True, "encoder-normalize-before": True,
    "decoder-normalize-before": True, "max-source-positions": 256, "max-target-positions": 256, "dropout": 0.1,
}  # fmt: skip
"""The demo's model; its MoE layers have experts of half the dense width, two a token."""

DISTURBED = 0.05
"""Share of the machine that other processes may take during a slice whose speed counts."""

SCHEDULE = {"lr": 0.001, "lr-scheduler": "inverse_sqrt", "warmup-updates": 200, "adam-betas": "(0.9, 0.98)"}
"""A schedule that does not depend on how long training is: a slice goes on where the one before it stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Something that trains."""

    arch: str = "mtmoe_transformer"
    criterion: str = "mtmoe_label_smoothed_cross_entropy"
    optimizer: str = "mtmoe_adamw"
    allocator: str = "auto"
    options: Mapping[str, Any]
    own_task: bool = False
    """Whether it runs with fairseq's own multilingual task."""


PLAIN = {"arch": "transformer", "criterion": "label_smoothed_cross_entropy", "optimizer": "adam", "allocator": "system"}


def _experts(count: int) -> dict[str, Any]:
    return {"moe-freq": 2, "num-experts": count, "top-k": 2, "moe-ffn-embed-dim": 512, "autocast": "bfloat16"}


SYSTEMS = {
    "fairseq": System(options={}, **PLAIN),
    "fairseq-own-task": System(options={}, own_task=True, **PLAIN),
    "dense-fp32": System(options={"moe-freq": 0}),
    "dense": System(options={"moe-freq": 0, "autocast": "bfloat16"}),
    "moe8": System(options=_experts(8)),
    "moe32": System(options=_experts(32)),
}


def config_of(system: System, data: Path, folder: Path, args: argparse.Namespace) -> TrainConfig:
    """The preset of a system on some data."""
    preset = load_config(ROOT / "scripts/train/demo.yaml").options
    options = {key: preset[key] for key in KEPT if key in preset} | SHAPE | SCHEDULE
    options |= {"log-interval": args.log_interval, "save-interval-updates": args.slice,
                "validate-interval-updates": args.slice, **system.options}  # fmt: skip
    task = "mtmoe_translation"
    if system.own_task:
        task, data = "translation_multi_simple_epoch", own_layout(data, folder)
        listed = json.loads((data / "languages.json").read_text(encoding="utf-8"))
        options |= {"langs": listed["languages"], "lang-pairs": listed["directions"], "encoder-langtok": "src",
                    "decoder-langtok": True, "sampling-method": "temperature", "disable-validation": True,
                    "sampling-temperature": options["sampling-temperature"]}  # fmt: skip
        del options["valid-limit"]
    return TrainConfig(
        data=str(data), output=str(folder), arch=system.arch, task=task, criterion=system.criterion,
        optimizer=system.optimizer, options=options, allocator=system.allocator, threads=args.threads,
    )  # fmt: skip


def own_layout(data: Path, folder: Path) -> Path:
    """Links to prepared data in the layout of fairseq's tasks: one folder, a dictionary for each language."""
    layout = (folder / "data").absolute()
    layout.mkdir(parents=True, exist_ok=True)
    listed = json.loads((data / "languages.json").read_text(encoding="utf-8"))
    wanted = {path.name: path for path in (data / "bin").iterdir()} | {"languages.json": data / "languages.json"}
    wanted |= {f"dict.{language}.txt": data / "dict.txt" for language in listed["languages"]}
    for name, target in wanted.items():
        if not (layout / name).exists():
            (layout / name).symlink_to(target.absolute())
    return layout


def train_slice(name: str, config: TrainConfig, until: int) -> list[dict[str, Any]]:
    """Train up to an update, from the checkpoint if there is one; returns the lines of metrics.

    Raises:
        RuntimeError: fairseq-train failed; the text is the end of its output.
    """
    records, lines = [], []

    def line(text: str) -> None:
        lines.append(text)
        record = parse_metrics(text)
        if record is not None:
            records.append(record)

    environment = build_environment(config, lambda _: None)
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}".rstrip(":")
    status = run_process(build_command(config, max_update=until), environment, line)
    write_text(config.folder / "train.log", "\n".join(lines) + "\n")
    if status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        sys.exit(status)  # the user stopped it; the next run goes on with this slice
    if status:
        raise RuntimeError(f"{name} ended with status {status}:\n" + "\n".join(lines[-15:]))
    return records


def others_seconds(stat: Path = Path("/proc/stat")) -> float:
    """CPU seconds since boot of all but this process and those it waited for; 0 where there is no such file."""
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq = map(int, stat.read_text(encoding="ascii").split()[1:8])
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def speeds(records: Sequence[Mapping[str, Any]], start: int, warm: int) -> list[float]:
    """Target words/s of each logged interval of a slice that began at `start`, without the first `warm` updates."""
    return [
        record["wps"] for record in records
        if record["kind"] == "train_inner" and record["num_updates"] > start + warm and "wps" in record
    ]  # fmt: skip


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(update, nll loss in bits a token) on training and validation data."""
    found: dict[str, list[tuple[int, float]]] = {"train": [], "valid": []}
    for record in records:
        split = {"train_inner": "train", "valid": "valid"}.get(record["kind"])
        if split and "nll_loss" in record:
            found[split].append((int(record["num_updates"]), float(record["nll_loss"])))
    return found


def run_data(
    data: Path, chosen: Sequence[str], args: argparse.Namespace, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Train all systems on some data in turn; what was measured is kept, and a rerun goes on from there."""
    root = args.output / "training" / name_of(data)
    path = root / "slices.json"
    settings = {"slice": args.slice, "warm": args.warm, "log_interval": args.log_interval, "threads": args.threads,
                "code": code_fingerprint(("mtmoe", "fairseq_plugins", "benchmarks"))}  # fmt: skip
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stored.get("settings") != settings:
        stored = {"settings": settings, "systems": {}}
    done: dict[str, list[dict[str, Any]]] = stored["systems"]
    for turn in range(args.slices):
        for name in chosen:
            if len(done.setdefault(name, [])) > turn:
                continue
            config = config_of(SYSTEMS[name], data, root / name, args)
            if turn == 0:
                shutil.rmtree(config.folder, ignore_errors=True)
                config = config_of(SYSTEMS[name], data, root / name, args)
            config.folder.mkdir(parents=True, exist_ok=True)
            others, started = others_seconds(), time.monotonic()
            try:
                records = train_slice(name, config, (turn + 1) * args.slice)
            except RuntimeError as error:
                say(str(error))
                break_off = {"words_per_second": [], "curves": {"train": [], "valid": []}, "failed": str(error)[:2000]}
                done[name] += [break_off] * (args.slices - turn)
                write_json(path, stored)
                continue
            rates = speeds(records, turn * args.slice, args.warm)
            share = (others_seconds() - others) / (time.monotonic() - started) / (os.cpu_count() or 1)
            done[name].append({"words_per_second": rates, "curves": curves(records), "others": share})
            write_json(path, stored)
            say(
                f"{name_of(data)}: slice {turn + 1}/{args.slices}: {name}: {statistics.median(rates):.0f} words/s"
                + (f"; does not count, others took {share:.0%} of the machine" if share > DISTURBED else "")
            )
    return summarise({name: done[name] for name in chosen})


def name_of(data: Path) -> str:
    """The name of prepared data: what its recipe calls it, else its folder's."""
    described = data / "data.json"
    name = json.loads(described.read_text(encoding="utf-8")).get("recipe") if described.is_file() else None
    return str(name or data.name)


def summarise(slices: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Speeds of the slices that count, and the curves of all.

    Returns:
        Name -> median words/s over all intervals; the median of each slice, None where it does not count; the curves,
        joined. Systems without any speed are left out.
    """
    found = {}
    for name, parts in slices.items():
        counted = [part["words_per_second"] if part.get("others", 0.0) <= DISTURBED else [] for part in parts]
        rates = [rate for each in counted for rate in each]
        if not rates:
            continue
        joined = {
            split: [tuple(point) for part in parts for point in part["curves"][split]] for split in ("train", "valid")
        }
        turns = [statistics.median(each) if each else None for each in counted]
        found[name] = {"words_per_second": statistics.median(rates), "slices": turns, "curves": joined}
    return found


def ratios(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[float]:
    """Speed over that of another system in each turn in which both count."""
    if base is None:
        return []
    return [own / other for own, other in zip(row["slices"], base["slices"], strict=False) if own and other]


def spread(values: Sequence[float]) -> str:
    """The median, and the least and largest where they differ."""
    if not values:
        return number(None)
    middle, least, most = number(statistics.median(values)), number(min(values)), number(max(values))
    return middle if least == most else f"{middle} ({least} to {most})"


def report(machine: dict[str, Any], args: argparse.Namespace, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as Markdown."""
    parts = [
        f"# Training, end to end\n\n{machine_line(machine)}\n\n3 + 2 layers, d_model 256, d_ffn 1024 (experts: two of "
        f"512 a token in every second layer), {args.slices} slices of {args.slice} updates each, in turn; medians of "
        f"the target words/s of {args.log_interval} updates each, without a slice's first {args.warm}. Ratios are "
        "medians over turns, with the least and the largest.\n"
    ]
    for data, rows in results.items():
        cells = []
        for name, row in rows.items():
            valid = row["curves"]["valid"]
            cells.append([
                name, *(spread(ratios(row, rows.get(base))) for base in ("fairseq", "dense")),
                number(row["words_per_second"], 0), ", ".join(number(each, 0) for each in row["slices"]),
                number(valid[-1][1] if valid else None, 3),
            ])  # fmt: skip
        header = ["system", "x fairseq", "x dense", "words/s", "slices", "valid nll at the end"]
        parts.append(f"## {data}\n\n{table(header, cells)}\n![Loss curves](training-{data}.svg)\n")
    return "\n".join(parts)


def prepared(given: Sequence[Path], output: Path) -> list[Path]:
    """The data folders; without any given, the demo's and tatoeba20, prepared where they are missing."""
    if given:
        return list(given)
    folders = []
    for name in ("quickstart", "tatoeba20"):
        folder = output / "data" / name
        if not (folder / "languages.json").is_file():
            recipe = ROOT / "data" / f"{name}.yaml"
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "mtmoe", "prepare", str(recipe), "--output", str(folder)]
            subprocess.run(command, check=True, env=environment)
        folders.append(folder)
    return folders


def main() -> int:
    """Parse, train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", default=[],
                        help="folder of `mtmoe prepare`, repeatable; by default the demo's and tatoeba20")  # fmt: skip
    parser.add_argument("--systems", default="fairseq,dense,moe8,moe32",
                        help=f"of {', '.join(SYSTEMS)}, with commas (default: %(default)s)")  # fmt: skip
    for name, default, text in (
        ("slices", 3, "turns"), ("slice", 200, "updates in a turn"),
        ("warm", 50, "updates of a slice that do not count"),
        ("log-interval", 10, "updates between two lines of the log"), ("threads", 0, "CPU threads; 0 = all"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="(default: %(default)s)")
    args = parser.parse_args()
    chosen = args.systems.split(",")
    if set(chosen) - SYSTEMS.keys():
        parser.error(f"--systems must be of: {', '.join(SYSTEMS)}")
    if args.warm + args.log_interval > args.slice:
        parser.error("--slice must be longer than --warm and --log-interval together")
    args.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for data in prepared(args.data, args.output):
        results[name_of(data)] = run_data(data, chosen, args)
        losses = {name: row["curves"] for name, row in results[name_of(data)].items()}
        plot_losses(losses, args.output / f"training-{name_of(data)}.svg")
    text = report(describe(), args, results)
    print(text)
    write_text(args.output / "training.md", text)
    write_json(args.output / "training.json", {"machine": describe(), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
