"""Metrics against their definitions expert by expert, and whose tokens a scope counts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.routing import make_table

from mtmoe.checkpoint.expert_scores import METRICS, Scope, expert_usage, first_choices, score_experts
from mtmoe.errors import DataError, UnknownLanguage
from mtmoe.routing_table import LayerRouting, RoutingTable

ROWS = ("de-en", "en-de", "en-ro", "ro-en")


def slow_metric(name, top1, top2, conf1, mean):
    """One expert, by METHODS' definitions in plain numbers."""
    return {
        "top1": top1,
        "top2": top1 + top2,
        "confidence": conf1,
        "mean": mean,
        "load-balance": top1 * mean,
        "importance": top1 * math.exp(conf1),
        "importance-plain": top1 * conf1,
        "importance-load-balance": top1 * math.exp(mean),
    }[name]


@given(name=st.sampled_from(sorted(METRICS)), seed=st.integers(0, 99), row=st.sampled_from(ROWS))
def test_metrics_of_one_direction(name, seed, row):
    table = make_table(ROWS, seed)
    scores = score_experts(table, name, Scope.of(table, "pair", directions=[row]))
    place = ROWS.index(row)
    for layer in table.layers:
        tokens = layer.tokens[place]
        for expert in range(layer.num_experts):
            chosen = layer.first[place, expert]
            wanted = slow_metric(
                name,
                chosen / tokens,
                layer.second[place, expert] / tokens,
                layer.first_probability[place, expert] / chosen if chosen else 0.0,
                layer.probability[place, expert] / tokens,
            )
            assert scores[layer.side, layer.layer][expert] == pytest.approx(wanted)


def test_language_scope_takes_the_encoder_by_source_and_the_decoder_by_target():
    table = make_table(ROWS, 3)
    scope = Scope.of(table, "language", directions=["de-ro"])  # a direction that no row has
    scores = score_experts(table, "top1", scope)
    encoder, decoder = table.layers
    np.testing.assert_allclose(scores["encoder", 0], encoder.first[0] / encoder.tokens[0])
    np.testing.assert_allclose(scores["decoder", 1], decoder.first[2] / decoder.tokens[2])
    # English is the source of two rows: its tokens count alike, wherever they go.
    english = score_experts(table, "top1", Scope.of(table, "language", directions=["en-ro"]))
    np.testing.assert_allclose(english["encoder", 0], encoder.first[1:3].sum(axis=0) / encoder.tokens[1:3].sum())


def test_several_languages_count_alike_however_much_text_they_have():
    big, small = np.array([[90, 0, 10]]), np.array([[0, 1, 0]])
    counts = np.concatenate([big, small])
    zeros = np.zeros_like(counts)
    layer = LayerRouting("decoder", 0, counts.sum(axis=1), counts, zeros, counts * 0.5, zeros * 0.5, counts * 0.5)
    table = RoutingTable(("en-de", "en-ro"), (9, 1), (layer,))
    for kind in ("language", "set"):
        scores = score_experts(table, "top1", Scope.of(table, kind, languages=["de", "en", "ro"]) if kind == "set"
                               else Scope.of(table, kind, directions=["en-de", "en-ro"]))  # fmt: skip
        np.testing.assert_allclose(scores["decoder", 0], [0.45, 0.5, 0.05])


def test_which_rows_a_scope_counts():
    table = make_table(ROWS)
    assert Scope.of(table, "global").directions == ROWS
    assert Scope.of(table, "set", languages=["de", "en"]).directions == ("de-en", "en-de")
    assert Scope.of(table, "set", directions=["en-de"]).directions == ("de-en", "en-de")
    assert Scope.of(table, "pair", directions=["en-de"]).directions == ("en-de",)
    assert Scope.of(table, "language", languages=["ro", "de"]).directions == ()
    usage, first = (of(table, Scope.of(table, "global")) for of in (expert_usage, first_choices))
    for layer in table.layers:
        key = (layer.side, layer.layer)
        np.testing.assert_allclose(first[key], layer.top1.mean(axis=0))
        np.testing.assert_allclose(usage[key], (layer.top1 + layer.top2).mean(axis=0))


def test_tables_by_language():
    table = make_table(["de-*", "en-*", "*-de", "*-en"])
    # As `mtmoe routing --by language` counts: a row of the one side has no tokens in layers of the other.
    for layer, empty in zip(table.layers, ([2, 3], [0, 1]), strict=True):
        for values in (layer.tokens, layer.first, layer.second, layer.first_probability, layer.probability):
            values[empty] = 0
    scope = Scope.of(table, "language", directions=["de-en"])
    scores = score_experts(table, "top1", scope)
    np.testing.assert_allclose(scores["encoder", 0], table.layers[0].top1[0])
    np.testing.assert_allclose(scores["decoder", 1], table.layers[1].top1[3])
    everything = score_experts(table, "top1", Scope.of(table, "global"))
    np.testing.assert_allclose(everything["decoder", 1], table.layers[1].top1[2:].mean(axis=0))
    with pytest.raises(DataError, match=r"there is none of de-en; it has: languages only"):
        Scope.of(table, "pair", directions=["de-en"])


def test_random_scores_depend_on_the_seed_only():
    table, other = make_table(ROWS, 1), make_table(ROWS, 2)
    scope = Scope.of(table, "global")
    one, same, third = (
        score_experts(each, "random", scope, seed=seed) for each, seed in ((table, 1), (other, 1), (table, 2))
    )
    np.testing.assert_array_equal(one["encoder", 0], same["encoder", 0])
    assert not np.array_equal(one["encoder", 0], third["encoder", 0])


def test_errors():
    table = make_table(ROWS)
    with pytest.raises(UnknownLanguage, match="no language hu; it has: de, en, ro"):
        Scope.of(table, "language", languages=["de", "hu"])
    with pytest.raises(DataError, match="there is none among de, ro; it has: de-en"):
        Scope.of(table, "set", languages=["de", "ro"])
    with pytest.raises(ValueError, match="scope='all' is unknown; choose one of: language, pair, set, global"):
        Scope.of(table, "all")
    with pytest.raises(ValueError, match="needs either languages or directions"):
        Scope.of(table, "pair")
    with pytest.raises(ValueError, match="give neither"):
        Scope.of(table, "global", languages=["de"])
    with pytest.raises(ValueError, match="metric='best' is unknown; choose one of: top1"):
        score_experts(table, "best", Scope.of(table, "global"))
    table.layers[1].tokens[0] = 0
    with pytest.raises(DataError, match="routing of decoder 1 has no token of de-en"):
        score_experts(table, "top1", Scope.of(table, "pair", directions=["de-en"]))
