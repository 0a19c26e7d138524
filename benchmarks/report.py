"""Tables in Markdown: ratios first, milliseconds after them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.peers import TITLES

PASS_TITLES = {"forward_backward": "Forward and backward", "forward": "Forward"}

Record = Mapping[str, Any]


def ratio(record: Record, which: str, above: str, below: str) -> float | None:
    """Median time of one peer over another's in a pass; None if either was not timed."""
    times = [record["peers"].get(name, {}).get(which) for name in (above, below)]
    if None in times:
        return None
    return times[0]["median"] / times[1]["median"]


def limit_ratio(record: Record, which: str, name: str = "ours") -> tuple[float, str] | None:
    """Time of a peer over the larger of the two limits, and which one that is; None if it was not timed."""
    times = record["peers"].get(name, {}).get(which)
    if times is None:
        return None
    binding = max(record["limits"][which], key=lambda limit: record["limits"][which][limit])
    return times["median"] / record["limits"][which][binding], binding


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; its source is aligned, so that it reads well on a terminal."""
    rows = [list(row) for row in rows]
    left = [all(not _is_number(row[index]) for row in rows) for index in range(len(header))]
    widths = [max(len(row[index]) for row in [list(header), *rows]) for index in range(len(header))]

    def line(words: Sequence[str]) -> str:
        cells = zip(words, widths, left, strict=True)
        return "| " + " | ".join(word.ljust(width) if flag else word.rjust(width) for word, width, flag in cells) + " |"

    rule = "|" + "|".join("-" * (width + 2) if flag else "-" * (width + 1) + ":" for width, flag in
                          zip(widths, left, strict=True)) + "|"  # fmt: skip
    return "\n".join([line(header), rule, *(line(row) for row in rows)]) + "\n"


def _is_number(word: str) -> bool:
    return word.strip("*")[:1].isdigit() or word in ("", "–")


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table cell, a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def machine_line(machine: Record) -> str:
    """One sentence about the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if "not" not in version)
    return (
        f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['threads']} threads, allocator: "
        f"{machine['allocator']}; {versions}."
    )


def case_cells(record: Record) -> list[str]:
    """The cells that name a case."""
    case = record["key"]["case"]
    shape = f"{case['tokens']} x {case['d_model']}, top-{case['top_k']}"
    return [shape, case["dtype"], str(case["num_experts"])]


CASE_HEADER = ["tokens x d_model", "type", "experts"]


def timed_peers(records: Iterable[Record], which: str) -> list[str]:
    """The peers that were timed in at least one record, in the order of the registry."""
    seen = {name for record in records for name, peer in record["peers"].items() if which in peer}
    return [name for name in TITLES if name in seen]


def ratio_table(records: Sequence[Record], which: str) -> str:
    """Time over the dense network's, ours over DeepSpeed's, and ours over the limit that binds."""
    peers = [name for name in timed_peers(records, which) if name != "dense"]
    header = [*CASE_HEADER, *(f"{name} / dense" for name in peers), "deepspeed / ours", "ours / limit", "limit"]
    rows = []
    for record in records:
        bound = limit_ratio(record, which)
        cells = [number(ratio(record, which, name, "dense")) for name in peers]
        cells = [f"**{cell}**" if name == "ours" else cell for name, cell in zip(peers, cells, strict=True)]
        rows.append([
            *case_cells(record), *cells, number(ratio(record, which, "deepspeed", "ours")),
            number(bound[0] if bound else None, 1), bound[1] if bound else "–",
        ])  # fmt: skip
    return table(header, rows)


def time_table(records: Sequence[Record], which: str) -> str:
    """Median and least milliseconds of each peer, and the two limits."""
    peers = timed_peers(records, which)
    rows = []
    for record in records:
        cells = []
        for name in peers:
            times = record["peers"].get(name, {}).get(which)
            cells.append(f"{1e3 * times['median']:.1f} ({1e3 * times['min']:.1f})" if times else "–")
        limits = [number(1e3 * record["limits"][which][name], 1) for name in ("gemm", "bandwidth")]
        rows.append([*case_cells(record), *cells, *limits])
    return table([*CASE_HEADER, *peers, "GEMM limit", "bandwidth limit"], rows)


def memory_table(records: Sequence[Record]) -> str:
    """MiB that forward and backward of each peer add at their peak, and ours over the dense network's."""
    peers = timed_peers(records, "forward_backward")
    rows = []
    for record in records:
        sizes = {name: record["peers"].get(name, {}).get("memory_bytes") for name in peers}
        cells = [number(None if size is None else size / 2**20, 0) for size in sizes.values()]
        gradients = record["touched_experts"] / record["key"]["case"]["num_experts"] * _weight_bytes(record) / 2**20
        rows.append([*case_cells(record), *cells, number(gradients, 0)])
    return table([*CASE_HEADER, *peers, "gradients of touched experts"], rows)


def _weight_bytes(record: Record) -> int:
    case = record["key"]["case"]
    size = 2 if case["dtype"] == "bf16" else 4
    return case["num_experts"] * 2 * case["d_model"] * case["d_ffn"] * size


def left_out(records: Iterable[Record]) -> str:
    """A line for each reason why a peer was not timed, with the cases that it is about."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for name, peer in record["peers"].items():
            if peer["status"] != "ok":
                reasons.setdefault((name, peer["reason"]), []).append(" ".join(case_cells(record)[1:]))
    return "".join(
        f"- {TITLES[name]}: {reason} ({'; '.join(dict.fromkeys(where))}).\n"
        for (name, reason), where in reasons.items()
    )


def errors_line(records: Iterable[Record]) -> str:
    """The largest error and the largest share of tokens that were off, among the peers that were timed."""
    errors, rows = 0.0, 0.0
    for record in records:
        for peer in record["peers"].values():
            if peer["status"] == "ok":
                errors = max([errors, *(each["error"] for each in peer["comparison"].values())])
                rows = max([rows, *(each["rows_off"] for each in peer["comparison"].values())])
    return (
        f"Outputs and input gradients against a loop over experts in fp32: median error over the tokens at most "
        f"{errors:.1e} of a token's length; at most {100 * rows:.2f} % of the tokens differ (chosen experts "
        "whose logits are equal to within rounding).\n"
    )


def summary(record: Record) -> str:
    """The ratios of a record in one line, for the terminal."""
    which = "forward_backward" if "forward_backward" in record["limits"] else "forward"
    parts = []
    for name, peer in record["peers"].items():
        if peer["status"] != "ok":
            parts.append(f"{name} {peer['status']}")
        elif name != "dense":
            parts.append(f"{name} {number(ratio(record, which, name, 'dense'))}")
    return ("x dense: " if ratio(record, which, "ours", "dense") else "") + ", ".join(parts)


def layer_report(machine: Record, groups: Mapping[str, Sequence[Record]]) -> str:
    """The whole report of the layer benchmark as Markdown."""
    parts = ["# MoE layer\n", machine_line(machine) + "\n"]
    rounds = next((records[0]["key"]["settings"]["rounds"] for records in groups.values() if records), 0)
    parts.append(
        f"Medians of up to {rounds} rounds, all peers in turn within a process. Ratios are times over the dense FFN of "
        "the same FLOPs; `ours / limit` is over the larger of two times that the machine needs at least: the FLOPs at "
        "the rate of one large product, the bytes at the rate of a large copy. `deepspeed` is timed with its default "
        "capacity factor 1.0, which drops tokens; `deepspeed_dropless` computes what the others compute.\n"
    )
    for title, records in groups.items():
        if not records:
            continue
        parts.append(f"## {title.capitalize()}\n")
        for which, name in PASS_TITLES.items():
            timed = [record for record in records if which in record["limits"]]
            if timed:
                parts.append(f"### {name}, ratios\n\n{ratio_table(timed, which)}")
        parts.append(errors_line(records))
        parts.append(f"### Peak memory of forward and backward, MiB added\n\n{memory_table(records)}")
        for which, name in PASS_TITLES.items():
            timed = [record for record in records if which in record["limits"]]
            if timed:
                parts.append(f"### {name}, milliseconds: median (least)\n\n{time_table(timed, which)}")
        missing = left_out(records)
        if missing:
            parts.append(f"Not timed:\n\n{missing}")
    return "\n".join(parts)
