import re
from pathlib import Path

import pytest
import torch

from mtmoe.kernels import extension

SOURCES = Path(extension.__file__).parent / "csrc"


def test_the_list_of_operators_is_that_of_the_sources():
    defined = {name for path in SOURCES.glob("*.cpp") for name in re.findall(r'm\.def\(\s*"(\w+)\(', path.read_text())}
    assert set(extension.OPERATORS) | {"compiled_for"} == defined


@pytest.mark.skipif(not extension.available(), reason="the C++ extension is not compiled")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OPERATORS", ("dropout", "newer"), "was compiled from other sources, it lacks newer; install mtmoe again"),
        ("torch", None, "was compiled for torch"),
    ],
)
def test_one_that_does_not_fit_is_left_alone(monkeypatch, caplog, name, value, message):
    if name == "torch":
        monkeypatch.setattr(torch, "__version__", "1.0.0+cpu")
    else:
        monkeypatch.setattr(extension, name, value)
    fits = extension.available.__wrapped__()
    assert (fits, message in caplog.text) == (False, True)
