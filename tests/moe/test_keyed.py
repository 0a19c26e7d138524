"""Keyed draws: uniform, independent of each other, and a function of their key alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.cases import make_case
from scipy import stats

from mtmoe.moe import MoEConfig
from mtmoe.moe.keyed import PURPOSES, DrawKeys, token_numbers

KEYS = DrawKeys(seed=5, update=17, layer=3, tokens=token_numbers(torch.arange(200), 50).reshape(-1))
BINS = 64


def p_value(draws: torch.Tensor) -> float:
    counts = np.bincount((draws.double().numpy().reshape(-1) * BINS).astype(int), minlength=BINS)
    return float(stats.chisquare(counts).pvalue)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_uniform_over_tokens_and_choices(purpose):
    draws = KEYS.uniform(purpose, 2)
    assert draws.shape == (10000, 2) and draws.dtype == torch.float32
    assert draws.min() >= 0 and draws.max() < 1
    assert p_value(draws[:, 0]) > 1e-3 and p_value(draws[:, 1]) > 1e-3


@pytest.mark.parametrize("change", [{"seed": 6}, {"update": 18}, {"layer": 4}, {"tokens": KEYS.tokens + 1}])
def test_uniform_along_each_word_of_the_key_and_unlike_its_neighbour(change):
    first, second = KEYS.uniform("eom", 2), replace(KEYS, **change).uniform("eom", 2)
    table = np.histogram2d(first.reshape(-1).numpy(), second.reshape(-1).numpy(), bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.reshape(-1)).pvalue > 1e-3
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.04


def test_draws_for_a_whole_step_are_uniform_over_updates_and_alike_whatever_the_tokens():
    draws = torch.tensor([replace(KEYS, update=update).once("gating_dropout") for update in range(5000)])
    assert p_value(draws) > 1e-3
    assert replace(KEYS, tokens=KEYS.tokens[:3]).once("eom") == KEYS.once("eom") != KEYS.once("fom")


@settings(max_examples=25)
@given(seed=st.integers(0, 2**40), cut=st.integers(0, 12))
def test_a_token_keeps_its_draws_wherever_its_batch_is_cut(seed, cut):
    tokens = token_numbers(torch.tensor([seed, 3, 2**40]), 4)
    whole = DrawKeys(seed, 2, 1, tokens).uniform("cmr", 3)
    halves = tokens.reshape(-1)[:cut], tokens.reshape(-1)[cut:]
    assert torch.equal(whole, torch.cat([DrawKeys(seed, 2, 1, half).uniform("cmr", 3) for half in halves]))


def test_known_values_never_change():
    # Runs that were begun go on with the same draws: these are part of what a checkpoint means.
    keys = DrawKeys(seed=1, update=2, layer=3, tokens=torch.tensor([0, 1, 2**62]))
    words = (keys.uniform("eom", 2) * 2**24).long()
    assert words.tolist() == [[207620, 4620417], [11464747, 3886976], [13748777, 8106159]]
    assert keys.once("gating_dropout") == 0.8828166301641237
    assert torch.equal(keys.uniform("eom", 2, torch.float64), keys.uniform("eom", 2).double())


RATES = {"eom": 0.3, "fom": 0.2, "cmr": True, "cmr_gate_drop": 0.2, "jitter": 0.1}


@pytest.mark.parametrize("policy", ["random", "sampling"])
def test_a_layer_with_keys_leaves_torchs_generator_alone_and_repeats_itself(policy):
    case = make_case(MoEConfig(d_model=6, d_ffn=5, num_experts=4, second_expert_policy=policy, **RATES), 13)
    keys = DrawKeys(1, 2, 3, torch.arange(13))
    state = torch.get_rng_state()
    first = case.layer.train()(case.x, keys=keys).y
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(case.layer(case.x, keys=keys).y, first)
    assert not torch.equal(case.layer(case.x, keys=replace(keys, update=3)).y, first)
    assert not torch.equal(case.layer(case.x).y, first)


def test_keyed_sampling_draws_in_proportion_to_probabilities():
    from mtmoe.kernels.gating import choose_experts, draw_for_policy

    logits = torch.tensor([2.0, 1.0, 0.5, 0.0]).expand(10000, 4).contiguous()
    draws = draw_for_policy(logits, 2, "sampling", lambda n, dtype: KEYS.uniform("choice", n, dtype))
    assert torch.isfinite(draws.log()).all()
    second = choose_experts(logits, 2, policy="sampling", draws=draws).expert_index[:, 1]
    counts = torch.bincount(second, minlength=4)[1:].numpy()
    assert stats.chisquare(counts, 10000 * logits[0, 1:].double().softmax(0).numpy()).pvalue > 1e-3


def test_keys_must_fit_the_tokens():
    case = make_case(MoEConfig(d_model=6, d_ffn=5, num_experts=4), 13)
    with pytest.raises(ValueError, match=r"keys.tokens \(12,\) must be of shape \(13,\), as x"):
        case.layer(case.x, keys=DrawKeys(1, 2, 3, torch.arange(12)))
