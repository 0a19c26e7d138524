"""Compiling for GPUs that are not here: in a process of its own, since this one interprets kernels."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from mtmoe.kernels.triton.compile import KERNELS, Build, main


def compile_kernels(*arguments):
    command = [sys.executable, "-m", "mtmoe.kernels.triton.compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow  # 40 s on an idle core
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_spill_nothing_and_use_the_matrix_instructions(arch):
    done = compile_kernels("--arch", str(arch))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert {row[0] for row in rows} == set(KERNELS)
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    for kernel, tile, _, _, row_arch, registers, spilled, shared, found in rows:
        assert row_arch == str(arch)
        assert 0 < int(registers) <= 255
        assert spilled == "0", (kernel, tile)
        assert 0 <= int(shared) <= {80: 163, 90: 227, 100: 227}[arch] * 1024  # what a program may have there
        assert found == (instruction if re.fullmatch(r"\d+x\d+x\d+", tile) else "-")


@pytest.mark.slow
def test_a_product_without_matrix_instructions_is_found(tmp_path):
    code = (
        "import sys, dataclasses; from mtmoe.kernels.triton import compile as c\n"
        "build = next(c.KERNELS['dispatch']())\n"
        "c.KERNELS['dispatch'] = lambda: iter([dataclasses.replace(build, multiplies=True)])\n"
        "sys.exit(c.main(['--kernel', 'dispatch', '--arch', '80']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "without the matrix instructions" in done.stderr


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_argument_of_a_kernel_has_a_type_or_a_value(name):
    builds = list(KERNELS[name]())
    assert builds
    for build in builds:
        assert isinstance(build, Build)
        for argument in build.kernel.arg_names:
            assert argument in build.types or argument in build.constants, argument


def test_an_interpreter_compiles_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["--arch", "80"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
