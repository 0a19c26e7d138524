"""Metadata and dependencies of mtmoe; requirements.lock pins the exact versions that are tested."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["ve-fairseq==0.12.3", "rich>=13"]
EVAL = ["sacrebleu>=2.4", "py3langid>=0.3", "matplotlib>=3.8", "regex>=2024.1"]
SERVE = ["fastapi>=0.110", "uvicorn>=0.29", "pydantic>=2"]
DEV = [
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

setup(
    name="mtmoe",
    version="0.1.0",
    description="Train, shrink and serve multilingual Mixture-of-Experts translation models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["mtmoe", "mtmoe.*", "fairseq_plugins", "fairseq_plugins.*"]),
    package_data={"mtmoe": ["py.typed", "**/*.tsv"]},
    install_requires=["torch>=2.6", "numpy>=1.26", "pyyaml>=6", "safetensors>=0.4", "sentencepiece>=0.2", "tqdm>=4.60"],
    extras_require={"train": TRAIN, "eval": EVAL, "serve": SERVE, "dev": DEV, "all": TRAIN + EVAL + SERVE + DEV},
    entry_points={"console_scripts": ["mtmoe = mtmoe.cli:main"]},
)
