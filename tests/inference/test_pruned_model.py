"""A pruned folder against the full model whose gates may not choose the removed experts."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.models import toy_config, toy_model

from mtmoe.checkpoint import TransformerConfig
from mtmoe.checkpoint.expert_selection import ExpertSelection
from mtmoe.checkpoint.fairseq_export import write_fairseq_checkpoint
from mtmoe.checkpoint.folder import read_folder, write_folder
from mtmoe.checkpoint.pruning import (
    bytes_of_experts,
    bytes_of_model,
    drop_experts,
    experts_of,
    for_directions,
)
from mtmoe.checkpoint.pruning_search import bytes_removed
from mtmoe.checkpoint.tensors import ComputedTensors, Recipe
from mtmoe.errors import CheckpointError
from mtmoe.inference.model import Transformer
from mtmoe.moe import MoEConfig

TOLERANCE = 1e-5  # fp32; the softmax is over fewer numbers


def experts(**changes):
    return MoEConfig(**({"d_model": 16, "d_ffn": 8, "num_experts": 5, "top_k": 2} | changes))


GATES = {
    "cmr": experts(cmr=True, eom=0.2),
    "top-1": experts(top_k=1, normalize_weights="none"),
    "bias": experts(gate_bias=True),
    "before drop": experts(normalize_weights="before_drop", expert_clusters=5),
    "threshold": experts(top_k=3, second_expert_policy="threshold", second_expert_threshold=0.3),
    "moec": experts(
        gate="moec", top_k=1, normalize_weights="none", cosine_gate_dim=4, num_experts=6, expert_clusters=2,
        cluster_expert_dropout=0.4,
    ),
}  # fmt: skip


def everything(config):
    have = experts_of(config)
    return ExpertSelection({layer: tuple(range(count)) for layer, count in have.items()}, have)


@st.composite
def cases(draw, gates=tuple(GATES)):
    """Shape of a model of one to three MoE layers, and which of its experts stay."""
    encoder = GATES[draw(st.sampled_from(gates))]
    changes = {"encoder_moe": encoder, "encoder_moe_freq": draw(st.sampled_from([1, 2]))}
    if draw(st.booleans()):
        changes |= {"decoder_moe": GATES[draw(st.sampled_from(gates))], "decoder_moe_freq": 1}
    config = toy_config(**changes)
    kept = {
        layer: tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=config.moe_of(*layer).top_k))))
        for layer, count in experts_of(config).items()
    }
    return changes, ExpertSelection(kept, experts_of(config))


def forbid(model, selection):
    """Let no gate choose a removed expert: its logit is minus infinity."""
    for (side, number), kept in selection.kept.items():
        gate = getattr(model, side).layers[number].feed_forward.moe.gate
        mask = torch.full((selection.num_experts[side, number],), -math.inf)
        mask[list(kept)] = 0.0
        logits = gate.logits
        gate.logits = lambda x, survivors=None, keys=None, logits=logits, mask=mask: logits(x, survivors, keys) + mask


def batch(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(4, config.vocabulary_size, (3, 7), generator=generator)
    source[1, 5:] = 1  # padding
    return source, torch.randint(4, config.vocabulary_size, (3, 6), generator=generator)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), seed=st.integers(0, 9))
def test_pruned_folder_equals_the_masked_model(vocabulary, tmp_path_factory, case, seed):
    changes, selection = case
    stored = toy_model(vocabulary, seed, **changes)
    folder = tmp_path_factory.mktemp("pruned") / "model"
    write_folder(folder, drop_experts(stored, selection))
    pruned = read_folder(folder)
    assert experts_of(pruned.config) == {layer: len(kept) for layer, kept in selection.kept.items()}
    full = Transformer.from_tensors(stored.config, stored.tensors)
    forbid(full, selection)
    smaller = Transformer.from_tensors(pruned.config, pruned.tensors)
    torch.testing.assert_close(
        smaller(*batch(stored.config)), full(*batch(stored.config)), atol=TOLERANCE, rtol=TOLERANCE
    )
    # To the byte what the experts took, and on disk too, but for the JSON.
    saved = bytes_removed(selection, bytes_of_experts(stored))
    assert bytes_of_model(stored) - bytes_of_model(pruned) == saved
    assert (saved > 0) != selection.is_all


def test_the_folder_is_smaller_on_disk_by_what_went(vocabulary, tmp_path):
    moe = experts(d_ffn=256, num_experts=16)
    stored = toy_model(vocabulary, encoder_moe=moe, encoder_moe_freq=2)
    selection = ExpertSelection({("encoder", 1): (3, 7, 8)}, {("encoder", 1): 16})
    write_folder(tmp_path / "full", stored)
    write_folder(tmp_path / "pruned", drop_experts(stored, selection))
    sizes = {
        name: sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("full", "pruned")
    }
    gone = 13 * 4 * (16 + 256 * 16 + 256 + 256 * 16 + 16)
    assert abs(sizes["full"] - sizes["pruned"] - gone) < 500


def test_threshold_pruned_folder_tells_its_experts_and_is_no_fairseq_checkpoint(vocabulary, tmp_path):
    stored = toy_model(vocabulary, encoder_moe=experts(), encoder_moe_freq=1)
    selection = ExpertSelection({("encoder", 0): (0, 1, 3, 4), ("encoder", 1): (1, 2)}, experts_of(stored.config))
    write_folder(tmp_path / "model", drop_experts(stored, selection))
    assert "2 to 4 experts" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(CheckpointError, match="here layers have different ones"):
        write_fairseq_checkpoint(tmp_path / "model.pt", read_folder(tmp_path / "model"))


def test_nodes_stay_of_equal_size(vocabulary):
    gate = experts(gate="bilevel", expert_nodes=2, num_experts=4, normalize_weights="none")
    stored = toy_model(vocabulary, encoder_moe=gate, encoder_moe_freq=1)
    have = experts_of(stored.config)
    with pytest.raises(CheckpointError, match="cannot be taken out one by one"):
        drop_experts(stored, ExpertSelection(dict.fromkeys(have, (0, 1, 2)), have))


def test_weights_are_read_when_asked_for(vocabulary):
    """Of a lazy model only the rows that stay are read, and only once they are wanted."""
    stored = toy_model(vocabulary, encoder_moe=experts(), encoder_moe_freq=1)
    asked = []

    def recipe(name):
        def rows(begin, end):
            asked.append((name, begin, end))
            return stored.tensors[name][begin:end]

        return Recipe(tuple(stored.tensors[name].shape), torch.float32, rows)

    lazy = replace(stored, tensors=ComputedTensors({name: recipe(name) for name in stored.tensors}))
    selection = ExpertSelection({("encoder", 0): (0, 3), ("encoder", 1): (0, 1, 2, 3, 4)}, experts_of(stored.config))
    pruned = drop_experts(lazy, selection)
    assert bytes_of_model(lazy) - bytes_of_model(pruned) == bytes_removed(selection, bytes_of_experts(lazy))
    assert not asked
    name = "encoder.layers.0.moe.experts.w_in"
    assert torch.equal(pruned.tensors[name], stored.tensors[name][[0, 3]])
    assert asked == [(name, 0, 1), (name, 3, 4)]


@pytest.mark.parametrize("name", GATES)
def test_keeping_all_is_the_identity(vocabulary, name):
    stored = toy_model(vocabulary, encoder_moe=GATES[name], encoder_moe_freq=1)
    assert drop_experts(stored, everything(stored.config)) is stored


def test_pruning_twice_is_pruning_once(vocabulary):
    stored = toy_model(vocabulary, encoder_moe=experts(), encoder_moe_freq=1)
    first = ExpertSelection({("encoder", 0): (0, 1, 3, 4), ("encoder", 1): (1, 2)}, experts_of(stored.config))
    once = drop_experts(stored, first)
    assert once.config.encoder_layer_experts == (4, 2)
    second = ExpertSelection({("encoder", 0): (1, 3), ("encoder", 1): (0, 1)}, experts_of(once.config))
    twice = drop_experts(once, second)
    direct = ExpertSelection({("encoder", 0): (1, 4), ("encoder", 1): (1, 2)}, experts_of(stored.config))
    straight = drop_experts(stored, direct)
    assert twice.config == straight.config
    assert twice.config.encoder_layer_experts is None  # the layers are alike again
    assert all(torch.equal(twice.tensors[name], tensor) for name, tensor in straight.tensors.items())


def test_configuration_of_pruned_layers_round_trips_and_is_checked():
    pruned = toy_config(encoder_moe=experts(), encoder_moe_freq=1, encoder_layer_experts=(5, 2))
    values = pruned.to_json()
    assert "decoder_layer_experts" not in values  # an earlier version reads a model that was not pruned
    assert TransformerConfig.from_json(values | {"encoder_layer_experts": [5, 2]}) == pruned
    assert [pruned.moe_of("encoder", layer).num_experts for layer in pruned.moe_layers("encoder")] == [5, 2]
    with pytest.raises(ValueError, match="encoder layer 0 is dense"):
        toy_config().moe_of("encoder", 0)
    for wrong, message in (
        ([5], r"encoder_layer_experts has 1 numbers, but the encoder has 2 MoE layers"),
        ([4, 2], r"the greatest must be encoder_moe.num_experts=5"),
        ([5, 1], r"top_k=2 must be between 1 and num_experts=1"),
        ([5, "2"], r"must be a list of whole numbers"),
        ("52", r"must be a list of whole numbers"),
        ([], r"must be a list of whole numbers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            TransformerConfig.from_json(values | {"encoder_layer_experts": wrong})


def test_weights_must_have_the_experts_that_the_configuration_says(vocabulary):
    stored = toy_model(vocabulary, encoder_moe=experts(), encoder_moe_freq=1)
    with pytest.raises(ValueError, match="other MoE layers, or other numbers of experts"):
        drop_experts(stored, ExpertSelection({("encoder", 0): (0, 1)}, {("encoder", 0): 5}))
    with pytest.raises(ValueError, match="is left with 1 experts, fewer than top_k=2"):
        drop_experts(stored, ExpertSelection({("encoder", 0): (0,), ("encoder", 1): (0, 1)}, experts_of(stored.config)))


def test_directions_that_a_pruned_model_is_for(vocabulary):
    stored = toy_model(vocabulary)
    assert for_directions(stored, ["en-de", "de-mk"]).languages.directions == ("en-de",)
    assert for_directions(stored, ["de-mk"]) == stored  # zero-shot only: nothing is known to be better
