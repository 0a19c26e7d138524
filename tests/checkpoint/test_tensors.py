"""Writing and reading safetensors: against the library's own reader, over any shapes and formats."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtmoe.checkpoint import safetensors_file
from mtmoe.checkpoint.safetensors_file import write_safetensors
from mtmoe.checkpoint.tensors import STORED_DTYPES, ComputedTensors, FileTensors, Recipe, cast, dtypes_of, rows_of
from mtmoe.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from(list(STORED_DTYPES.values()))
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)


def drawn(shape, dtype, seed) -> torch.Tensor:
    """Any bits at all, NaN included; of a bool only what is one."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


@settings(max_examples=60, deadline=None)
@given(weights=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=5), chunk=st.integers(1, 50))
def test_any_weights_come_back_to_the_bit(tmp_path_factory, weights, chunk):
    tensors = {name: drawn(*weight, seed) for seed, (name, weight) in enumerate(weights.items())}
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "CHUNK_BYTES", chunk)
        digest = write_safetensors(path, tensors, list(tensors))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for found in (load_file(path), FileTensors.of_file(path)):
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    lazy = FileTensors.of_file(path)
    for name, tensor in tensors.items():
        assert (lazy.shape(name), lazy.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        if tensor.dim() and len(tensor) > 1:
            assert same_bits(rows_of(lazy, name, 1, len(tensor)), tensor[1:])


def test_reads_what_the_library_writes(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(2).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = FileTensors.of_file(tmp_path / "x.safetensors")
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert dtypes_of(found) == {"fp32": 6, "bf16": 2}


def test_a_file_that_lacks_or_has_too_much(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors lacks c and has b, which the index has elsewhere"):
        FileTensors({"a": path, "c": path})
    with pytest.raises(CheckpointError, match=r"y\.safetensors does not exist"):
        FileTensors({"a": tmp_path / "y.safetensors"})


def test_casting_is_torchs_and_refuses_what_does_not_fit():
    tensors = {"a": torch.tensor([1e-9, 1.00390625, 70000.0]), "b": torch.tensor([float("inf")])}
    half = cast(tensors, torch.bfloat16)
    assert torch.equal(half["a"], tensors["a"].bfloat16())
    assert half.dtype("a") == torch.bfloat16
    narrow = cast(tensors, torch.float16)
    assert narrow["b"].isinf().all()  # it was so before
    assert torch.equal(narrow.rows("a", 0, 2), tensors["a"][:2].half())
    with pytest.raises(CheckpointError, match=r"a has numbers up to 70000, .* ends at 65504; choose bf16 or fp32"):
        narrow["a"]


def test_computed_weights_are_made_when_asked_for():
    asked = []

    def rows(begin: int, end: int) -> torch.Tensor:
        asked.append((begin, end))
        return torch.arange(begin, end)

    tensors = ComputedTensors({"a": Recipe((4,), torch.int64, rows)})
    assert (list(tensors), len(tensors), tensors.shape("a")) == (["a"], 1, (4,))
    assert "a" in tensors and "b" not in tensors
    assert asked == []
    assert tensors["a"].tolist() == [0, 1, 2, 3]
    assert tensors.rows("a", 1, 2).tolist() == [1]
    assert asked == [(0, 4), (1, 2)]
