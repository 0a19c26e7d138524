import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import ConfigError
from mtmoe.training import curriculum
from mtmoe.training.curriculum import Phase

DIRECTIONS = ("en-de", "de-en", "en-mk", "mk-en", "en-ro", "ro-en")


def test_late_directions_join_and_stay():
    schedule = curriculum.resolve(
        [Phase(start=0.5, languages=("mk",)), Phase(start=800, pairs=("ro-en",))], DIRECTIONS, max_update=1000
    )
    assert schedule.boundaries == (0, 500, 800)
    assert schedule.active(0) == schedule.active(499) == ("en-de", "de-en")
    assert schedule.active(500) == ("en-de", "de-en", "en-mk", "mk-en")
    assert schedule.active(10_000) == DIRECTIONS
    assert [schedule.next_boundary(update) for update in (0, 499, 500, 800)] == [500, 500, 800, None]


def test_the_first_phase_that_names_a_direction_counts():
    phases = [Phase(start=700, languages=("mk",)), Phase(start=300, directions=("en-mk",))]
    starts = curriculum.resolve(phases, DIRECTIONS, 1000).starts
    assert (starts["en-mk"], starts["mk-en"]) == (300, 700)


@given(st.dictionaries(st.sampled_from(DIRECTIONS[1:]), st.integers(1, 99)), st.integers(0, 100), st.integers(0, 100))
def test_active_sets_are_nested(starts, one, other):
    schedule = curriculum.resolve([Phase(start=s, directions=(d,)) for d, s in starts.items()], DIRECTIONS, 100)
    early, late = sorted((one, other))
    assert set(schedule.active(early)) <= set(schedule.active(late))
    assert set(schedule.active(early)) == {d for d in DIRECTIONS if starts.get(d, 0) <= early}


def test_dump_and_load_agree(tmp_path):
    schedule = curriculum.resolve([Phase(start=0.4, languages=("mk",))], DIRECTIONS, 1000)
    (tmp_path / "c.yaml").write_text(curriculum.dump(schedule))
    assert curriculum.resolve(curriculum.load(tmp_path / "c.yaml"), DIRECTIONS, 1000) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a list of phases"),
        ("- 3", "phase 1: 3 must be a mapping with start"),
        ("- {start: 0.5}", "phase 1: the phase at 0.5 adds nothing"),
        ("- {start: 1.5, languages: [mk]}", "start=1.5 must be a share in .0, 1. or a whole number"),
        ("- {start: -1, languages: [mk]}", "start=-1 must be"),
        ("- {start: soon, languages: [mk]}", "start='soon' must be a number"),
        ("- {start: 1, language: [mk]}", "unknown key language; choose from: start, directions"),
        ("- {start: 1, languages: [no]}", "must be a list of text, not False .put codes such as 'no' in quotes"),
        ("- {start: [}", "not valid YAML"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        curriculum.load(tmp_path / "c.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        curriculum.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("phases", "max_update", "message"),
    [
        ([Phase(start=10, languages=("mkd",))], 100, "names 'mkd', which is not in this run; did you mean: mk"),
        ([Phase(start=0.5, languages=("mk",))], 0, "a share of max_update, which is not set"),
        ([Phase(start=100, languages=("mk",))], 100, "starts at update 100, but the run ends at 100"),
        ([Phase(start=0, languages=("mk",))], 100, "has a phase at 0, but no phase names en-de, de-en, en-ro, ro-en"),
        ([Phase(start=10, languages=("en",))], 100, "nothing would train before update 10"),
    ],
)
def test_phases_that_do_not_fit_the_run(phases, max_update, message):
    with pytest.raises(ConfigError, match=message):
        curriculum.resolve(phases, DIRECTIONS, max_update)


def curve(best, floor=1.0):
    return [(step, floor + abs(step - best) / 1000) for step in range(0, 1001, 50)]


def test_derive_finds_known_minima():
    curves = {"en-de": curve(1000), "de-en": curve(900), "en-mk": curve(150), "mk-en": curve(350), "en-ro": curve(600)}
    starts = curriculum.derive(curves, 1000).starts
    assert starts == {"en-de": 0, "de-en": 0, "en-mk": 800, "mk-en": 600, "en-ro": 400}
    starts = curriculum.derive({**curves, "ro-en": curve(100)}, 1000, fit="median").starts
    assert (starts["en-mk"], starts["ro-en"], starts["mk-en"]) == (875, 875, 650)


def test_of_equal_losses_the_later_step_counts():
    assert curriculum.best_step([(100, 2.0), (200, 1.5), (300, 1.5), (400, 1.6)]) == 300


def test_derive_leaves_something_to_begin_with():
    assert curriculum.derive({"en-de": curve(500), "en-mk": curve(100)}, 1000).starts == {"en-de": 0, "en-mk": 800}


def test_derive_refuses_what_makes_no_sense():
    with pytest.raises(ConfigError, match="no validation losses of en-mk"):
        curriculum.derive({"en-de": curve(500), "en-mk": []}, 1000)
    with pytest.raises(ConfigError, match=r"must lie in .0, 1. and hold 1.0"):
        curriculum.derive({"en-de": curve(500)}, 1000, shares=(0.5,))
    with pytest.raises(ConfigError, match="fit='mean' is unknown"):
        curriculum.derive({"en-de": curve(500)}, 1000, fit="mean")


def test_curves_come_from_the_log(tmp_path):
    records = [
        {"kind": "train_inner", "num_updates": 10, "nll_loss": 9.0},
        {"kind": "valid", "num_updates": 10, "nll_loss": 5.0, "nll_loss_en-de": 4.0, "nll_loss_sr_Latn-en": 6.5},
        {"kind": "valid", "num_updates": 20, "nll_loss": 5.0, "nll_loss_en-de": 3.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curves = curriculum.read_curves(tmp_path / "log.jsonl")
    assert curves == {"en-de": [(10, 4.0), (20, 3.0)], "sr_Latn-en": [(10, 6.5)]}
    (tmp_path / "log.jsonl").write_text("{\n")
    with pytest.raises(ConfigError, match="line 1 is no JSON"):
        curriculum.read_curves(tmp_path / "log.jsonl")
