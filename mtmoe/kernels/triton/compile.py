"""Compile every kernel for GPUs that are not here, and look at what came out.

    python -m mtmoe.kernels.triton.compile                  # sm_80, sm_90 and sm_100
    python -m mtmoe.kernels.triton.compile --arch 90 --kernel forward

Prints registers a thread, spilled bytes, shared memory and the matrix instructions of each kernel at each of its tiles
for bf16; exits with 1 if one spills or lacks the matrix instruction of its architecture. A new kernel is one entry in
`KERNELS`. Needs no GPU: ptxas comes with Triton.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from mtmoe.kernels.triton import cross_entropy, gating, grouped_gemm, permute

MATRIX_INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Compute capability, times ten -> what a bf16 product must be made of there."""


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel with the types and constants that it is compiled for."""

    label: str
    """Tells this build from others of the same kernel."""
    kernel: Any
    """What ``@triton.jit`` returned."""
    types: dict[str, str]
    """Argument -> Triton's name of its type, ``*bf16`` for a pointer. All are taken as multiples of 16."""
    constants: dict[str, Any]
    """Argument -> its value: the constexprs, pointers that are None, and strides of 1."""
    num_warps: int = 4
    num_stages: int = 3
    multiplies: bool = False
    """It must use the architecture's matrix instructions."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled kernel needs."""

    registers: int
    """A thread."""
    spilled: int
    """Bytes a thread stores to local memory for want of registers."""
    shared: int
    """Bytes of shared memory a program."""
    instructions: frozenset[str]
    """Those of `MATRIX_INSTRUCTIONS` that it uses."""


def _row_products(product: str) -> Iterator[Build]:
    """The kernel of the forward product (relu or a kept gelu) or of the rows' gradient, at each of its tiles."""
    integers = ("num_experts", "N", "K", "rows_per_expert", "stride_expert", "stride_n", "stride_k")
    types = dict.fromkeys(("x", "weight", "y", "saved"), "*bf16") | dict.fromkeys(integers, "i32")
    types |= {"bias": "*fp32", "offsets": "*i64"}
    backward, save = product == "rows_gradient", product == "forward_saved"
    constants = {"SUM": tl.float32, "HAS_BIAS": not backward, "SAVE": save, "BLOCK_EXPERTS": 128}
    constants |= {"stride_n": 1, "bias": None} if backward else {"stride_k": 1}
    constants |= {} if save else {"saved": None}
    constants["ACTIVATION"] = None if backward else "gelu" if save else "relu"
    for tile in grouped_gemm.TILES[product]:
        yield _tiled(tile, grouped_gemm.multiply_rows_kernel, types, constants)


def _weight_gradient() -> Iterator[Build]:
    types = {"left": "*bf16", "right": "*bf16", "out": "*fp32", "offsets": "*i64", "M": "i32", "N": "i32"}
    types["rows_per_expert"] = "i32"
    for tile in grouped_gemm.TILES["weight_gradient"]:
        yield _tiled(tile, grouped_gemm.multiply_columns_kernel, types, {"SUM": tl.float32})


def _tiled(tile: grouped_gemm.Tile, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Build:
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    label = f"{tile.m}x{tile.n}x{tile.k}"
    return Build(label, kernel, types, constants | blocks, tile.num_warps, tile.num_stages, multiplies=True)


def _bias_gradient() -> Iterator[Build]:
    types = {"x": "*bf16", "out": "*fp32", "offsets": "*i64", "N": "i32"}
    yield Build("", grouped_gemm.sum_rows_kernel, types, {"SUM": tl.float32, **grouped_gemm.SUM_TILE})


def _permutations(kernel: Any, first_block: str, **constants: Any) -> Iterator[Build]:
    pointers = dict.fromkeys(("x", "y", "grad", "grad_y", "out"), "*bf16") | {"token": "*i64", "slot": "*i64"}
    pointers |= {"weight": "*fp32", "grad_weight": "*fp32"}
    types = pointers | dict.fromkeys(("D", "rows", "tokens"), "i32")
    for d_model in (512, 2048):
        block, columns = permute.block_shape(d_model)
        yield Build(f"d_model {d_model}", kernel, types, {first_block: block, "BLOCK_D": columns, **constants})


KERNELS: dict[str, Callable[[], Iterator[Build]]] = {
    "forward": lambda: _row_products("forward"),
    "forward_saved": lambda: _row_products("forward_saved"),
    "rows_gradient": lambda: _row_products("rows_gradient"),
    "weight_gradient": _weight_gradient,
    "bias_gradient": _bias_gradient,
    "dispatch": lambda: _permutations(permute.gather_rows_kernel, "BLOCK_R"),
    "dispatch_backward": lambda: _permutations(
        permute.sum_choices_kernel, "BLOCK_T", TOP_K=2, SUM=tl.float32, HAS_WEIGHT=False, weight=None
    ),
    "combine": lambda: _permutations(permute.sum_choices_kernel, "BLOCK_T", TOP_K=2, SUM=tl.float32, HAS_WEIGHT=True),
    "gate": lambda: (Build(**build) for build in gating.builds(backward=False)),
    "gate_backward": lambda: (Build(**build) for build in gating.builds(backward=True)),
    "cross_entropy": lambda: (Build(**build) for build in cross_entropy.builds()),
    "combine_backward": lambda: _permutations(permute.combine_backward_kernel, "BLOCK_T", TOP_K=2, SUM=tl.float32),
}
"""Name -> the builds of a kernel at its tuned tiles."""


def compile_build(build: Build, arch: int) -> Usage:
    """Compile for an architecture that need not be here.

    Args:
        build: what to compile.
        arch: compute capability times ten, such as 90.

    Returns:
        What the machine code uses, as ptxas reports it.
    """
    names = build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else build.types[name] for name in names}
    # As at run time when addresses and sizes are multiples of 16, so that loads are 16 bytes wide.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in build.constants and name != "rows_per_expert"
    }
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    source = ASTSource(build.kernel, signature, build.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return measure(compiled.asm["ptx"], arch, compiled.metadata.shared)


def measure(ptx: str, arch: int, shared: int) -> Usage:
    """Assemble PTX with the ptxas and the options that Triton uses, and read its report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(arch)}"]
        command += [str(path), "-o", str(path.with_suffix(".o"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas reported neither registers nor spills:\n{report}")
    found = frozenset(name for name in MATRIX_INSTRUCTIONS.values() if name in ptx)
    return Usage(int(registers[1]), int(spilled[1]), shared, found)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a table, and return 1 if a kernel spills or multiplies without matrix instructions."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(MATRIX_INSTRUCTIONS), help="default: all")
    parser.add_argument("--kernel", action="append", choices=sorted(KERNELS), help="default: all")
    parsed = parser.parse_args(arguments)
    if grouped_gemm.INTERPRETED.value:
        parser.error("TRITON_INTERPRET is set, so that kernels are interpreted instead of compiled; unset it")
    print("| kernel | tile | warps | stages | sm | registers | spilled bytes | shared bytes | matrix instruction |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    bad = []
    for name in parsed.kernel or KERNELS:
        for build in KERNELS[name]():
            for arch in parsed.arch or sorted(MATRIX_INSTRUCTIONS):
                usage = compile_build(build, arch)
                row = f"| {name} | {build.label} | {build.num_warps} | {build.num_stages} | {arch} | {usage.registers} "
                row += f"| {usage.spilled} | {usage.shared} | {', '.join(sorted(usage.instructions)) or '-'} |"
                print(row, flush=True)
                if usage.spilled or (build.multiplies and MATRIX_INSTRUCTIONS[arch] not in usage.instructions):
                    bad.append(row)
    if bad:
        print("spilled, or without the matrix instructions of the architecture:", *bad, sep="\n", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
