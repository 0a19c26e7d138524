"""States that are saved at one layout and read at another, compared to the bit with plain slices."""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.optim.adam import Adam
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.training_states import assert_same, save_all, state_of_place, whole_state
from torch import nn

from mtmoe.checkpoint.sharded import (
    ExpertTensor,
    SavePlan,
    commit,
    copy_to_cpu,
    read_manifest,
    read_state,
    reshard,
    share_out,
    split_state,
    write_experts,
    write_shared,
)
from mtmoe.checkpoint.sharded.reading import allowing_plain_types, plain_types, wanted_files
from mtmoe.errors import CheckpointError
from mtmoe.training.expert_adamw import ExpertAdamW

SIZES = [1, 2, 3, 4, 6, 12]


@st.composite
def layouts(draw):
    """Experts of two layers, and two sizes that divide both."""
    old, new = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    common = 12 if old * new % 3 == 0 else 4
    return (common, common * draw(st.integers(1, 2))), old, new


@settings(max_examples=30)
@given(
    layout=layouts(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    optimizer=st.sampled_from(["mtmoe_adamw", "adam", "sgd", ""]),
    seed=st.integers(0, 9),
)
def test_any_layout_is_read_at_any_other(layout, dtype, optimizer, seed):
    experts, old, new = layout
    whole = whole_state(experts, dtype=dtype, optimizer=optimizer, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_all(Path(folder) / "checkpoint_2_7", whole, old)
        for place in range(new):
            assert_same(read_state(saved, place=place, places=new), state_of_place(whole, place, new))
        assert_same(read_state(saved), whole)
        assert [path.name for path in Path(folder).iterdir()] == ["checkpoint_2_7"]


@settings(max_examples=10)
@given(layout=layouts(), optimizer=st.sampled_from(["mtmoe_adamw", "adam"]))
def test_single_file_to_directory_to_directory_to_file(layout, optimizer):
    experts, old, new = layout
    whole = whole_state(experts, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(whole, folder / "a.pt")
        reshard(folder / "a.pt", folder / "b", old)
        reshard(folder / "b", folder / "c", new)
        reshard(folder / "c", folder / "d.pt", None)
        assert_same(torch.load(folder / "d.pt", weights_only=True), whole)
        assert read_manifest(folder / "c").expert_parallel_size == new
        assert read_manifest(folder / "c").about == {"num_updates": 7, "epoch": 2, "steady": True}
        reshard(folder / "b", folder / "e", new, optimizer=False)
        assert_same(read_state(folder / "e"), {k: v for k, v in whole.items() if k != "last_optimizer_state"})


def test_only_the_files_with_wanted_experts_are_read(tmp_path):
    whole = whole_state((8, 8))
    saved = save_all(tmp_path / "checkpoint_1_1", whole, 4)
    manifest = read_manifest(saved)
    assert wanted_files(manifest, 1, 2) == ["experts-00002-of-00004.pt", "experts-00003-of-00004.pt"]
    assert wanted_files(manifest, 5, 8) == ["experts-00002-of-00004.pt"]
    (saved / "experts-00000-of-00004.pt").unlink()
    assert_same(read_state(saved, place=1, places=2), state_of_place(whole, 1, 2))
    with pytest.raises(CheckpointError, match=r"experts-00000-of-00004.pt is missing"):
        read_state(saved, place=0, places=2)


def test_a_size_that_does_not_divide_the_experts_is_refused(tmp_path):
    saved = save_all(tmp_path / "checkpoint_1_1", whole_state((4, 8)), 2)
    with pytest.raises(CheckpointError, match=r"expert_parallel_size=8 does not divide the 4 experts .* 1, 2, 4"):
        read_state(saved, place=0, places=8)
    torch.save(whole_state((4, 8)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="expert_parallel_size=3 does not divide"):
        reshard(tmp_path / "a.pt", tmp_path / "b", 3)
    assert not (tmp_path / "b").exists()


def test_splitting_changes_nothing_and_copying_separates():
    whole = whole_state()
    before = copy_to_cpu(whole)
    split = split_state(whole)
    assert_same(whole, before)
    assert split.shared["model"]["encoder.layers.1.moe.experts.w_in"] is None
    assert before["model"]["decoder.embed_tokens.weight"] is before["model"]["encoder.embed_tokens.weight"]
    for tensor in (*whole["model"].values(), *(m["exp_avg"] for m in whole["last_optimizer_state"]["state"].values())):
        tensor.zero_()
    whole["last_optimizer_state"]["state"][1]["touched"][0] = 99
    assert_same(before, whole_state())


def test_state_that_does_not_follow_the_experts_is_refused():
    state = whole_state()
    state["last_optimizer_state"]["state"][1]["exp_avg_sq_col"] = torch.zeros(4, 3)
    with pytest.raises(CheckpointError, match=r"exp_avg_sq_col of shape \(4, 3\) for the experts .*w_in"):
        split_state(state)


def test_flat_parameters_are_refused_with_the_way_out(tmp_path):
    state = whole_state()
    flat = {"exp_avg": torch.zeros(99), "exp_avg_sq": torch.zeros(99), "step": 1}
    state["last_optimizer_state"] = {"state": {0: flat}, "param_groups": [{"params": [0]}]}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"--fp16-no-flatten-grads.*--no-optimizer"):
        reshard(tmp_path / "a.pt", tmp_path / "b", 2)
    reshard(tmp_path / "a.pt", tmp_path / "b", 2, optimizer=False)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    plan = SavePlan(directory=tmp_path / "checkpoint_1_1", attempt="a", world_size=2, expert_parallel_size=2)
    split = split_state(state_of_place(whole_state(), 0, 2))
    write_shared(plan, split.shared)
    write_experts(plan, 0, split.experts)
    name = "model/encoder.layers.1.moe.experts.w_in"
    write_experts(plan, 1, {**split.experts, name: ExpertTensor(torch.zeros(1, 2, 3), "stacked")})
    with pytest.raises(CheckpointError, match=rf"{name} is float32 \(1, 2, 3\) in experts-00001.*\(2, 2, 3\)"):
        commit(plan, {})
    assert list(tmp_path.iterdir()) == []


# The optimisers themselves


class Bank(nn.Module):
    """Stacked experts whose gradients the test sets; its second input tells which of them are used."""

    def __init__(self, experts):
        super().__init__()
        self.w_in, self.b_in = nn.Parameter(torch.zeros(experts, 3, 2)), nn.Parameter(torch.zeros(experts, 3))

    def forward(self, x, plan):
        return x


class Toy(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.norm, self.experts, self.out = nn.LayerNorm(2), Bank(experts), nn.Linear(2, 2)


def optimizer_of(kind, model):
    if kind == "mtmoe_adamw":
        optimizer = ExpertAdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        optimizer.watch(model.experts, [model.experts.w_in, model.experts.b_in])
        return optimizer
    return {"adam": Adam, "adamw": torch.optim.AdamW}[kind](model.parameters(), lr=0.1)


def update(model, optimizer, number, place, places, experts):
    """One update with gradients that follow from its number; some experts have none."""
    generator = torch.Generator().manual_seed(number)
    used = torch.randperm(experts, generator=generator)[: experts // 2 if number % 3 else 1].tolist()
    local = experts // places
    first = place * local
    optimizer.zero_grad()
    mine = [each - first for each in sorted(used) if first <= each < first + local]
    model.experts(None, SimpleNamespace(segments=[(each, 0, 1) for each in mine]))
    for name, parameter in model.named_parameters():
        shape = (experts, *parameter.shape[1:]) if "experts." in name else parameter.shape
        gradient = torch.randn(shape, generator=generator)
        if "experts." in name:
            mask = torch.zeros(experts)
            mask[used] = 1
            gradient = (gradient * mask.view(-1, *[1] * (gradient.dim() - 1)))[first : first + local]
        parameter.grad = gradient
    optimizer.step()


def training_state(model, optimizer):
    return {"model": model.state_dict(), "last_optimizer_state": optimizer.state_dict(), "optimizer_history": []}


@pytest.mark.parametrize("kind", ["mtmoe_adamw", "adamw", "adam"])
@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 4), (4, 2)])
def test_training_goes_on_at_another_layout(tmp_path, kind, old, new):
    experts, updates = 8, 9

    def build(places):
        models = [Toy(experts // places) for _ in range(places)]
        return [(model, optimizer_of(kind, model)) for model in models]

    def train(members, numbers):
        for number in numbers:
            for place, (model, optimizer) in enumerate(members):
                update(model, optimizer, number, place, len(members), experts)

    (whole,), before, after = build(1), build(old), build(new)
    train([whole], range(2 * updates))
    train(before, range(updates))
    plan = SavePlan(directory=tmp_path / "checkpoint_1_9", attempt="a", world_size=old, expert_parallel_size=old)
    for place, member in enumerate(before):
        split = split_state(training_state(*member))
        write_experts(plan, place, split.experts)
    write_shared(plan, split.shared)
    commit(plan, {})
    for place, (model, optimizer) in enumerate(after):
        state = read_state(plan.directory, place=place, places=new)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["last_optimizer_state"])
    train(after, range(updates, 2 * updates))
    expected = training_state(*whole)
    for place, member in enumerate(after):
        wanted = share_out(split_state(expected), place, new)
        actual = split_state(training_state(*member)).experts
        assert actual.keys() == wanted.keys()
        for name, tensor in wanted.items():
            # Kernels may run an expert in other vector lanes when there are more of them.
            torch.testing.assert_close(actual[name].values, tensor.values, rtol=1e-6, atol=1e-7, msg=name)


def test_a_place_whose_experts_never_had_a_gradient(tmp_path):
    """It has no moments; joined with another they are zero, and it counts as never touched."""
    experts = 4
    members = [(model, optimizer_of("mtmoe_adamw", model)) for model in (Toy(2), Toy(2))]
    update(*members[1], 1, 0, 1, 2)
    plan = SavePlan(directory=tmp_path / "checkpoint_1_1", attempt="a", world_size=2, expert_parallel_size=2)
    for place in (1, 0):
        split = split_state(training_state(*members[place]))
        write_experts(plan, place, split.experts)
    write_shared(plan, split.shared)
    commit(plan, {})
    model = Toy(experts)
    optimizer = optimizer_of("mtmoe_adamw", model)
    state = read_state(plan.directory)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["last_optimizer_state"])
    moments = optimizer.state[model.experts.w_in]
    assert moments["step"] == 1
    assert moments["touched"][:2] == [0, 0]
    assert 1 in moments["touched"]
    assert moments["exp_avg"][:2].abs().sum() == 0 < moments["exp_avg"][2:].abs().sum()


def test_reading_leaves_what_torch_may_load_as_it_was():
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([argparse.Namespace])  # as somebody else did, who still needs it
        with allowing_plain_types():
            assert set(plain_types()) <= set(torch.serialization.get_safe_globals())
        assert torch.serialization.get_safe_globals() == [argparse.Namespace]
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
