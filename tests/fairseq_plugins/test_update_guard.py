"""The guard of updates, and where training goes back to, without a training run."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fairseq_plugins  # noqa: F401
from fairseq_plugins.rollback import go_back, remove_given_up
from fairseq_plugins.update_guard import TrainingDiverged, UpdateGuard, find_broken
from mtmoe.training import spikes
from mtmoe.training.checkpoint_files import SavedCheckpoint


class Optimizer:
    """What the guard wants of an optimiser of fairseq: plain SGD whose gradient norms are given."""

    def __init__(self, model, norms=()):
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        self.norms = iter(norms)

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def clip_grad_norm(self, max_norm, aggregate_norm_fn=None):
        return torch.tensor(next(self.norms))

    def step(self):
        self.optimizer.step()


def run(guard, norms):
    """Which of the updates with these gradient norms made a step, and what the norms were given on as."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = Optimizer(model, norms)
    guard.watch(optimizer)
    stepped, given = [], []
    for update in range(len(norms)):
        before = model.weight.item()
        model.weight.grad = torch.ones(1, 1)
        given.append(optimizer.clip_grad_norm(1.0).item())
        guard.step(optimizer, model, update + 1)
        stepped.append(model.weight.item() != before)
    return stepped, given


def test_spikes_and_numbers_that_are_not_finite_are_skipped_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(spikes, "WINDOW", 4)
    guard = UpdateGuard(limit=3, spike_factor=10.0)
    norms = [1.0, 500.0, 1.0, 1.0, math.nan, 1.0, 99.0, math.inf, 1.0, 9.0]
    stepped, given = run(guard, norms)
    assert stepped == [True, True, True, True, False, True, False, False, True, True]
    assert given == [norm if math.isfinite(norm) else 0.0 for norm in norms]  # the log shows a spike
    assert (guard.skipped, guard.skipped_spikes, guard.consecutive) == (3, 1, 0)
    assert "update 7 skipped: its gradient norm 99 is more than 10 times the median 1 (1 in a row" in caplog.text
    assert "update 8 skipped: its loss or gradient is not finite (2 in a row, 3 in all)" in caplog.text


def test_both_kinds_in_a_row_are_divergence(monkeypatch):
    monkeypatch.setattr(spikes, "WINDOW", 4)
    guard = UpdateGuard(limit=3, spike_factor=10.0)
    with pytest.raises(TrainingDiverged, match=r"^3 updates in a row .* up to update 7"):
        run(guard, [1.0, 1.0, 1.0, 1.0, 99.0, math.nan, 99.0])
    run(UpdateGuard(limit=0, spike_factor=10.0), [1.0, 1.0, 1.0, 1.0, 99.0, math.nan, 99.0])


def test_a_restored_guard_decides_as_an_unbroken_one(monkeypatch):
    monkeypatch.setattr(spikes, "WINDOW", 4)
    whole, first, second = (UpdateGuard(limit=3, spike_factor=10.0) for _ in range(3))
    start, rest = [1.0, 2.0, 3.0, 99.0, 50.0], [100.0, 1.0, 800.0]
    stepped, _ = run(first, start)
    second.restore(first.state())
    assert run(whole, [*start, *rest])[0] == stepped + run(second, rest)[0]
    assert whole.state() == second.state()
    old = {"skipped_updates": 4, "consecutive_skipped": 1}  # a checkpoint from before there was more to keep
    second.restore(old)
    assert {**UpdateGuard(limit=3).state(), **old} == second.state()


def test_a_lower_rate_is_for_the_step_and_not_for_the_schedule():
    guard, model = UpdateGuard(limit=3), nn.Linear(1, 1, bias=False)
    optimizer = Optimizer(model)
    for scale in (1.0, 0.25):
        guard.lr_scale = scale
        nn.init.zeros_(model.weight)
        model.weight.grad = torch.ones(1, 1)
        guard.step(optimizer, model, 1)
        assert model.weight.item() == -0.5 * scale
        assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_broken_value_is_found_and_huge_ones_are_none(dtype, bad):
    model = nn.Linear(300, 40).to(dtype)
    optimizer = Optimizer(model)
    assert find_broken(model, optimizer) == ""
    nn.init.constant_(model.weight, torch.finfo(dtype).max)  # the sum is infinite, the weights are not
    assert find_broken(model, optimizer) == ""
    model.weight.data[7, 9] = bad
    assert find_broken(model, optimizer) == "weight"
    nn.init.zeros_(model.weight)
    optimizer.optimizer.state[model.bias] = {"step": 1, "exp_avg": torch.zeros(40), "touched": [1, 2]}
    assert find_broken(model, optimizer) == ""
    optimizer.optimizer.state[model.bias]["exp_avg"][3] = bad
    assert find_broken(model, optimizer) == "exp_avg of bias in the optimiser"


def test_broken_weights_are_divergence_at_once():
    model = nn.Linear(1, 1)
    model.bias.data.fill_(math.nan)
    guard, optimizer = UpdateGuard(limit=20), Optimizer(model, [math.nan])
    guard.watch(optimizer)
    optimizer.clip_grad_norm(1.0)
    with pytest.raises(TrainingDiverged, match=r"^bias is not finite any more after update 4"):
        guard.step(optimizer, model, 5)


def test_numbered_checkpoints_from_after_the_one_gone_back_to_are_removed(tmp_path):
    kept = ["checkpoint_1_10.pt", "checkpoint_best.pt", "notes_1_99.pt"]
    for name in ("checkpoint_1_20.pt", "checkpoint_2_30.pt", *kept):
        (tmp_path / name).touch()
    remove_given_up(tmp_path, SavedCheckpoint(tmp_path / "checkpoint_1_10.pt", 10, steady=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_training_that_may_not_go_back_says_what_to_try():
    guard = UpdateGuard(limit=3)
    task = SimpleNamespace(guard=guard, cfg=SimpleNamespace(rollbacks=2))
    guard.rollbacks = 2
    with pytest.raises(TrainingDiverged, match=r"^why\. training went back to a checkpoint 2 times already; .* --lr"):
        go_back(None, None, task, None, TrainingDiverged("why"))
    with pytest.raises(TrainingDiverged, match=r"^why$"):  # a task of others
        go_back(None, None, SimpleNamespace(), None, TrainingDiverged("why"))
