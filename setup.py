"""Metadata and dependencies of mtmoe; requirements.lock pins the exact versions that are tested."""

import os
import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["ve-fairseq==0.12.3", "rich>=13"]
EVAL = ["sacrebleu>=2.4", "py3langid>=0.3", "matplotlib>=3.8", "regex>=2024.1"]
SERVE = ["fastapi>=0.110", "uvicorn>=0.29", "pydantic>=2"]
HERE = Path(__file__).parent
GPU = ["triton>=3.4"]
DEV = [
    *GPU,  # its interpreter runs the GPU kernels in the tests
    "hypothesis>=6.100",
    "import-linter>=2.0",
    "mypy>=1.10",
    "pytest>=8",
    "pytest-cov>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "ruff>=0.5",
    "scipy>=1.11",
    "types-PyYAML",
    "types-tqdm",
]


def compile_in_parallel(compiler) -> None:
    """Let a distutils compiler work on one file for each core at a time; by itself it takes one after the other."""
    compile_one, compile_all = compiler._compile, compiler.compile

    def compile_files(*args, **options) -> list[str]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            running = []
            compiler._compile = lambda *file: running.append(pool.submit(compile_one, *file))
            try:
                objects = compile_all(*args, **options)
            finally:
                compiler._compile = compile_one
        for each in running:
            each.result()  # raises what the compiler raised
        return objects

    compiler.compile = compile_files


def extension() -> dict:
    """The compiled CPU kernels: left out where torch or a compiler is missing, since all works without them."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        message = "no torch here, so the CPU kernels are not compiled; pip needs --no-build-isolation for them"
        warnings.warn(message, stacklevel=2)
        return {}

    class Build(BuildExtension):
        """torch's, whose own way to use several cores would need ninja."""

        def build_extension(self, ext) -> None:
            compile_in_parallel(self.compiler)
            super().build_extension(ext)

    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "mtmoe/kernels/csrc").glob("*.cpp"))
    # The processor is asked before the file is loaded (mtmoe/kernels/extension.py).
    flags = ["-O3", "-fno-math-errno", "-fopenmp", "-march=x86-64-v4", "-mavx512bf16", "-DAT_PARALLEL_OPENMP=1",
             "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512",
             "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]  # fmt: skip
    module = CppExtension(
        "mtmoe.kernels._extension", sources, include_dirs=["mtmoe/kernels/csrc"], extra_compile_args=flags,
        extra_link_args=["-fopenmp"], optional=True,
    )  # fmt: skip
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


setup(
    name="mtmoe",
    version="0.1.0",
    description="Train, shrink and serve multilingual Mixture-of-Experts translation models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["mtmoe", "mtmoe.*", "fairseq_plugins", "fairseq_plugins.*"]),
    package_data={"mtmoe": ["py.typed", "**/*.tsv", "kernels/csrc/*"]},
    install_requires=["torch>=2.6", "numpy>=1.26", "pyyaml>=6", "safetensors>=0.4", "sentencepiece>=0.2", "tqdm>=4.60"],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "serve": SERVE,
        "gpu": GPU,
        "dev": DEV,
        "all": TRAIN + EVAL + SERVE + DEV,
    },
    **extension(),
    entry_points={"console_scripts": ["mtmoe = mtmoe.cli:main"]},
)
