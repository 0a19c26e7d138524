"""Tables as text, and the page that they are put into."""

import pytest

from mtmoe.evaluation.experiment import Experiment, summarise
from mtmoe.evaluation.experiment.tables import (
    group_table,
    main_table,
    markdown,
    ordered,
    significance_table,
    training_table,
    write_between_markers,
)


@pytest.fixture
def results(finished, references):
    return summarise(Experiment.load(finished), references, samples=200)


def test_main_table(results):
    assert ordered(results) == ["moe", "dense", "moe_eom", "moe_cmr"]
    columns, rows = main_table(results)
    assert [name for name, _ in columns] == [
        "configuration", "seeds", "very low", "Δ", "low", "Δ", "high", "Δ", "all", "Δ", "Δ all to dense"
    ]  # fmt: skip
    baseline, eom = rows[0], rows[2]
    assert baseline[0] == "moe"
    assert baseline[3] == ""
    group = results["differences"]["moe"]["moe_eom"]["all"]["all"]
    assert eom[9] == f"{group['difference']:+.2f} ± {group['spread']:.2f}{group['stars']}"
    score = results["configurations"]["moe_eom"]["scores"]["chrf++"]["all"]["very_low"]
    assert eom[2] == f"{score['mean']:.2f} ± {score['spread']:.2f}"


def test_group_and_training_tables(results):
    columns, rows = group_table(results)
    names = [name for name, _ in columns]
    assert "very low x→y" in names
    assert "low x→y" not in names  # there is no such direction
    assert all(len(row) == len(columns) for row in rows)
    columns, rows = training_table(results)
    assert rows[0][0] == "moe"
    assert rows[0][1] == "2,500"
    assert rows[0][-2] == "1.2"
    assert rows[0][-3].startswith("2,020 ± 10")


def test_significance_table(results):
    _, rows = significance_table(results, "very_low")
    assert [row[0] for row in rows] == ["dense", "moe + eom", "moe + cmr"]
    found = results["differences"]["moe"]["moe_eom"]["all"]["very_low"]
    assert rows[1][1] == f"{found['difference']:+.2f}{found['stars']}"
    assert rows[1][4] == f"{found['p_holm']:.4f}"
    assert rows[1][5].count(",") == 2
    assert rows[1][6:8] == ["2", "0"]
    assert "How sure the difference is for very low-resource directions" in markdown(results)


def test_tables_of_one_run(tmp_path, make_run):
    make_run(tmp_path / "toy", "moe_eom", 1, valid=[], outputs=False)
    results = summarise(Experiment.load(tmp_path / "toy"), None)
    columns, rows = main_table(results)
    assert [name for name, _ in columns] == ["configuration", "seeds", "very low", "low", "high", "all"]
    assert "±" not in "".join(rows[0])
    assert training_table(results)[1][0][1] == "–"
    assert significance_table(results, "all")[1] == []
    assert "Buckets are disjoint" in markdown(results)


def test_text_goes_between_markers_and_the_rest_stays(tmp_path):
    page = tmp_path / "docs" / "page.md"
    write_between_markers(page, "toy", "one")
    page.write_text(f"# Title\n\nbefore\n\n{page.read_text()}\nafter\n")
    write_between_markers(page, "other", "else")
    write_between_markers(page, "toy", "two")
    text = page.read_text()
    assert text.startswith("# Title\n\nbefore\n\n<!-- toy: begin")
    assert "\n\ntwo\n\n<!-- toy: end -->\n\nafter" in text
    assert "one" not in text
    assert text.count("else") == 1
    write_between_markers(page, "toy", "two")
    assert page.read_text() == text
