"""What a model's gates do with text, by layer, expert and direction: sums that pruning, analysis and reports read.

The table holds counts and sums, never means, so that tables over other text of the same model add up. Its size is
directions x MoE layers x experts, however long the text was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtmoe.errors import DataError
from mtmoe.files import write_text

FORMAT = 1
"""Version of the file; a reader refuses a newer one."""

SIDES = ("encoder", "decoder")
"""Where a layer stands."""

ANY = "*"
"""In a table by language, stands for all partners: ``de-*`` is all tokens of the encoder with source ``de``, ``*-de``
all tokens of the decoder with target ``de``."""

Counts = NDArray[np.int64]
Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """The gates of one MoE layer, summed over the real tokens of each row of the table.

    A row is a direction, or a language once directions are grouped. Choices are those of the gate, before capacity.
    """

    side: str
    """"encoder" or "decoder"."""
    layer: int
    """Number of the layer on its side, from 0."""
    tokens: Counts
    """(rows,) tokens."""
    first: Counts
    """(rows, num_experts) tokens whose first choice an expert was."""
    second: Counts
    """(rows, num_experts) tokens whose second choice an expert was; 0 where the gate takes one."""
    first_probability: Sums
    """(rows, num_experts) gate probability of an expert, over the tokens whose first choice it was."""
    second_probability: Sums
    """(rows, num_experts) the same for the second choice."""
    probability: Sums
    """(rows, num_experts) gate probability of an expert, over all tokens."""
    cmr_gate: Sums | None = None
    """(rows,) gates of CMR, the share of the experts in a token's output; None without CMR."""

    @property
    def name(self) -> str:
        """Such as ``encoder 1``."""
        return f"{self.side} {self.layer}"

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int(self.first.shape[1])

    @property
    def top1(self) -> Sums:
        """(rows, num_experts) share of the tokens whose first choice an expert is; a row sums to 1, or 0 if empty."""
        return self._over_tokens(self.first)

    @property
    def top2(self) -> Sums:
        """(rows, num_experts) share of the tokens whose second choice an expert is."""
        return self._over_tokens(self.second)

    @property
    def load(self) -> Sums:
        """(rows, num_experts) an expert's share of the work: of all first and second choices; 1 / num_experts if even.

        A row sums to 1, or 0 if empty.
        """
        chosen = self.first + self.second
        shares: Sums = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1)
        return shares

    @property
    def mean_probability(self) -> Sums:
        """(rows, num_experts) mean gate probability of an expert over all tokens."""
        return self._over_tokens(self.probability)

    @property
    def conf1(self) -> Sums:
        """(rows, num_experts) mean gate probability of an expert where it is the first choice; 0 where it never is."""
        return self.first_probability / np.maximum(self.first, 1)

    @property
    def conf2(self) -> Sums:
        """(rows, num_experts) mean gate probability of an expert where it is the second choice; 0 where never."""
        return self.second_probability / np.maximum(self.second, 1)

    @property
    def experts_share(self) -> Sums | None:
        """(rows,) mean CMR gate: the share of the experts, as against the shared network; None without CMR."""
        return None if self.cmr_gate is None else self.cmr_gate / np.maximum(self.tokens, 1)

    def rows_of(self, index: Sequence[int]) -> LayerRouting:
        """Some of the rows, in the order of `index`."""
        chosen: dict[str, Any] = {
            name: None if (rows := getattr(self, name)) is None else rows[list(index)] for name in _SUMMED
        }
        return LayerRouting(self.side, self.layer, **chosen)

    def grouped(self, group: NDArray[np.int64], groups: int) -> LayerRouting:
        """Add rows up.

        Args:
            group: (rows,) the new row of each old one.
            groups: how many new rows there are.
        """
        summed = {}
        for name in _SUMMED:
            values = getattr(self, name)
            if values is not None:
                summed[name] = np.zeros((groups, *values.shape[1:]), values.dtype)
                np.add.at(summed[name], group, values)
        return LayerRouting(self.side, self.layer, **summed)

    def _over_tokens(self, values: Counts | Sums) -> Sums:
        shares: Sums = values / np.maximum(self.tokens, 1)[:, None]
        return shares


_SUMMED = tuple(field.name for field in fields(LayerRouting) if field.name not in ("side", "layer"))
_COUNTED = ("tokens", "first", "second")


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """The routing of a model over some text."""

    rows: tuple[str, ...]
    """Directions as ``en-de``, or ``en-*`` and ``*-de`` where a table counts by language (`ANY`), or languages once
    they are grouped; the first axis of every array of the layers."""
    sentences: tuple[int, ...]
    """Segments of each row."""
    layers: tuple[LayerRouting, ...]
    """Every MoE layer, those of the encoder first."""
    model: str | None = None
    """What identifies the model: experts of other models have nothing to do with these. None: not known."""

    def merge(self, other: RoutingTable) -> RoutingTable:
        """Add a table of the same model over other text: afterwards every mean is weighted by tokens.

        Raises:
            DataError: the tables are of other models or layers.
        """
        if self.model and other.model and self.model != other.model:
            raise DataError(
                f"the tables are of two models, {self.model[:16]} and {other.model[:16]}, whose experts do not match"
            )
        shapes = [
            [(one.name, one.num_experts, one.cmr_gate is None) for one in table.layers] for table in (self, other)
        ]
        if shapes[0] != shapes[1]:
            raise DataError("the tables are of models with other MoE layers, or other numbers of experts")
        rows = tuple(dict.fromkeys((*self.rows, *other.rows)))
        layers = []
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            joined: dict[str, Any] = {
                name: None if (value := getattr(mine, name)) is None else np.concatenate([value, getattr(theirs, name)])
                for name in _SUMMED
            }
            layers.append(LayerRouting(mine.side, mine.layer, **joined))
        both = RoutingTable(
            (*self.rows, *other.rows), (*self.sentences, *other.sentences), tuple(layers), self.model or other.model
        )
        return both._sum_rows([rows.index(row) for row in both.rows], rows)

    def grouped(self, label: Callable[[str], str]) -> RoutingTable:
        """Add up the rows that get the same label; the new rows are the labels, sorted."""
        labels = [label(row) for row in self.rows]
        rows = tuple(sorted(set(labels)))
        return self._sum_rows([rows.index(one) for one in labels], rows)

    def by_source(self) -> RoutingTable:
        """Rows are source languages: what encoder layers depend on most."""
        return self.grouped(lambda direction: direction.partition("-")[0])._without(ANY)

    def by_target(self) -> RoutingTable:
        """Rows are target languages: what decoder layers depend on most."""
        return self.grouped(lambda direction: direction.partition("-")[2])._without(ANY)

    def _without(self, row: str) -> RoutingTable:
        if row not in self.rows:
            return self
        index = [place for place, name in enumerate(self.rows) if name != row]
        return RoutingTable(
            tuple(self.rows[place] for place in index),
            tuple(self.sentences[place] for place in index),
            tuple(layer.rows_of(index) for layer in self.layers),
            self.model,
        )

    def _sum_rows(self, group: Sequence[int], rows: tuple[str, ...]) -> RoutingTable:
        index = np.asarray(group, dtype=np.int64)
        sentences = np.zeros(len(rows), np.int64)
        np.add.at(sentences, index, np.asarray(self.sentences, dtype=np.int64))
        layers = tuple(layer.grouped(index, len(rows)) for layer in self.layers)
        return RoutingTable(rows, tuple(int(count) for count in sentences), layers, self.model)

    def to_json(self) -> dict[str, Any]:
        """Give plain values; sums have seven digits, which is what fp32 probabilities are worth."""
        layers = []
        for layer in self.layers:
            entry: dict[str, Any] = {"side": layer.side, "layer": layer.layer, "num_experts": layer.num_experts}
            for name in _SUMMED:
                values = getattr(layer, name)
                if values is not None:
                    values = values.tolist() if name in _COUNTED else _rounded(values)
                entry[name] = values
            layers.append(entry)
        return {
            "format": FORMAT,
            "model": self.model,
            "rows": list(self.rows),
            "sentences": list(self.sentences),
            "layers": layers,
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "the routing table") -> RoutingTable:
        """Read what `to_json` gave.

        Raises:
            DataError: it is of a newer format, or not such a table; the text names `where` it came from.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise DataError(f"{where} is not a routing table of a format that this version reads ({FORMAT})")
        try:
            rows, layers = tuple(map(str, value["rows"])), []
            for entry in value["layers"]:
                arrays = {name: _array(entry, name) for name in _SUMMED}
                layer = LayerRouting(str(entry["side"]), int(entry["layer"]), **arrays)
                _check(layer, len(rows), int(entry["num_experts"]))
                layers.append(layer)
            sentences = tuple(int(count) for count in value["sentences"])
            if len(sentences) != len(rows):
                raise ValueError(f"{len(sentences)} counts of sentences for {len(rows)} rows")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} is damaged: {error!r}") from error
        return cls(rows, sentences, tuple(layers), value.get("model"))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table as JSON, one line; a table of 402 directions and 128 experts would else be mostly blanks."""
        write_text(path, json.dumps(self.to_json(), allow_nan=False, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingTable:
        """Read a file that `save` wrote.

        Raises:
            DataError: it is missing, damaged or of a newer format.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a routing table: {error}") from error
        return cls.from_json(value, str(path))


def _array(entry: dict[str, Any], name: str) -> Any:
    if name == "cmr_gate" and entry[name] is None:
        return None
    return np.asarray(entry[name], dtype=np.int64 if name in _COUNTED else np.float64)


def _check(layer: LayerRouting, rows: int, num_experts: int) -> None:
    if layer.side not in SIDES:
        raise ValueError(f"side {layer.side!r}")
    for name in _SUMMED:
        values = getattr(layer, name)
        expected = (rows,) if name in ("tokens", "cmr_gate") else (rows, num_experts)
        if values is not None and values.shape != expected:
            raise ValueError(f"{name} of {layer.name} has shape {values.shape}, expected {expected}")


def _rounded(values: Sums) -> list[Any]:
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.7g}") for value in values]
