from pathlib import Path

import pytest

from mtmoe.data import load_recipe
from mtmoe.errors import ConfigError

GOOD = """
name: x
source: s
licence: l
languages: [en, de]
inputs:
  - {type: moses, paths: [a, b], languages: [en, de]}
"""


@pytest.fixture
def load(tmp_path):
    def loader(text):
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path)

    return loader


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "vocab: {}\n", r"r\.yaml: vocab: unknown key; the keys here are: name, source,.*vocabulary"),
        (GOOD + "vocabulary: {sise: 3}\n", r"vocabulary\.sise: unknown key; the keys here are: size, model"),
        (GOOD + "folder: /\n", "folder: unknown key"),
        (GOOD.replace("[a, b]", "[a]"), r"inputs\[0\]: paths: moses needs two files, got 1"),
        (GOOD.replace("moses", "mose"), "type: 'mose' is unknown; choose one of: tsv, verses, moses, jsonl, wheel"),
        (GOOD.replace("name: x", "name: 3"), "name: expected str, got 3"),
        (GOOD.replace("name: x", ""), "name: this key is missing"),
        (GOOD.replace("[en, de]\ninputs", "[en, no]\ninputs"), r"languages\[1\]: expected str, got False; quote it"),
        (GOOD.replace("[en, de]\ninputs", "[en, gerrman]\ninputs"), "language 'gerrman' is unknown; did you mean 'de'"),
        (GOOD.replace("[en, de]\ninputs", "[en, eng]\ninputs"), "at least two different ones"),
        (GOOD + "pairs: [en-fr]\n", "pairs: 'en-fr' is not two of the languages en, de"),
        (GOOD + "cleaning: {max_characters: true}\n", "max_characters: expected int, got True"),
        (GOOD + "cleaning: {duplicates: fuzzy}\n", "duplicates: 'fuzzy' is unknown; choose one of: normalised"),
        (GOOD + "cleaning: {min_script_share: 2}\n", "min_script_share: 2.0 must be between 0 and 1"),
        (GOOD + "cleaning: {max_ratio: -1}\n", "must not be negative"),
        (GOOD + "test: {limit: 0}\n", "limit: 0 must be at least 1"),
        (GOOD + "train: {limits: {de-en: 0}}\n", "limit: 0 must be at least 1"),
        (GOOD + "train: {limits: {en-fr: 5}}\n", "train.limits: 'en-fr' is none of the pairs"),
        (GOOD + "vocabulary: {model: word}\n", "model: 'word' is unknown"),
        (GOOD + "vocabulary: {temperature: 0}\n", "temperature > 0"),
        (GOOD + "resource: {high: 1, low: 2}\n", "low=2 must be between 0 and high=1"),
        (GOOD + "resource: {languages: {de: rich}}\n", "'rich' is unknown"),
        (GOOD + "auto_split: {valid_per_mille: 999, test_per_mille: 1}\n", "must leave something"),
        (GOOD + "test: 3\n", "test: expected a mapping of keys, got 3"),
        (GOOD.replace("languages: [en, de]}", "languages: [en, en]}"), "both sides are 'en'"),
        ("a: [", "not a readable YAML file"),
        ("", "expected a mapping of keys, got None"),
        (GOOD.split("inputs")[0] + "inputs: []", "inputs: give at least one"),
        (GOOD.split("  -")[0] + "  - {type: tsv, path: x}", r"inputs\[0\]: type 'tsv' needs columns"),
        (GOOD.split("  -")[0] + "  - {type: tsv, path: x, columns: [text_a, texts]}", "columns: 'texts' is unknown"),
        (GOOD.split("  -")[0] + "  - {type: tsv, path: x, columns: [text_a, text_a]}", "a name stands twice"),
        (GOOD.split("  -")[0] + "  - {type: tsv, path: x, columns: [text_a, ignore]}", "text_b must be among them"),
        (GOOD.split("  -")[0] + "  - {type: tsv, path: x, columns: [text_a, text_b]}", "name the two sides"),
        (GOOD.split("  -")[0] + "  - {type: verses, path: x, columns: [key, text]}", "language must be among them"),
        (GOOD.split("  -")[0] + "  - {type: jsonl, path: x, fields: {text: a}}", "fields: 'text' is unknown"),
        (GOOD.split("  -")[0] + "  - {type: jsonl, path: x, fields: {text_a: a}}", "text_a and text_b must be named"),
        (GOOD.split("  -")[0] + "  - {type: wheel, package: x}", "needs version, file, sha256"),
        (GOOD.replace("languages: [en, de]}", "languages: [en, de], split: dev}"), "split: 'dev' is unknown"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_pairs_patterns(load):
    text = GOOD.replace("[en, de]\ninputs", "[eng, deu, fr]\ninputs")
    assert load(text).wanted_pairs() == (("de", "en"), ("de", "fr"), ("en", "fr"))
    assert load(text + "pairs: [en-*]").wanted_pairs() == (("de", "en"), ("en", "fr"))
    assert load(text + "pairs: [fra-de]").wanted_pairs() == (("de", "fr"),)


def test_resource_levels(load):
    resource = load(GOOD + "resource: {high: 100, low: 10, languages: {deu: very_low}}").resource
    assert [resource.level("en", n) for n in (100, 99, 10, 9)] == ["high", "low", "low", "very_low"]
    assert resource.level("de", 1000) == "very_low"


@pytest.mark.parametrize("name", ["quickstart", "tatoeba20", "bible16", "sample"])
def test_shipped_recipes_load(name):
    recipe = load_recipe(Path(__file__).parents[2] / "data" / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.licence
    for source in recipe.inputs:
        assert source.type == "wheel" or (recipe.folder / source.path).exists()
