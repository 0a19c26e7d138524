"""Sums over batches of many directions against a loop over single tokens of single sentences."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.models import DIRECTIONS, toy_model, toy_sentence, toy_translation

from mtmoe.inference import Translator
from mtmoe.inference.routing import RoutingCollector, _rows, collect_routing
from mtmoe.moe import MoEConfig

# Batches are padded and single sentences are not, so probabilities differ in the last bits of fp32.
TOLERANCE = 1e-4


def gates_of(model, source_ids, prefix_ids):
    """(side, layer) -> the decision and the CMR gates of one sentence without padding."""
    seen, handles = defaultdict(dict), []
    for side in ("encoder", "decoder"):
        for number, layer in enumerate(getattr(model, side).layers):
            moe = getattr(layer.feed_forward, "moe", None)
            if moe is None:
                continue
            found = seen[(side, number)]
            handles.append(moe.gate.register_forward_hook(lambda _, x, out, found=found: found.update(decision=out)))
            if moe.conditional is not None:
                hook = moe.conditional.register_forward_hook
                handles.append(hook(lambda _, x, out, found=found: found.update(cmr=x[2].value)))
    model(torch.tensor([source_ids]), torch.tensor([prefix_ids]))
    for handle in handles:
        handle.remove()
    return seen


def slow_statistics(translator, texts):
    """(side, layer, direction) -> name -> expert -> sum, from one sentence and one token at a time."""
    sums = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    vocabulary = translator.vocabulary
    for direction, sources, targets in texts:
        source_language, target_language = direction.split("-")
        for source, target in zip(sources, targets, strict=True):
            ids = vocabulary.frame(vocabulary.encode(source), source_language)
            prefix = [vocabulary.tags[target_language], *vocabulary.encode(target)]
            for key, found in gates_of(translator.model, ids, prefix).items():
                row, decision = sums[(*key, direction)], found["decision"]
                for token in range(len(decision.expert_index)):
                    add_token(row, decision.expert_index[token].tolist(), decision.gate_probs[token].tolist())
                    if "cmr" in found:
                        row["cmr_gate"][0] += found["cmr"][token].item()
    return sums


def add_token(row, chosen, probabilities):
    row["tokens"][0] += 1
    for expert, probability in enumerate(probabilities):
        row["probability"][expert] += probability
    for name, expert in zip(("first", "second"), chosen, strict=False):
        if expert >= 0:
            row[name][expert] += 1
            row[f"{name}_probability"][expert] += probabilities[expert]


def texts_of(seeds):
    texts = []
    for number, direction in enumerate(DIRECTIONS):
        sources = [toy_sentence(100 * number + seed) for seed in seeds[: len(seeds) - number]]
        texts.append((direction, sources, [toy_translation(text) for text in sources]))
    return texts


def experts(**changes):
    return MoEConfig(**({"d_model": 16, "d_ffn": 8, "num_experts": 5, "top_k": 2} | changes))


SHAPES = {
    "cmr": {"encoder_moe": experts(cmr=True), "decoder_moe": experts(cmr=True, num_experts=3)},
    "top-1": {"encoder_moe": experts(top_k=1, normalize_weights="none"), "decoder_moe": experts()},
    "threshold": {
        "encoder_moe": experts(second_expert_policy="threshold", second_expert_threshold=0.4),
        "decoder_moe": experts(top_k=3),
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 99), min_size=3, max_size=7), max_tokens=st.sampled_from([1, 30, 4096]))
def test_collector_equals_a_loop_over_tokens(vocabulary, shape, seeds, max_tokens):
    changes = {"moe": True, "encoder_moe_freq": 1} | shape
    translator = Translator.from_stored(toy_model(vocabulary, **changes))
    texts = texts_of(seeds)
    table = collect_routing(translator, texts, DIRECTIONS, max_tokens=max_tokens)
    slow = slow_statistics(translator, texts)
    assert [layer.name for layer in table.layers] == ["encoder 0", "encoder 1", "decoder 1"]
    assert table.sentences == tuple(len(sources) for _, sources, _ in texts)
    for layer in table.layers:
        for row, direction in enumerate(DIRECTIONS):
            expected = slow[(layer.side, layer.layer, direction)]
            assert layer.tokens[row] == expected["tokens"][0]
            for name in ("first", "second", "first_probability", "second_probability", "probability"):
                wanted = [expected[name][expert] for expert in range(layer.num_experts)]
                np.testing.assert_allclose(getattr(layer, name)[row], wanted, atol=TOLERANCE, err_msg=name)
            if layer.cmr_gate is not None:
                np.testing.assert_allclose(layer.cmr_gate[row], expected["cmr_gate"][0], atol=TOLERANCE)
    assert (table.layers[0].cmr_gate is not None) == shape["encoder_moe"].cmr


def test_rows_by_language_are_sums_over_partners(vocabulary):
    translator = Translator.from_stored(toy_model(vocabulary, moe=True, encoder_moe_freq=1))
    texts = texts_of([1, 2, 3, 4, 5])
    whole = collect_routing(translator, texts, DIRECTIONS)
    table = collect_routing(translator, texts, DIRECTIONS, by_language=True)
    assert table.rows == ("de-*", "en-*", "mk-*", "*-de", "*-en", "*-mk")
    for one, other in ((table.by_source(), whole.by_source()), (table.by_target(), whole.by_target())):
        assert (one.rows, one.sentences) == (other.rows, other.sentences)
    for number, layer in enumerate(table.layers):
        of = "by_source" if layer.side == "encoder" else "by_target"
        mine, theirs = (getattr(each, of)().layers[number] for each in (table, whole))
        assert layer.tokens.sum() == whole.layers[number].tokens.sum()  # each token counts once
        for name in ("tokens", "first", "second", "first_probability", "probability", "cmr_gate"):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), err_msg=name)


def test_memory_is_bounded_by_languages_and_experts(vocabulary):
    """128 experts and 202 languages in all 40,602 directions: the sums are there before any text, and do not grow."""
    changes = {"encoder_moe": experts(num_experts=128), "decoder_moe": experts(num_experts=128)}
    model = Translator.from_stored(toy_model(vocabulary, moe=True, encoder_moe_freq=1, **changes)).model
    languages = [f"l{number}" for number in range(202)]
    directions = [f"{one}-{other}" for one in languages for other in languages if one != other]
    rows, labels = _rows(directions, by_language=True)
    assert (len(rows), len(labels)) == (40_602, 404)
    layers = RoutingCollector(model, len(labels)).layers()
    arrays = ("tokens", "first", "second", "first_probability", "second_probability", "probability")
    for layer in layers:
        assert layer.first.shape == (404, 128)
        assert sum(getattr(layer, name).nbytes for name in arrays) == 404 * 8 * (1 + 5 * 128)  # 2.1 MB a layer


def test_empty_and_long_segments(vocabulary):
    translator = Translator.from_stored(toy_model(vocabulary, moe=True))
    texts = [("en-de", ["", " ".join(["kalo"] * 200), "kalo"], ["kalox", "kalox", " "])]
    table = collect_routing(translator, texts, ["en-de", "de-en"])
    assert table.sentences == (1, 0)
    assert table.layers[0].tokens[0] <= translator.model.config.max_source_positions
    assert table.layers[0].tokens[1] == 0
    assert not table.layers[0].top1[1].any()


def test_the_model_is_left_without_hooks(vocabulary):
    translator = Translator.from_stored(toy_model(vocabulary, moe=True))
    collect_routing(translator, texts_of([1, 2, 3]), DIRECTIONS)
    assert not any(module._forward_hooks for module in translator.model.modules())


def test_errors(vocabulary):
    with pytest.raises(ValueError, match="the model is dense"):
        collect_routing(Translator.from_stored(toy_model(vocabulary)), [], DIRECTIONS)
    translator = Translator.from_stored(toy_model(vocabulary, moe=True))
    with pytest.raises(ValueError, match="direction mk-de is not one of those to count: en-de"):
        collect_routing(translator, [("mk-de", ["a"], ["b"])], ["en-de"])
