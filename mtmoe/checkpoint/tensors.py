"""Weights by name that are read or computed only when asked for, whole or some rows (experts) of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtmoe.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats of a model's weights by their short names."""

STORED_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names of number formats."""


class LazyTensors(Mapping[str, Tensor]):
    """A mapping of weights that knows their shapes without having them in memory."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The number format of a weight."""

    @abstractmethod
    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Some rows of a weight, such as the experts from `begin` to before `end`; nothing else of it is read.

        Returns:
            (end - begin, …).
        """


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a weight, without reading it where `tensors` are lazy."""
    return tensors.shape(name) if isinstance(tensors, LazyTensors) else tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    """The number format of a weight, without reading it where `tensors` are lazy."""
    return tensors.dtype(name) if isinstance(tensors, LazyTensors) else tensors[name].dtype


def rows_of(tensors: Mapping[str, Tensor], name: str, begin: int, end: int) -> Tensor:
    """Rows of a weight, (end - begin, …); of a lazy one no others are read."""
    return tensors.rows(name, begin, end) if isinstance(tensors, LazyTensors) else tensors[name][begin:end]


def count_of(tensors: Mapping[str, Tensor], name: str) -> int:
    """The numbers that a weight has."""
    return torch.Size(shape_of(tensors, name)).numel()


class FileTensors(LazyTensors):
    """The weights of safetensors files, mapped into memory: the system reads a page when it is touched.

    Args:
        files: weight -> the file that has it.

    Raises:
        CheckpointError: a file is missing or damaged, lacks a weight or has one that `files` does not name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._open = {path: _open(path) for path in sorted(set(files.values()))}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path, file in self._open.items():
            expected = {name for name, where in self._files.items() if where == path}
            missing, unknown = sorted(expected - set(file.keys())), sorted(set(file.keys()) - expected)
            if missing or unknown:
                parts = [f"lacks {', '.join(missing)}"] * bool(missing)
                parts += [f"has {', '.join(unknown)}, which the index has elsewhere or not at all"] * bool(unknown)
                raise CheckpointError(f"{path} {' and '.join(parts)}; copy the model again from where it is whole")
            for name in expected:
                self._describe(path, name)

    def _describe(self, path: Path, name: str) -> None:
        part = self._open[path].get_slice(name)
        if part.get_dtype() not in STORED_DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {part.get_dtype()}, known are {', '.join(STORED_DTYPES)}; update mtmoe"
            )
        self._shapes[name], self._dtypes[name] = tuple(part.get_shape()), STORED_DTYPES[part.get_dtype()]

    @classmethod
    def of_file(cls, path: Path) -> FileTensors:
        """All weights of one file.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return cls(dict.fromkeys(_open(path).keys(), path))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(self._open)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._files[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """See `LazyTensors.shape`."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """See `LazyTensors.dtype`."""
        return self._dtypes[name]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """See `LazyTensors.rows`."""
        tensor: Tensor = self._open[self._files[name]].get_slice(name)[begin:end]
        return tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a weight comes about."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]
    """(begin, end) -> these rows, (end - begin, …)."""


class ComputedTensors(LazyTensors):
    """Weights that are computed each time they are asked for; only the one at hand takes memory.

    Args:
        recipes: weight -> how it is made; each has at least one dimension.
    """

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self._recipes = dict(recipes)

    def __getitem__(self, name: str) -> Tensor:
        recipe = self._recipes[name]
        return recipe.rows(0, recipe.shape[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def shape(self, name: str) -> tuple[int, ...]:
        """See `LazyTensors.shape`."""
        return self._recipes[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """See `LazyTensors.dtype`."""
        return self._recipes[name].dtype

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """See `LazyTensors.rows`."""
        return self._recipes[name].rows(begin, end)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> ComputedTensors:
    """The same weights in another floating-point format.

    Raises:
        CheckpointError: when such a weight is asked for: it has a number that is too large for `dtype`.
    """

    def convert(name: str, begin: int, end: int) -> Tensor:
        given = rows_of(tensors, name, begin, end)
        converted = given.to(dtype)
        if bool((converted.isinf() & given.isfinite()).any()):
            largest = float(given.abs().max())
            raise CheckpointError(
                f"{name} has numbers up to {largest:g}, {dtype} ends at {torch.finfo(dtype).max:g}; choose bf16 or fp32"
            )
        return converted

    return ComputedTensors(
        {
            name: Recipe(shape_of(tensors, name), dtype, lambda begin, end, name=name: convert(name, begin, end))  # type: ignore[misc]
            for name in tensors
        }
    )


def dtypes_of(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, int]:
    """Numbers by format, as {"fp32": 1000}; the most frequent format first."""
    short = {dtype: name for name, dtype in DTYPES.items()}
    counts: dict[str, int] = {}
    for name in tensors if names is None else names:
        dtype = dtype_of(tensors, name)
        label = short.get(dtype, str(dtype).removeprefix("torch."))
        counts[label] = counts.get(label, 0) + count_of(tensors, name)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; copy the model again from where it is whole") from error
        raise CheckpointError(f"{path} is damaged: {error}; copy it again from where it is whole") from error
