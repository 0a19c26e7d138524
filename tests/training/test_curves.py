import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import ConfigError
from mtmoe.training import curves


def test_of_equal_losses_the_later_step_counts():
    curve = [(100, 2.0), (200, 1.5), (300, 1.5), (400, 1.6)]
    assert curves.best_step(curve) == 300
    assert curves.best_step(curve, tolerance=0.07) == 400


def test_smoothing_weighs_neighbours():
    assert curves.smooth([(1, 4.0), (2, 8.0), (3, 0.0)]) == [(1, 16 / 3), (2, 5.0), (3, 8 / 3)]
    assert curves.smooth([(7, 3.0)]) == [(7, 3.0)]


def test_noise_is_no_overfitting_and_a_rise_is():
    falling = [(step, 5.0 - step / 100 + 0.05 * (step % 20 == 10)) for step in range(10, 110, 10)]
    verdict = curves.judge(falling)
    assert (verdict.best_update, verdict.overfits, verdict.lost) == (100, False, 0.0)
    rising = [(step, 4.0 + abs(step - 40) / 50 + 0.05 * (step % 20 == 10)) for step in range(10, 110, 10)]
    verdict = curves.judge(rising)
    assert (verdict.best_update, verdict.last_update, verdict.overfits) == (40, 100, True)
    assert verdict.lost == pytest.approx(1.1, abs=0.15)


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=12))
def test_what_was_lost_is_never_negative(losses):
    verdict = curves.judge(list(enumerate(losses)))
    assert verdict.lost >= 0
    assert verdict.best_update <= verdict.last_update == len(losses) - 1


def test_curves_come_from_the_log(tmp_path):
    records = [
        {"kind": "train_inner", "num_updates": 10, "nll_loss": 9.0},
        {"kind": "valid", "num_updates": 10, "nll_loss": 5.0, "nll_loss_en-de": 4.0, "nll_loss_sr_Latn-en": 6.5},
        {"kind": "train_sample", "num_updates": 10, "nll_loss_en-de": 1.0},
        {"kind": "valid", "num_updates": 20, "nll_loss": 5.0, "nll_loss_en-de": 9.0},
        {"kind": "valid", "num_updates": 20, "nll_loss": 5.0, "nll_loss_en-de": 3.0, "epochs_en-de": 0.5},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert curves.read_curves(log) == {"en-de": [(10, 4.0), (20, 3.0)], "sr_Latn-en": [(10, 6.5)]}
    assert curves.read_curves(log, kind="train_sample") == {"en-de": [(10, 1.0)]}
    assert curves.read_curves(log, "epochs") == {"en-de": [(20, 0.5)]}
    with log.open("a") as file:
        file.write('{"kind": "val')  # the run is writing, or was killed
    assert curves.read_curves(log)["en-de"] == [(10, 4.0), (20, 3.0)]
    log.write_text("{\n")
    with pytest.raises(ConfigError, match="line 1 is no JSON"):
        curves.read_curves(log)


def test_when_training_of_a_direction_began():
    assert curves.trained_from([(10, 0.0), (20, 0.0), (30, 1.5)]) == 20
    assert curves.trained_from([(10, 0.2), (20, 0.4)]) == 0
    assert curves.value_at([(10, 0.2), (20, 0.4)], 15) == 0.2
    assert curves.value_at([(10, 0.2)], 9) is None
