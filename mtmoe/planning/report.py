"""A plan as rows of tables, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from mtmoe.field_texts import field_texts
from mtmoe.planning.assumptions import Assumptions
from mtmoe.planning.communication import Traffic
from mtmoe.planning.hardware import GIB, GIGA, TERA
from mtmoe.planning.memory import Memory
from mtmoe.planning.plan import Estimate, Plan, effects
from mtmoe.planning.step_time import StepTime


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, names of columns, and rows; the first column is text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def count(value: float) -> str:
    """A number of parameters: 1.57 T, 54.5 B, 86.2 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in GiB."""
    return f"{value / GIB:.2f}" if value < 100 * GIB else f"{value / GIB:,.0f}"


def traffic(value: Traffic) -> tuple[str, str]:
    """Bytes in GB, within nodes and between them."""
    return f"{value.in_node / GIGA:.2f}", f"{value.between_nodes / GIGA:.2f}"


def milliseconds(value: float) -> str:
    """Seconds in ms."""
    return f"{1e3 * value:,.1f}"


def tables(plan: Plan, *, options: bool = False, explain: bool = False) -> list[Table]:
    """All tables of a plan, in the order they are printed in."""
    made = [_parameters(plan), _layouts(plan), _memory(plan), _times(plan)]
    if options:
        made.append(_effects(plan))
    if explain:
        texts = field_texts(Assumptions)
        rows = [[name, f"{value:g}" if not isinstance(value, bool) else str(value).lower(), texts[name]]
                for name, value in asdict(plan.assumed).items()]  # fmt: skip
        made.append(Table("Assumptions (change one with --assume NAME=VALUE)", ("name", "value", "what and why"), rows))
    return made


def heading(plan: Plan) -> str:
    """What was asked, in some lines."""
    model, cluster, setup, gpu = plan.model, plan.cluster, plan.setup, plan.cluster.gpu
    switches = [name for name in ("zero1", "recompute", "offload", "bilevel", "overlap") if getattr(setup, name)]
    if setup.gating_dropout:
        switches.append(f"gating dropout {setup.gating_dropout:g} ({setup.gating_dropout_mode})")
    rate = gpu.flops["half" if setup.bytes.product == 2 else "single"] / TERA
    moe = model.moe_layers("encoder") + model.moe_layers("decoder")
    return (
        f"{model.name}: {model.encoder_layers} + {model.decoder_layers} layers, d_model {model.d_model}, vocabulary "
        f"{model.vocabulary_size:,}; {moe} MoE layers of {model.num_experts} experts, top-{model.top_k}"
        f"{', CMR' if model.cmr else ''}\n"
        f"{cluster.gpus} x {gpu.name} on {cluster.nodes} node{'s' * (cluster.nodes > 1)}: {gpu.memory / GIB:.0f} GiB, "
        f"{rate:g} TFLOP/s, {gpu.network_in_node / GIGA:g} GB/s in a node, {gpu.network_between_nodes / GIGA:g} GB/s "
        "between nodes, a GPU and direction\n"
        f"{setup.dtype}, {setup.tokens:,} source and target tokens a GPU x {setup.accumulate}, sentences of "
        f"{setup.length}, all-to-all of {setup.payload_bytes}-byte values"
        f"{', ' if switches else ''}{', '.join(switches)}; {plan.step_flops / TERA:,.3g} TFLOP a GPU and update"
    )


def _parameters(plan: Plan) -> Table:
    parameters = plan.parameters
    rows = [
        [name, f"{value:,}", f"{100 * value / parameters.total:.1f}"]
        for name, value in asdict(parameters).items()
        if name != "active" and value
    ]
    rows.append(["total", f"{parameters.total:,}", "100.0"])
    rows.append(["active for a token on each side", f"{parameters.active:,}",
                 f"{100 * parameters.active / parameters.total:.1f}"])  # fmt: skip
    return Table("Parameters", ("part", "parameters", "%"), rows)


def _layouts(plan: Plan) -> Table:
    header = ("expert-\nparallel", "x repli-\ncas", "parameters\na GPU", "GiB\na GPU", "fits", "all-to-all\nin node",
              "\nbetween", "all-reduce\nin node", "\nbetween", "ms an\nupdate", "\ntokens/s")  # fmt: skip
    rows = []
    for each in plan.estimates:
        star = " *" if each is plan.best else ""
        rows.append([
            f"{each.layout.expert_parallel}{star}", str(each.layout.replicas), count(each.parameters_a_gpu),
            size(each.memory.gpu), "yes" if each.fits else "no", *traffic(each.all_to_all), *traffic(each.all_reduce),
            milliseconds(each.time.total), count(each.tokens_a_second),
        ])  # fmt: skip
    usable = size(plan.estimates[0].usable)
    title = f"Layouts; GB that one GPU sends in an update, in its node and between nodes; {usable} GiB may be filled"
    return Table(title, header, rows)


def _memory(plan: Plan) -> Table:
    names = [field.name for field in fields(Memory) if field.name != "host"]
    host = any(each.memory.host for each in plan.estimates)
    rows = [
        [str(each.layout.expert_parallel), *(size(getattr(each.memory, name)) for name in names), size(each.memory.gpu)]
        + ([size(each.memory.host)] if host else [])
        for each in plan.estimates
    ]
    header = ("expert-\nparallel", *names, "sum", *(["host,\na node"] if host else []))
    return Table("Memory of a GPU, GiB", header, rows)


def _times(plan: Plan) -> Table:
    names = [field.name for field in fields(StepTime)]
    rows = [
        [str(each.layout.expert_parallel), *(milliseconds(getattr(each.time, name)) for name in names),
         milliseconds(each.time.total)]
        for each in plan.estimates
    ]  # fmt: skip
    title = "Time of an update, ms; what does not overlap"
    return Table(title, ("expert-\nparallel", *(name.replace("_", "-") for name in names), "sum"), rows)


def _effects(plan: Plan) -> Table:
    header = ("option", "GiB\na GPU", "fits", "all-to-all GB\nin node", "\nbetween", "ms an\nupdate", "x")
    rows = effects(plan)
    base: Estimate = rows[0][1]
    cells = [
        [name, size(each.memory.gpu), "yes" if each.fits else "no", *traffic(each.all_to_all),
         milliseconds(each.time.total), f"{each.time.total / base.time.total:.2f}"]
        for name, each in rows
    ]  # fmt: skip
    return Table(f"Options, each alone, at expert-parallel {base.layout.expert_parallel}", header, cells)
