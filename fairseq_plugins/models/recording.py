"""How a layer's losses and statistics reach the criterion: fairseq's encoder and decoder pass only activations on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from mtmoe.moe import MoEOutput

Record = tuple[str, MoEOutput]
"""Name of a layer, such as ``encoder.1``, and what it computed; `y` is empty: the list would keep each layer's
activations alive to the end of the pass, also those that are to be recomputed."""

_records: ContextVar[list[Record] | None] = ContextVar("mtmoe_routing_records", default=None)


@contextmanager
def recording() -> Iterator[list[Record]]:
    """Collect what the MoE layers of one forward pass compute, in their order.

    A context variable rather than an attribute of the layers: two threads or models do not mix, nothing outlives the
    forward pass, and activations that are recomputed in the backward pass are not recorded twice.
    """
    records: list[Record] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def record(layer: str, output: MoEOutput) -> None:
    """Add a layer's output to the pass being recorded, if any is."""
    records = _records.get()
    if records is not None:
        records.append((layer, replace(output, y=output.y.new_empty(0, output.y.shape[-1]))))
