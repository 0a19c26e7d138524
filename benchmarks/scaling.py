"""Simulate training on 8 to 1,024 GPUs with the arithmetic of `mtmoe plan`, and keep docs/scaling.md up to date.

Nothing is measured: figures follow from the shapes, the makers' figures of the GPUs, and the plan's assumptions. Every
model trains on a fixed number of tokens a GPU, so that a perfect cluster would keep its tokens/s a GPU. The layout is
the fastest that fits in memory.

    python -m benchmarks.scaling

runs the commands that docs/scaling.md shows, puts their output and the simulation's table in their places, and draws
docs/scaling.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtmoe import cli
from mtmoe.files import replacing, write_text
from mtmoe.planning import presets
from mtmoe.planning.hardware import GIB, GPUS, Cluster, Gpu
from mtmoe.planning.model import ModelShape
from mtmoe.planning.plan import Estimate, make_plan
from mtmoe.planning.training import TrainingSetup

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
PICTURE = ROOT / "docs" / "scaling.svg"
BEGIN, END = "<!-- begin: python -m benchmarks.scaling -->", "<!-- end -->"
GPUS_IN_ALL = (8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_A_NODE = 8
SLOW = 12.5e9
"""Bytes/s of a GPU between nodes where the network is slow: 100 Gbit/s."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a kind of GPU."""

    title: str
    model: ModelShape
    gpu: Gpu
    setup: TrainingSetup
    experts_a_gpu: int = 0
    """Above 0, the number of experts grows with the GPUs."""

    def shape(self, gpus: int) -> ModelShape:
        """The model that is trained on that many GPUs."""
        return replace(self.model, num_experts=self.experts_a_gpu * gpus) if self.experts_a_gpu else self.model


CASES = (
    Case(
        "NLLB-54B on A100-80", presets.by_name("mtmoe_transformer_nllb", 256_206), GPUS["a100-80"],
        TrainingSetup(dtype="bf16", zero1=True, recompute=True),
    ),
    Case(
        "big, an expert a GPU and layer, on H100", presets.by_name("mtmoe_transformer_big", 64_000), GPUS["h100"],
        TrainingSetup(tokens=8192), experts_a_gpu=1,
    ),
)  # fmt: skip

VARIANTS: dict[str, tuple[dict[str, Any], float | None]] = {
    "as planned": ({}, None),
    "gating dropout 0.3": ({"gating_dropout": 0.3}, None),
    "bi-level routing": ({"bilevel": True}, None),
    "100 Gbit/s between nodes": ({}, SLOW),
    "100 Gbit/s and bi-level routing": ({"bilevel": True}, SLOW),
}
"""Name -> changes of the training, and bytes/s between nodes where they are not the GPU's own."""


def simulate(case: Case, changes: Mapping[str, Any], between: float | None) -> dict[int, Estimate]:
    """Number of GPUs -> the fastest layout that fits, where one does."""
    gpu = case.gpu if between is None else replace(case.gpu, network_between_nodes=between)
    setup = replace(case.setup, **changes)
    found = {}
    for gpus in GPUS_IN_ALL:
        best = make_plan(case.shape(gpus), Cluster(gpu, gpus, GPUS_A_NODE), setup).best
        if best is not None:
            found[gpus] = best
    return found


def simulation_tables() -> str:
    """A table for each case, as Markdown."""
    parts = []
    for case in CASES:
        variants = {name: simulate(case, *variant) for name, variant in VARIANTS.items()}
        planned = variants["as planned"]
        header = ["GPUs", "expert-parallel", "parameters, B", "GiB a GPU", "ms an update", "all-to-all, %",
                  "all-reduce, %", "thousand tokens/s a GPU"]  # fmt: skip
        header += [f"… with {name}" for name in list(VARIANTS)[1:]]
        rows = [header, ["--:"] * len(header)]
        for gpus in GPUS_IN_ALL:
            rows.append([str(gpus), *_cells(planned.get(gpus), [each.get(gpus) for each in variants.values()])])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        switches = ", ".join(name for name in ("zero1", "recompute") if getattr(case.setup, name))
        parts.append(
            f"**{case.title}**: {case.setup.dtype}{', ' * bool(switches)}{switches}, {case.setup.tokens:,} source and "
            f"target tokens a GPU, sentences of {case.setup.length}.\n\n{lines}\n"
        )
    return "\n".join(parts)


def _cells(planned: Estimate | None, variants: Sequence[Estimate | None]) -> list[str]:
    if planned is None:
        return ["does not fit", *["–"] * (6 + len(variants) - 1)]
    time, layout = planned.time, planned.layout
    parameters = planned.parameters_a_gpu
    return [
        str(layout.expert_parallel), f"{parameters / 1e9:.2f}", f"{planned.memory.gpu / GIB:.1f}",
        f"{1e3 * time.total:,.0f}", f"{100 * time.all_to_all / time.total:.0f}",
        f"{100 * time.all_reduce / time.total:.0f}",
        *("–" if each is None else f"{_rate(each):.2f}" for each in variants),
    ]  # fmt: skip


def _rate(estimate: Estimate) -> float:
    """Thousand target tokens a second and GPU."""
    return estimate.tokens_a_second / estimate.layout.cluster.gpus / 1e3


def draw(path: Path) -> None:
    """Tokens/s a GPU over the number of GPUs, a panel for each case."""
    from benchmarks.plots import COLORS, start_pyplot

    pyplot = start_pyplot()
    figure, axes = pyplot.subplots(1, len(CASES), figsize=(5 * len(CASES), 3.8), squeeze=False)
    for axis, case in zip(axes[0], CASES, strict=True):
        for (name, variant), color in zip(VARIANTS.items(), COLORS.values(), strict=False):
            found = simulate(case, *variant)
            axis.plot(list(found), [_rate(each) for each in found.values()], marker="o", markersize=3, label=name,
                      color=color, linestyle="--" if variant[1] else "-")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS_IN_ALL, [str(gpus) for gpus in GPUS_IN_ALL])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("GPUs")
        axis.set_title(case.title, fontsize=10)
    axes[0][0].set_ylabel("thousand target tokens/s a GPU")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def refreshed(text: str) -> str:
    """A document with the output of its ``$ mtmoe plan`` commands, and the simulation, as they are now."""
    text = re.sub(r"```console\n\$ (mtmoe plan [^\n]*)\n.*?```", lambda found: _block(found[1]), text, flags=re.DOTALL)
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n{simulation_tables()}{text[end:]}"


def _block(command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(shlex.split(command)[1:])
    lines = re.sub(r"\n{2,}", "\n\n", "\n".join(line.rstrip() for line in printed.getvalue().splitlines()))
    return f"```console\n$ {command}\n{lines}\n```"


def main() -> int:
    """Bring the document and its picture up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    write_text(DOCUMENT, refreshed(DOCUMENT.read_text(encoding="utf-8")))
    draw(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
