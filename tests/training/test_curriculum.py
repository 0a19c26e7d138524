
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtmoe.errors import ConfigError
from mtmoe.training import curriculum
from mtmoe.training.curriculum import Phase
from mtmoe.training.curves import Verdict, judge_all

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


def derive(curves, *arguments, **options):
    return curriculum.derive(judge_all(curves), *arguments, **options).starts


def test_derive_finds_known_minima():
    curves = {"en-de": curve(1000), "de-en": curve(900), "en-mk": curve(150), "mk-en": curve(350), "en-ro": curve(600)}
    starts = derive(curves, 1000)
    assert starts == {"en-de": 0, "de-en": 0, "en-mk": 800, "mk-en": 600, "en-ro": 400}
    starts = derive({**curves, "ro-en": curve(100)}, 1000, fit="median")
    assert (starts["en-mk"], starts["ro-en"], starts["mk-en"]) == (875, 875, 650)


def test_what_does_not_overfit_trains_from_the_start_of_a_longer_run():
    curves = {"en-de": curve(1000), "en-mk": curve(150)}
    assert derive(curves, 5000) == {"en-de": 0, "en-mk": 4000}


def test_a_direction_that_joined_late_trained_since_then():
    curves = {"en-de": curve(1000), "en-mk": curve(900)}
    assert derive(curves, 1000) == {"en-de": 0, "en-mk": 0}
    assert derive(curves, 1000, trained_from={"en-mk": 750}) == {"en-de": 0, "en-mk": 800}


def test_derive_leaves_something_to_begin_with():
    assert derive({"en-de": curve(500), "en-mk": curve(100)}, 1000) == {"en-de": 0, "en-mk": 800}


def test_derive_refuses_what_makes_no_sense():
    with pytest.raises(ConfigError, match="no validation losses of en-mk"):
        derive({"en-de": curve(500), "en-mk": []}, 1000)
    with pytest.raises(ConfigError, match=r"must lie in .0, 1. and hold 1.0"):
        derive({"en-de": curve(500)}, 1000, shares=(0.5,))
    with pytest.raises(ConfigError, match="fit='mean' is unknown"):
        derive({"en-de": curve(500)}, 1000, fit="mean")


def test_by_count_the_smallest_join_last():
    buckets = {"en-de": "high", "en-ro": "low", "en-mk": "very_low", "mk-en": "very_low"}
    assert curriculum.derive_by_count(buckets, 1000).starts == {"en-de": 0, "en-ro": 400, "en-mk": 600, "mk-en": 600}
    assert set(curriculum.derive_by_count({"en-mk": "very_low"}, 1000).starts.values()) == {0}
    with pytest.raises(ConfigError, match="must be 3 falling numbers, for high, low, very_low"):
        curriculum.derive_by_count(buckets, 1000, shares=(1.0, 0.2))


@given(st.dictionaries(st.sampled_from(DIRECTIONS), st.integers(0, 20), min_size=1), st.integers(20, 3000))
def test_a_derived_file_gives_the_schedule_back(tmp_path_factory, bests, max_update):
    verdicts = {name: Verdict(50 * best, 1.0, 1000, 2.0) for name, best in bests.items()}
    schedule = curriculum.derive(verdicts, max_update)
    path = tmp_path_factory.mktemp("derived") / "c.yaml"
    path.write_text(curriculum.dump(schedule, max_update))
    assert curriculum.resolve(curriculum.load(path), list(bests), max_update) == schedule
