"""The pooled bootstrap against sacrebleu's scores and a loop over resamples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtmoe.errors import DataError
from mtmoe.evaluation.experiment.significance import Bootstrap, chrf_of, chrf_statistics, compare_groups
from mtmoe.evaluation.metrics import build_metric
from mtmoe.evaluation.significance import wilcoxon

texts = st.text(alphabet="ab c.ä", max_size=12)


@settings(max_examples=60)
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_scores_are_those_of_sacrebleu(pairs):
    outputs, references = map(list, zip(*pairs, strict=True))
    statistics = chrf_statistics(outputs, references, "de")
    expected = build_metric("chrf++", "de").corpus_score(outputs, [references]).score
    assert float(chrf_of(statistics.sum(axis=0))) == pytest.approx(expected, abs=1e-4)
    for index, (output, reference) in enumerate(pairs):
        alone = build_metric("chrf++", "de").corpus_score([output], [[reference]]).score
        assert float(chrf_of(statistics)[index]) == pytest.approx(alone, abs=1e-4)


def outputs_of(references, share, seed):
    rng = np.random.default_rng(seed)
    return {
        direction: [line if rng.random() > share else line[: len(line) // 2] for line in lines]
        for direction, lines in references.items()
    }


def test_the_difference_equals_a_loop_over_resamples(references):
    bootstrap = Bootstrap(references, samples=50, seed=3)
    outputs = {name: {s: outputs_of(references, share, s) for s in (1, 2)} for name, share in (("a", 0.6), ("b", 0.4))}
    scored = {name: {seed: bootstrap.run(one) for seed, one in seeds.items()} for name, seeds in outputs.items()}
    group = ["de-en", "en-mk", "mk-en"]
    found = compare_groups(scored["a"], scored["b"], group)

    def corpus(name, seed, direction, rows):
        scorer = build_metric("chrf++", "en")
        chosen = [outputs[name][seed][direction][row] for row in rows]
        return scorer.corpus_score(chosen, [[references[direction][row] for row in rows]]).score

    drawn = []
    for sample in range(50):
        differences = []
        for direction in group:
            counts = bootstrap._counts(direction, 40)[sample].astype(int)
            rows = np.repeat(np.arange(40), counts)
            differences += [corpus("b", s, direction, rows) - corpus("a", s, direction, rows) for s in (1, 2)]
        drawn.append(np.mean(differences))
    everything = range(40)
    by_seed = {
        s: np.mean([corpus("b", s, one, everything) - corpus("a", s, one, everything) for one in group]) for s in (1, 2)
    }
    assert found.by_seed == pytest.approx(by_seed, abs=1e-4)
    assert found.difference == pytest.approx(np.mean(list(by_seed.values())), abs=1e-4)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-3)
    beyond = sum(abs(one - np.mean(drawn)) >= abs(found.difference) for one in drawn)
    assert found.p_value == pytest.approx((beyond + 1) / 51)
    apart = {
        one: np.mean([corpus("b", s, one, everything) - corpus("a", s, one, everything) for s in (1, 2)])
        for one in group
    }
    assert (found.directions, found.better) == (3, sum(value > 0 for value in apart.values()))
    assert found.wilcoxon_p == pytest.approx(wilcoxon(list(apart.values())))


def test_both_directions_of_a_pair_draw_the_same_sentences(references):
    bootstrap = Bootstrap(references, samples=20)
    np.testing.assert_array_equal(bootstrap._counts("de-en", 40), bootstrap._counts("en-de", 40))
    assert not np.array_equal(bootstrap._counts("de-en", 40), bootstrap._counts("de-mk", 40))
    assert (bootstrap._counts("de-en", 40).sum(axis=1) == 40).all()


def test_clear_differences_are_significant_and_equal_outputs_are_not(references):
    bootstrap = Bootstrap(references, samples=500)
    bad, good = (bootstrap.run(outputs_of(references, share, 1)) for share in (0.7, 0.2))
    found = compare_groups({1: bad}, {1: good}, list(references))
    assert found.p_value == pytest.approx(1 / 501)
    assert 0 < found.low < found.difference < found.high
    assert compare_groups({1: bad}, {1: bad}, list(references)).p_value == 1


@pytest.mark.slow
def test_chance_alone_is_significant_as_often_as_said():
    """200 pairs of equally good systems: about 5 % have p < 0.05 (binomial: more than 20 of 200 has p = 0.001)."""
    rng = np.random.default_rng(1)
    words = [f"w{number}" for number in range(30)]
    references = {d: [" ".join(rng.choice(words, 6)) for _ in range(40)] for d in ("a-b", "a-c", "b-c")}
    bootstrap = Bootstrap(references, samples=200)
    hits = 0
    for seed in range(200):
        a, b = (bootstrap.run(outputs_of(references, 0.5, (seed, side))) for side in (1, 2))
        hits += compare_groups({1: a}, {1: b}, list(references)).p_value < 0.05
    assert 2 <= hits <= 20


def test_only_what_both_have_is_compared(references):
    bootstrap = Bootstrap(references, samples=20)
    whole = bootstrap.run(outputs_of(references, 0.5, 1))
    part = {direction: whole[direction] for direction in ("de-en", "en-de")}
    assert compare_groups({1: whole}, {2: whole}, list(references)) is None
    assert compare_groups({1: whole}, {1: part}, ["mk-en"]) is None
    assert compare_groups({1: whole, 2: whole}, {1: part}, list(references)).directions == 2
    assert bootstrap.run({"xx-yy": ["a"]}) == {}


def test_outputs_that_do_not_fit(references):
    with pytest.raises(DataError, match="de-en has 41 outputs and 40 references"):
        Bootstrap(references, samples=5).run({"de-en": ["x"] * 41})
    with pytest.raises(DataError, match="de-en has 0 outputs"):
        Bootstrap(references, samples=5).run({"de-en": []})
