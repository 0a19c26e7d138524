import dataclasses

import pytest

from mtmoe.field_texts import field_texts
from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.gates import GATES, build_gate

SIZES = {"d_model": 4, "d_ffn": 8}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"d_model": 0}, "d_model=0 must be at least 1"),
        ({"d_ffn": -1}, "d_ffn=-1 must be at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ({"top_k": 0}, "top_k=0 must be between 1 and num_experts=8"),
        ({"dropout": 1.5}, "dropout=1.5 must be between 0 and 1"),
        ({"activation_dropout": -0.1}, "activation_dropout=-0.1 must be between 0 and 1"),
        ({"eom": 2.0}, "eom=2.0 must be between 0 and 1"),
        ({"fom": -1.0}, "fom=-1.0 must be between 0 and 1"),
        ({"gating_dropout": 1.1}, "gating_dropout=1.1 must be between 0 and 1"),
        ({"jitter": -0.01}, "jitter=-0.01 must be between 0 and 1"),
        ({"eom": float("nan")}, "eom=nan must be between 0 and 1"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must not be negative"),
        ({"eval_capacity_factor": -0.5}, "eval_capacity_factor=-0.5 must not be negative"),
        ({"init_scale": -1.0}, "init_scale=-1.0 must not be negative"),
        ({"cmr_d_ffn": -1}, "cmr_d_ffn=-1 must not be negative"),
        ({"eval_capacity_token_fraction": 1.2}, "eval_capacity_token_fraction=1.2 must be between 0 and 1"),
        (
            {"second_expert_policy": "any"},
            "second_expert_policy='any' must be one of: all, sampling, random, threshold",
        ),
        ({"normalize_weights": "yes"}, "normalize_weights='yes' must be one of: after_drop, before_drop, none"),
        ({"masking_scale": "train"}, "masking_scale='train' must be one of: eval, inverted"),
        ({"cmr_gate_drop_mode": "x"}, "cmr_gate_drop_mode='x' must be one of: inverted, mask"),
        ({"gating_dropout_mode": "x"}, "gating_dropout_mode='x' must be one of: gate, gate_expert"),
        ({"top_k": 1}, "normalize_weights='after_drop' with top_k=1 would never train the gate; use 'none'"),
        ({"cmr_gate_drop": 0.2}, "cmr_gate_drop=0.2 needs cmr; switch cmr on or set cmr_gate_drop to 0"),
        ({"eom": 1.0, "masking_scale": "inverted"}, "eom=1.0 cannot be scaled by 1 / \\(1 - rate\\)"),
        ({"cmr": True, "cmr_gate_drop": 1.0}, "cmr_gate_drop=1.0 cannot be scaled"),
        ({"gating_dropout_ranks": 3}, "gating_dropout_ranks=3 must divide num_experts=8"),
        ({"gate": "moec"}, "gate='moec' sends a token to one expert: set top_k=1 instead of 2"),
        ({"expert_nodes": 2}, "expert_nodes=2 needs gate='bilevel'; set it, or leave expert_nodes at 0"),
        ({"gate": "bilevel"}, "gate='bilevel' needs expert_nodes that divide num_experts=8, got 0"),
        ({"gate": "bilevel", "expert_nodes": 3}, "needs expert_nodes that divide num_experts=8, got 3"),
        ({"gate": "bilevel", "expert_nodes": 8}, "chooses top_k=2 experts inside a node, which has 1"),
        ({"gate": "bilevel", "expert_nodes": 2}, "normalize_weights='after_drop' would never train the node router"),
        (
            {"gate": "bilevel", "expert_nodes": 2, "normalize_weights": "none", "expert_clusters": 2},
            "expert_clusters=2 does not work with gate='bilevel'",
        ),
        ({"eval_capacity": -1}, "eval_capacity=-1 must not be negative"),
        (
            {"gate": "moec", "top_k": 1, "normalize_weights": "none", "gate_bias": True},
            "gate='moec' compares directions, which have no bias",
        ),
        ({"cosine_gate_dim": 0}, "cosine_gate_dim=0 must be at least 1"),
        ({"expert_clusters": -1}, "expert_clusters=-1 must not be negative"),
        ({"expert_clusters": 3}, "expert_clusters=3 must divide num_experts=8"),
        ({"cluster_variance_type": 3}, "cluster_variance_type=3 must be 0, 1 or 2"),
        ({"expert_clusters": 1, "cluster_variance_type": 2}, "cluster_variance_type=2 compares clusters: set"),
        ({"cluster_variance_scale": "tokens"}, "cluster_variance_scale='tokens' must be one of: mean, sum"),
        ({"cluster_expert_dropout": 0.5}, "cluster_expert_dropout=0.5 needs expert_clusters; give their number"),
        ({"cluster_expert_dropout": 1.5}, "cluster_expert_dropout=1.5 must be between 0 and 1"),
        ({"cluster_expert_dropout_interval": 0}, "cluster_expert_dropout_interval=0 must be at least 1"),
        ({"cluster_expert_dropout": 0.2, "expert_clusters": 2}, "drops no expert of clusters of 4; raise it, or set"),
        ({"cluster_expert_dropout": 0.5, "expert_clusters": 8}, "drops no expert of clusters of 1"),
        ({"cluster_expert_dropout": 1.0, "expert_clusters": 1}, "leaves 1 experts, fewer than top_k=2"),
        (
            {"cluster_expert_dropout": 0.5, "expert_clusters": 2, "gating_dropout": 0.3},
            "gating_dropout would send tokens to experts that cluster_expert_dropout leaves out; use one of the two",
        ),
    ],
)
def test_error_tells_what_was_given_and_what_is_allowed(options, text):
    with pytest.raises(ValueError, match=text):
        MoEConfig(**(SIZES | options))


@pytest.mark.parametrize(
    "options",
    [
        {"eom": 1.0},
        {"fom": 1.0},
        {"cmr": True, "cmr_gate_drop": 1.0, "cmr_gate_drop_mode": "mask"},
        {"gating_dropout": 1.0},
        {"num_experts": 1, "top_k": 1, "normalize_weights": "none"},
        {"top_k": 8},
        {"expert_clusters": 8, "cluster_variance_type": 2},
        {"expert_clusters": 2, "cluster_expert_dropout": 1.0},
        {
            "expert_clusters": 2,
            "cluster_expert_dropout": 0.5,
            "gating_dropout": 0.2,
            "gating_dropout_mode": "gate_expert",
        },
    ],
)
def test_extremes_that_make_sense_are_allowed(options):
    MoEConfig(**SIZES, **options)


def test_unknown_gate_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"gate='tokpk' is unknown; choose one of: {', '.join(sorted(GATES))}"):
        build_gate(MoEConfig(**SIZES, gate="tokpk"))


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match="activation='tanh' is unknown; choose one of: gelu, relu, silu"):
        MoELayer(MoEConfig(**SIZES, activation="tanh"))


def test_config_is_frozen_and_survives_a_dictionary():
    config = MoEConfig(**SIZES, cmr=True, eom=0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.eom = 0.1
    assert MoEConfig(**dataclasses.asdict(config)) == config


def test_gating_dropout_has_one_expert_a_rank_by_default():
    assert MoEConfig(**SIZES).ranks == 8
    assert MoEConfig(**SIZES, gating_dropout_ranks=2).ranks == 2


def test_every_field_has_a_help_text():
    texts = field_texts(MoEConfig)
    assert list(texts) == [field.name for field in dataclasses.fields(MoEConfig)]
    assert all(len(text) > 10 and "\n" not in text for text in texts.values())
