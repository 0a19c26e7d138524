"""What a model is: size, layers, experts, languages, and what was done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.safetensors_file import bytes_of
from mtmoe.checkpoint.stored import StoredModel
from mtmoe.checkpoint.tensors import count_of, dtypes_of, shape_of

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def describe(model: StoredModel) -> dict[str, Any]:
    """Everything that `mtmoe inspect` shows, as plain values; no weight is read.

    ``active_parameters`` are those that one token uses: of the experts of a layer only ``top_k``, and all else, the
    embedding included.
    """
    config = model.config
    total = sum(count_of(model.tensors, name) for name in model.tensors)
    return {
        "parameters": total,
        "active_parameters": total - sum(_idle(model, side) for side in ("encoder", "decoder")),
        "weight_bytes": sum(bytes_of(model.tensors, name) for name in model.tensors),
        "dtypes": dtypes_of(model.tensors),
        "vocabulary_size": config.vocabulary_size,
        "d_model": config.d_model,
        "encoder": _side(model, "encoder"),
        "decoder": _side(model, "decoder"),
        "languages": list(model.languages.languages),
        "directions": list(model.languages.directions),
        "history": [dict(entry) for entry in model.history],
        "data": dict(model.data),
        "figures": dict(model.figures),
    }


def description_text(about: Mapping[str, Any]) -> str:
    """`describe`'s values for people, in lines."""
    dtypes = ", ".join(
        name if len(about["dtypes"]) == 1 else f"{name} {count:,}" for name, count in about["dtypes"].items()
    )
    lines = [
        f"parameters   {about['parameters']:,}, of which a token uses {about['active_parameters']:,}",
        f"weights      {size_text(about['weight_bytes'])}, {dtypes}",
        f"vocabulary   {about['vocabulary_size']:,} pieces, width {about['d_model']}",
        *(f"{name}      {_side_text(about[name])}" for name in ("encoder", "decoder")),
        f"languages    {len(about['languages'])}: {', '.join(about['languages'])}",
        f"directions   {len(about['directions'])}",
    ]
    data, figures = about["data"], about["figures"]
    if data:
        known = [str(data[key]) for key in ("recipe", "source", "licence") if data.get(key)]
        lines.append(f"data         {'; '.join(known)}")
    lines += [
        f"{'history      ' if number == 0 else ' ' * 13}{line}"
        for number, line in enumerate(history_lines(about["history"]))
    ]
    if figures:
        bleu = figures.get("mean_bleu")
        lines.append(
            f"figures      mean of {len(figures['directions'])} directions: {figures['mean_chrf++']:.1f} chrF++"
            + ("" if bleu is None else f", {bleu:.1f} BLEU")
        )
        lines += [
            f"             {direction:<12} {each['chrf++']:5.1f} chrF++"
            for direction, each in sorted(figures["directions"].items())
        ]
    return "\n".join(lines)


def history_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each operation with its details, in a line."""
    lines = []
    for entry in history:
        details = [f"{key} {_detail(value)}" for key, value in entry.items() if key not in ("operation", "mtmoe")]
        lines.append(f"{entry['operation']}: {', '.join(details)}" if details else str(entry["operation"]))
    return lines


def size_text(size: float) -> str:
    """Bytes for people, as "32.6 MB"."""
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def _detail(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _side(model: StoredModel, side: str) -> dict[str, Any]:
    config = model.config
    moe = getattr(config, f"{side}_moe")
    return {
        "layers": getattr(config, f"{side}_layers"),
        "heads": getattr(config, f"{side}_heads"),
        "d_ffn": getattr(config, f"{side}_d_ffn"),
        "moe_layers": len(_moe_layers(config, side)),
        "experts": [_experts(model, side, layer) for layer in _moe_layers(config, side)],
        "top_k": 0 if moe is None else moe.top_k,
        "gate": None if moe is None else moe.gate,
        "expert_d_ffn": 0 if moe is None else moe.d_ffn,
        "cmr": moe is not None and moe.cmr,
    }


def _side_text(side: Mapping[str, Any]) -> str:
    text = f"{side['layers']} layers, {side['heads']} heads, feed-forward {side['d_ffn']}"
    if side["moe_layers"]:
        text += (
            f"; {side['moe_layers']} with {experts_text(side)} of {side['expert_d_ffn']}, top-{side['top_k']}"
            + (", CMR" if side["cmr"] else "")
        )
    return text


def experts_text(side: Mapping[str, Any]) -> str:
    """How many experts the MoE layers of a side have, as "8 experts" or "3 to 8 experts"."""
    least, most = min(side["experts"]), max(side["experts"])
    return f"{most} experts" if least == most else f"{least} to {most} experts"


def _experts(model: StoredModel, side: str, layer: int) -> int:
    return shape_of(model.tensors, f"{side}.layers.{layer}.moe.experts.w_in")[0]


def _moe_layers(config: TransformerConfig, side: str) -> list[int]:
    return [layer for layer in range(getattr(config, f"{side}_layers")) if config.is_moe(side, layer)]


def _idle(model: StoredModel, side: str) -> int:
    """The parameters of experts that a token does not choose, over all layers of a side."""
    idle = 0
    for layer in _moe_layers(model.config, side):
        top_k = getattr(model.config, f"{side}_moe").top_k
        prefix = f"{side}.layers.{layer}.moe.experts."
        for name in model.tensors:
            if name.startswith(prefix):
                experts = shape_of(model.tensors, name)[0]
                idle += count_of(model.tensors, name) // experts * max(0, experts - top_k)
    return idle
