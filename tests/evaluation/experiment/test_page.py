"""Pictures and pages: complete, the same each time, and asking for nothing from outside."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mtmoe.evaluation.experiment import Experiment, summarise
from mtmoe.evaluation.experiment.page import Pictures, shown_configs, write_html, write_markdown
from mtmoe.evaluation.experiment.plots import bucket_curve
from mtmoe.evaluation.experiment.routing_plots import RoutingOf, _shared, by_resource, language_label

SCRIPT = Path(__file__).parents[3] / "eval" / "experiment.py"
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects what a browser would load, and checks that elements close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.described = [], [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href", "srcset", "data") if name in attributes]
        self.described += tag == "img" and bool(attributes.get("alt"))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def drawn(finished):
    experiment = Experiment.load(finished)
    results = summarise(experiment, None)
    return experiment, results, Pictures.draw(experiment, results)


def test_every_picture_is_drawn(drawn):
    experiment, results, pictures = drawn
    names = [picture.name for picture in (*pictures.scores, *pictures.routing)]
    assert names == [
        "toy-differences", "toy-curves", "toy-gaps-very-low", "toy-gaps-low", "toy-gaps-high",
        "toy-experts-moe", "toy-similarity-moe", "toy-experts-moe_eom", "toy-similarity-moe_eom",
        "toy-shared", "toy-specialisation",
    ]  # fmt: skip
    assert shown_configs(experiment, results) == ["moe", "moe_eom"]
    assert {picture.name for picture in pictures.main} < set(names)
    assert all(picture.caption.endswith(".") for picture in (*pictures.scores, *pictures.routing))


def test_pictures_are_the_same_each_time(drawn):
    experiment, results, pictures = drawn
    again = Pictures.draw(experiment, results)
    for one, other in zip(pictures.main, again.main, strict=True):
        assert one.png() == other.png()
        assert one.png().startswith(PNG)
        assert one.svg_address() == other.svg_address()


def test_the_page_asks_for_nothing_from_outside(drawn, tmp_path):
    _, results, pictures = drawn
    titled = json.loads(json.dumps(results).replace("moe + eom", "<b>&"))
    write_html(tmp_path / "report.html", [(titled, pictures), (results, pictures)])
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert len(page.loads) == page.described == 2 * len([*pictures.scores, *pictures.routing])
    assert "url(" not in text
    assert "&lt;b&gt;&amp;" in text
    for address in page.loads:
        kind, _, content = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(content).decode()
        assert svg.startswith("<?xml")
        # What a picture itself refers to: its own glyphs and clip paths, or pixels that stand in it.
        assert all(one.startswith(("#", "data:image/png")) for one in re.findall(r'href="([^"]*)"', svg))
        assert all(one.startswith("#") for one in re.findall(r"url\(([^)]*)\)", svg))


def test_markdown_shows_the_pictures_that_lie_beside_it(drawn, tmp_path):
    experiment, results, pictures = drawn
    write_markdown(tmp_path / "page.md", experiment, results, pictures.main)
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (tmp_path / "page.md").read_text())
    assert shown == [f"{picture.name}.png" for picture in pictures.main]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in shown)


def test_a_single_dense_run_is_enough(tmp_path, make_run):
    make_run(tmp_path / "toy", "dense", 1, outputs=False)
    experiment = Experiment.load(tmp_path / "toy")
    results = summarise(experiment, None)
    pictures = Pictures.draw(experiment, results)
    assert pictures.scores[0].name == "toy-curves"
    assert pictures.routing == []
    make_run(tmp_path / "toy", "dense", 1, outputs=False, valid=[], train_sample=[])
    experiment = Experiment.load(tmp_path / "toy")
    assert Pictures.draw(experiment, summarise(experiment, None)) == Pictures([], [], [])


def test_what_is_drawn_are_means_over_seeds(drawn):
    experiment, _, _ = drawn
    curve = bucket_curve(experiment.configs["moe"], "valid", experiment.directions("low"))
    assert [update for update, _ in curve] == [500, 1000, 1500, 2000, 2500, 3000]
    assert curve[0][1] == pytest.approx(3.02 + 6, abs=1e-3)
    routing = RoutingOf.read(experiment.configs["moe_cmr"])
    languages = ["mk", "en", "de"]
    shares = [1 - run.routing().by_target().layers[1].experts_share for run in experiment.configs["moe_cmr"]]
    expected = np.mean(shares, axis=0)  # de, en, mk
    np.testing.assert_allclose(_shared(routing, languages)[:, 1], expected[[2, 1, 0]])


def test_routing_may_stand_in_a_file_of_its_own(tmp_path, make_run, finished):
    make_run(tmp_path / "toy", "moe", 1, routing=None)
    (run,) = Experiment.load(tmp_path / "toy").runs
    assert run.routing() is None
    expected = Experiment.load(finished).configs["moe"][0].routing()
    (tmp_path / "toy" / "routing").mkdir()
    expected.save(tmp_path / "toy" / "routing" / "moe.seed1.json")
    assert run.routing().to_json() == expected.to_json()


def test_languages_are_named_and_ordered_by_their_pairs():
    pairs = {"de-en": 9000, "en-de": 9000, "en-mk": 1500, "mk-en": 1500, "qq-en": 5}
    assert language_label("en", pairs) == "English (10,500)"
    assert language_label("qq", {}) == "qq"
    assert by_resource(["mk", "qq", "en", "de"], pairs) == [2, 3, 0, 1]


def write_references(folder, references):
    (folder / "text").mkdir(parents=True)
    (folder / "languages.json").write_text(
        json.dumps({"languages": ["de", "en", "mk"], "directions": list(references)})
    )
    (folder / "data.json").write_text("{}")
    for direction, lines in references.items():
        pair = "-".join(sorted(direction.split("-")))
        path = folder / "text" / f"test.{pair}.{direction.split('-')[1]}"
        path.write_text("".join(f"{line}\n" for line in lines))


def test_script(finished, references, tmp_path):
    write_references(tmp_path / "data", references)
    shutil.copytree(finished, tmp_path / "results" / "toy")
    words = [f"toy={tmp_path / 'data'}", "--samples", "200", "--results", str(tmp_path / "results")]
    files = ["--page", str(tmp_path / "page.md"), "--report", str(tmp_path / "report.html")]
    run = subprocess.run([sys.executable, str(SCRIPT), *words, *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results" / "toy" / "results.json").read_text())
    assert results["differences"]["moe"]["moe_eom"]["all"]["all"]["p_holm"] < 0.05
    assert "***" in (tmp_path / "page.md").read_text() or "* " in (tmp_path / "page.md").read_text()
    assert (tmp_path / "report.html").is_file()
    missing = subprocess.run(
        [sys.executable, str(SCRIPT), "nothing", *words[1:], *files], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert "has no finished run" in missing.stderr
