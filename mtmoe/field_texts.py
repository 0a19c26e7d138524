"""What the fields of a dataclass mean, read from the text under each."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap


def field_texts(kind: type) -> dict[str, str]:
    """Name of each annotated field of a class -> the string that stands under it, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in itertools.pairwise(body.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts
