import pytest

from mtmoe.errors import DataError
from mtmoe.evaluation.test_sets import PreparedData, TestSet, digest, read_lines, write_lines


def test_directions_of_one_pair_are_mirrored(data):
    prepared = PreparedData(data)
    there, back = prepared.read("en-de", "test"), prepared.read("de-en", "test")
    assert (there.sources, there.references) == (back.references, back.sources)
    assert (there.source, there.target) == ("en", "de")
    assert there.sources[0].startswith("The file")


def test_limit_takes_the_first(data):
    prepared = PreparedData(data)
    assert prepared.read("en-de", "test", 2).sources == prepared.read("en-de", "test").sources[:2]
    assert len(prepared.read("en-de", "test", 0).sources) == 6


def test_only_a_newline_ends_a_line(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("a\u2028b\x0cc\r\n\nd\n".encode())
    assert read_lines(path) == ["a\u2028b\x0cc\r", "", "d"]
    path.write_text("")
    assert read_lines(path) == []


def test_a_line_break_in_an_output_becomes_a_space(tmp_path):
    write_lines(tmp_path / "text", ["a\nb", "", "c\rd\u2028"])
    assert read_lines(tmp_path / "text") == ["a b", "", "c d\u2028"]


def test_directions_without_text_are_left_out_unless_named(data):
    (data / "text" / "test.de-mk.mk").write_text("")
    prepared = PreparedData(data)
    assert prepared.choose_directions(None, "test") == ["de-en", "en-de", "en-mk", "mk-en"]
    assert prepared.choose_directions(("mk-en", "mk-en"), "test") == ["mk-en"]
    with pytest.raises(DataError, match=r"no test text for de-mk; it has: de-en, en-de, en-mk, mk-en"):
        prepared.choose_directions(("de-mk",), "test")
    with pytest.raises(DataError, match="no direction was named"):
        prepared.choose_directions((), "test")
    with pytest.raises(DataError, match="split 'train' is unknown; choose one of: test, valid"):
        prepared.choose_directions(None, "train")


def test_damaged_data_is_told_with_file_and_line(data):
    side = data / "text" / "test.de-en.en"
    side.write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"test\.de-en\.de has 6 lines and .*test\.de-en\.en has 2"):
        PreparedData(data).read("de-en", "test")
    side.write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(DataError, match=r"test\.de-en\.en:3: not UTF-8"):
        PreparedData(data).read("de-en", "test")
    (data / "languages.json").write_text("{")
    with pytest.raises(DataError, match=r"languages\.json .* is not JSON"):
        PreparedData(data)
    (data / "languages.json").write_text("{}")
    with pytest.raises(DataError, match="lacks 'languages'"):
        PreparedData(data)
    (data / "languages.json").unlink()
    with pytest.raises(DataError, match=r"languages\.json does not exist; .*mtmoe prepare"):
        PreparedData(data)


def test_fingerprint_tells_every_change():
    base = TestSet("en-de", ["a", "b"], ["c", "d"])
    others = [
        TestSet("de-en", ["a", "b"], ["c", "d"]),
        TestSet("en-de", ["b", "a"], ["c", "d"]),
        TestSet("en-de", ["a", "b"], ["c", "e"]),
        TestSet("en-de", ["a"], ["c"]),
        TestSet("en-de", ["a", "b", "c"], ["d"]),
    ]
    assert len({one.fingerprint for one in (base, *others)}) == 6
    assert digest(["ab", "c"]) != digest(["a", "bc"])
