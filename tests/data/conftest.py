import textwrap
from pathlib import Path

import pytest

from mtmoe.data import load_recipe

WORDS = {
    "en": [
        "the",
        "a",
        "house",
        "tree",
        "runs",
        "big",
        "small",
        "red",
        "stone",
        "water",
        "green",
        "cold",
        "warm",
        "old",
        "new",
        "walks",
        "sees",
        "finds",
        "takes",
        "bread",
    ],
    "de": [
        "der",
        "ein",
        "Haus",
        "Baum",
        "rennt",
        "groß",
        "klein",
        "rot",
        "Stein",
        "Wasser",
        "grün",
        "kalt",
        "warm",
        "alt",
        "neu",
        "geht",
        "sieht",
        "findet",
        "nimmt",
        "Brot",
    ],
}


def sentence(language: str, number: int) -> str:
    """A sentence that no other number has."""
    words = WORDS[language]
    digits = [number // 20**place % 20 for place in range(4)]
    return " ".join(words[digit] for digit in digits)


@pytest.fixture
def write_recipe(tmp_path):
    """Writes a recipe around the given inputs, with settings fit for tiny text, and loads it."""

    def write(inputs: str, extra: str = "", languages: str = "[de, en]", vocabulary: str = "{size: 45}"):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"name: tiny\nsource: made up\nlicence: none\nlanguages: {languages}\n"
            f"vocabulary: {vocabulary}\n{textwrap.dedent(extra)}\n"
            f"inputs:\n{textwrap.indent(textwrap.dedent(inputs), '  ')}\n",
            encoding="utf-8",
        )
        return load_recipe(path)

    return write


@pytest.fixture
def moses(tmp_path, write_recipe):
    """A recipe of two Moses files with 200 pairs that split themselves."""
    for language in WORDS:
        lines = [sentence(language, number) for number in range(200)]
        (tmp_path / f"all.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return write_recipe(
        "- {type: moses, paths: [all.de, all.en], languages: [de, en], split: auto}",
        "auto_split: {valid_per_mille: 100, test_per_mille: 100}",
    )


@pytest.fixture
def snapshot():
    """Every file of a folder with its bytes."""

    def take(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }

    return take
