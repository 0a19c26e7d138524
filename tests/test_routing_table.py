"""Adding, grouping, writing and reading tables of routing."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.routing import make_table

from mtmoe.errors import DataError
from mtmoe.routing_table import LayerRouting, RoutingTable


def assert_equal(a, b):
    assert (a.rows, a.sentences, a.model) == (b.rows, b.sentences, b.model)
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert mine.name == theirs.name
        for name in ("tokens", "first", "second", "first_probability", "second_probability", "probability", "cmr_gate"):
            left, right = getattr(mine, name), getattr(theirs, name)
            if left is None or right is None:
                assert left is right
            else:
                np.testing.assert_allclose(left, right, rtol=1e-6, err_msg=name)


def test_merged_means_are_weighted_by_tokens():
    a, b = make_table(["de-en", "en-de"], 1), make_table(["mk-en", "de-en"], 2)
    merged = a.merge(b)
    assert merged.rows == ("de-en", "en-de", "mk-en")
    assert merged.sentences == (3, 2, 1)
    for mine, theirs, both in zip(a.layers, b.layers, merged.layers, strict=True):
        one, other = mine.tokens[0], theirs.tokens[1]
        for name in ("top1", "top2", "mean_probability", "experts_share"):
            expected = (one * getattr(mine, name)[0] + other * getattr(theirs, name)[1]) / (one + other)
            np.testing.assert_allclose(getattr(both, name)[0], expected)
        np.testing.assert_allclose(both.top1[1], mine.top1[1])
        np.testing.assert_allclose(both.top1.sum(axis=1), 1)


@given(order=st.permutations([0, 1, 2]))
def test_the_order_of_merging_changes_only_the_order_of_rows(order):
    tables = [make_table(["a-b", "b-a"], 1), make_table(["b-a", "c-a"], 2), make_table(["c-a"], 3)]
    merged = tables[order[0]].merge(tables[order[1]]).merge(tables[order[2]])
    whole = tables[0].merge(tables[1]).merge(tables[2])
    assert_equal(merged.grouped(lambda row: row), whole.grouped(lambda row: row))


def test_grouping_by_language():
    table = make_table(["de-en", "en-de", "mk-en"])
    source, target = table.by_source(), table.by_target()
    assert source.rows == ("de", "en", "mk")
    assert target.rows == ("de", "en")
    np.testing.assert_array_equal(target.layers[0].first[1], table.layers[0].first[0] + table.layers[0].first[2])
    assert target.sentences == (2, 1 + 3)
    np.testing.assert_array_equal(source.layers[1].tokens, table.layers[1].tokens)


def test_a_table_by_language_groups_as_one_by_direction_would():
    table = make_table(["de-*", "en-*", "*-de", "*-mk"])
    source, target = table.by_source(), table.by_target()
    assert (source.rows, target.rows) == (("de", "en"), ("de", "mk"))
    assert (source.sentences, target.sentences) == ((1, 2), (3, 4))
    np.testing.assert_array_equal(source.layers[0].first, table.layers[0].first[:2])
    np.testing.assert_array_equal(target.layers[1].probability, table.layers[1].probability[2:])


def test_confidence_is_over_the_tokens_that_chose():
    layer = LayerRouting(
        "encoder",
        0,
        tokens=np.array([4]),
        first=np.array([[3, 1, 0]]),
        second=np.array([[0, 2, 1]]),
        first_probability=np.array([[2.4, 0.5, 0.0]]),
        second_probability=np.array([[0.0, 0.6, 0.2]]),
        probability=np.array([[2.8, 0.9, 0.3]]),
    )
    np.testing.assert_allclose(layer.conf1, [[0.8, 0.5, 0.0]])
    np.testing.assert_allclose(layer.conf2, [[0.0, 0.3, 0.2]])
    np.testing.assert_allclose(layer.top1, [[0.75, 0.25, 0.0]])
    np.testing.assert_allclose(layer.mean_probability, [[0.7, 0.225, 0.075]])
    np.testing.assert_allclose(layer.load, [[3 / 7, 3 / 7, 1 / 7]])
    assert layer.experts_share is None


@pytest.mark.parametrize("cmr", [True, False])
def test_file_round_trip(tmp_path, cmr):
    table = make_table(["de-en", "en-de"], cmr=cmr)
    table.save(tmp_path / "routing.json")
    assert_equal(RoutingTable.load(tmp_path / "routing.json"), table)


def test_tables_that_do_not_belong_together():
    table = make_table(["de-en"])
    with pytest.raises(DataError, match="of two models, m and other"):
        table.merge(make_table(["de-en"], model="other"))
    with pytest.raises(DataError, match="other numbers of experts"):
        table.merge(make_table(["de-en"], experts=(4, 2)))
    with pytest.raises(DataError, match="other numbers of experts"):
        table.merge(make_table(["de-en"], cmr=False))


def test_damaged_files(tmp_path):
    path = tmp_path / "routing.json"
    with pytest.raises(DataError, match="cannot be read"):
        RoutingTable.load(path)
    good = make_table(["de-en", "en-de"]).to_json()
    for change, message in (
        ({"format": 2}, "format that this version reads"),
        ({"rows": ["de-en"]}, "tokens of encoder 0 has shape"),
        ({"sentences": [1]}, "1 counts of sentences for 2 rows"),
        ({"layers": [{**good["layers"][0], "side": "middle"}]}, "side 'middle'"),
        ({"layers": [{"side": "encoder"}]}, "damaged"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=message):
            RoutingTable.load(path)
