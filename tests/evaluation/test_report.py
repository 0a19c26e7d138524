import re
import sys
from html.parser import HTMLParser

import pytest

from mtmoe.evaluation import EvaluationSettings, evaluate, report
from mtmoe.evaluation.plot import plot_directions
from mtmoe.evaluation.samples import Sample
from mtmoe.evaluation.test_sets import PreparedData


@pytest.fixture
def evaluation(data, tmp_path, fake_model):
    return evaluate(
        fake_model(wrong=2),
        PreparedData(data),
        tmp_path / "out",
        settings=EvaluationSettings(),
        model={"path": "model.pt"},
        decoding={"beam": 4},
    )


def test_markdown_tells_figures_and_how_they_were_made(evaluation):
    text = report.evaluation_markdown(evaluation.result)
    assert f"Mean chrF++ over 6 directions: {evaluation.result['mean_chrf++']:.2f}" in text
    for part in ("nw:2", "tok:13a", "as the data recipe says", "py3langid among de, en, mk", "beam 4", "into English"):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("| en-mk")]
    assert len(rows) == 1
    assert "very low" in rows[0]
    assert f" {evaluation.result['directions']['en-mk']['chrf++']:.1f} " in rows[0]


def test_markdown_table_is_aligned_and_escaped():
    table = ([("name", report.TEXT), ("x", report.NUMBER)], [["a|b", "1"], ["c", "100"]])
    assert report.markdown_table(table).splitlines() == [
        r"| name |   x |",
        "| ---- | --: |",
        r"| a\|b |   1 |",
        "| c    | 100 |",
    ]


class Page(HTMLParser):
    """Collects tags and what they refer to; fails on a tag that is not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_and_asks_for_nothing(evaluation):
    text = report.evaluation_html(evaluation.result, evaluation.samples)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert {"svg", "table", "figure"} <= set(page.tags)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)


def test_html_escapes_text(evaluation):
    sample = Sample("en-de", "<script>alert(1)</script>", "a & b", "</td>")
    text = report.evaluation_html(evaluation.result, [sample])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a &amp; b" in text


def test_plot_is_the_same_for_the_same_figures(evaluation):
    rows = evaluation.result["directions"]
    assert plot_directions(rows) == plot_directions(rows)
    changed = {name: {**row, "chrf++": row["chrf++"] / 2} for name, row in rows.items()}
    assert plot_directions(changed) != plot_directions(rows)
    assert plot_directions({name: {**row, "bucket": None} for name, row in rows.items()})


def test_report_without_matplotlib(evaluation, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_directions(evaluation.result["directions"]) is None
    assert "The plot needs matplotlib" in report.evaluation_html(evaluation.result, [])


def test_samples_show_mark_up_as_it_is():
    samples = [Sample("en-de", "Press `x`", "<b>Drücken</b>", "")]
    text = report.samples_markdown(samples)
    assert "- source: `` Press `x` ``" in text
    assert "- reference: `<b>Drücken</b>`" in text
    assert "- output: *(empty)*" in text
    assert "  reference  <b>Drücken</b>" in report.samples_text(samples)


def test_nothing_judged_is_a_dash(evaluation):
    evaluation.result["directions"]["en-mk"]["off_target"] = None
    columns, rows = report.direction_table(evaluation.result)
    off_target = [heading for heading, _ in columns].index("off-target")
    assert [row[off_target] for row in rows if row[0] == "en-mk"] == ["–"]
