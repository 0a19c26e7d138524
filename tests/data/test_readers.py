import bz2
import gzip
import json
import lzma

import pytest

from mtmoe.data import prepare
from mtmoe.data.readers import READERS
from mtmoe.data.recipe import Input
from mtmoe.data.rows import Row
from mtmoe.data.textfile import read_lines
from mtmoe.errors import DataError

PAIRS = {("de", "en")}
TSV = Input(type="tsv", path="x", columns=("language_a", "language_b", "text_a", "text_b"))


def read(source, *paths):
    return list(READERS[source.type](source, list(paths), PAIRS))


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_tsv_plain_and_packed(tmp_path, suffix, opener):
    path = tmp_path / f"x.tsv{suffix}"
    with opener(path, "wb") as stream:
        stream.write("\ufeffeng\tdeu\tone\u2028two\teins\r\nfra\teng\tun\tone\n".encode())
    assert read(TSV, path) == [Row("train", "en", "de", "one\u2028two", "eins")]


def test_tsv_with_fixed_languages(tmp_path):
    source = Input(type="tsv", path="x", columns=("text_b", "ignore", "text_a"), languages=("en", "de"), split="test")
    (tmp_path / "x").write_text("eins\t0.9\tone\n")
    assert read(source, tmp_path / "x") == [Row("test", "en", "de", "one", "eins")]


def test_verses_join_on_the_key(tmp_path):
    source = Input(type="verses", path="x", columns=("language", "key", "text"))
    path = tmp_path / "x"
    path.write_text("eng\t1\tone\neng\t2\ttwo\ndeu\t2\tzwei\ndeu\t3\tdrei\nfra\t2\tdeux\n")
    assert read(source, path) == [Row("train", "de", "en", "zwei", "two")]
    path.write_text("eng\t1\tone\neng\t1\ttwo\n")
    with pytest.raises(DataError, match="x, line 2: language 'eng' has the key '1' twice"):
        read(source, path)


def test_moses(tmp_path):
    source = Input(type="moses", paths=("a", "b"), languages=("en", "de"))
    (tmp_path / "a").write_text("one\n\ntwo")
    (tmp_path / "b").write_text("eins\nleer\nzwei\n")
    rows = read(source, tmp_path / "a", tmp_path / "b")
    assert [(row.text_a, row.text_b) for row in rows] == [("one", "eins"), ("", "leer"), ("two", "zwei")]
    (tmp_path / "b").write_text("eins\n")
    with pytest.raises(
        DataError, match=r"a, line 2: .*b ends after line 1; the two files must have equally many lines"
    ):
        read(source, tmp_path / "a", tmp_path / "b")


def test_jsonl(tmp_path):
    fields = {"text_a": "translation.en", "text_b": "translation.de"}
    source = Input(type="jsonl", path="x", fields=fields, languages=("en", "de"))
    path = tmp_path / "x"
    path.write_text(json.dumps({"translation": {"en": "one", "de": "eins"}}) + "\n")
    assert read(source, path) == [Row("train", "en", "de", "one", "eins")]
    named = Input(type="jsonl", path="x", fields={"text_a": "s", "text_b": "t", "language_a": "sl", "language_b": "tl"})
    path.write_text('{"s": "one", "t": "eins", "sl": "eng_Latn", "tl": "de"}\n')
    assert read(named, path) == [Row("train", "en", "de", "one", "eins")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"translation": {"en": "x"}}', "line 2: there is no field 'translation.de'"),
        ('{"translation": {"en": "x", "de": 3}}', "line 2: the field 'translation.de' is no text"),
        ("[]", "line 2: there is no field 'translation.en'"),
    ],
)
def test_broken_jsonl(tmp_path, line, message):
    fields = {"text_a": "translation.en", "text_b": "translation.de"}
    source = Input(type="jsonl", path="x", fields=fields, languages=("en", "de"))
    (tmp_path / "x").write_text('{"translation": {"en": "one", "de": "eins"}}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(source, tmp_path / "x")


GOOD_LINE = b"eng\tdeu\ta house\tein Haus\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", GOOD_LINE * 2 + b"eng\tdeu\tonly one\n", r"x\.tsv, line 3: 3 columns, the recipe says 4"),
        ("x.tsv", GOOD_LINE + b"\n", r"x\.tsv, line 2: 1 columns"),
        ("x.tsv", GOOD_LINE + b"eng\tdeu\tcaf\xe9\tein Cafe\n", r"x\.tsv, line 2: not UTF-8 \(byte 0xe9 at place 12\)"),
        ("x.tsv", GOOD_LINE + b"eng\tdeuu\ta\tb\n", r"x\.tsv, line 2: language 'deuu' is unknown; did you mean"),
        ("x.tsv.xz", lzma.compress(GOOD_LINE * 999)[:-30], r"x\.tsv\.xz, after line \d+: .*damaged or cut short"),
        ("x.tsv.gz", gzip.compress(GOOD_LINE * 999)[:-9], r"x\.tsv\.gz, after line \d+: .*damaged or cut short"),
        ("x.tsv.bz2", bz2.compress(GOOD_LINE * 999)[:-9], r"x\.tsv\.bz2, after line \d+: .*damaged or cut short"),
        ("x.tsv.gz", GOOD_LINE, r"x\.tsv\.gz, after line 0: .*Not a gzipped file"),
        ("x.tsv.zst", b"", r"\.zst files are not read; unpack it first"),
        ("x.tsv", None, r"x\.tsv: there is no such file"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_file_stops_before_anything_is_written(tmp_path, write_recipe, name, content, message, split):
    (tmp_path / "good.tsv").write_bytes(GOOD_LINE)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    columns = "columns: [language_a, language_b, text_a, text_b]"
    recipe = write_recipe(
        f"- {{type: tsv, path: good.tsv, {columns}}}\n- {{type: tsv, path: {name}, split: {split}, {columns}}}"
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        prepare(recipe, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_sum(tmp_path, write_recipe):
    (tmp_path / "x.tsv").write_bytes(GOOD_LINE)
    recipe = write_recipe(
        f"- {{type: tsv, path: x.tsv, sha256: '{'0' * 64}', columns: [language_a, language_b, text_a, text_b]}}"
    )
    with pytest.raises(DataError, match=r"x\.tsv: sha256 is [0-9a-f]{64}, the recipe says 0{64}"):
        prepare(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_read_lines_without_final_newline(tmp_path):
    (tmp_path / "x").write_bytes(b"a\n\nb")
    assert list(read_lines(tmp_path / "x")) == [(1, "a"), (2, ""), (3, "b")]
