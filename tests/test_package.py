"""What the package promises from outside: a quick import, and imports that point inwards."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "fairseq", "fastapi", "polars", "sentencepiece", "sacrebleu", "transformers"}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


def loaded_by(module: str) -> set[str]:
    return set(python(f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})").split())


def test_import_is_quick_and_light():
    start = time.perf_counter()
    loaded = loaded_by("mtmoe")
    seconds = time.perf_counter() - start
    assert not loaded & HEAVY
    assert seconds < 5  # with the interpreter's own start; torch alone takes that long on a busy machine


@pytest.mark.parametrize("module", ["mtmoe.cli", "mtmoe.errors", "mtmoe.files"])
def test_light_modules(module):
    assert not loaded_by(module) & HEAVY


def test_the_layer_needs_no_trainer_and_no_service():
    assert not loaded_by("mtmoe.moe") & {
        "fairseq",
        "fairseq_plugins",
        "fastapi",
        "sentencepiece",
        "sacrebleu",
        "polars",
    }


def test_version_is_that_of_the_metadata():
    from importlib.metadata import version

    import mtmoe

    assert mtmoe.__version__ == version("mtmoe")


def test_import_contracts_hold():
    """import-linter on the contracts of pyproject.toml; `lint-imports` on the command line does the same."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_module_is_named_for_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    found = [
        path for folder in ("mtmoe", "fairseq_plugins") for path in (ROOT / folder).rglob("*.py") if path.stem in vague
    ]
    assert not found


def test_every_package_tells_what_it_is_for():
    silent = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "mtmoe").rglob("*.py")
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent
