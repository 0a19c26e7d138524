"""docs/scaling.md says what the commands print now."""

import pytest

from benchmarks import scaling


def test_the_document_is_up_to_date():
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert text.count("```console\n$ mtmoe plan ") == 5
    assert scaling.refreshed(text) == text, "run python -m benchmarks.scaling"


def test_outputs_are_put_in_their_places():
    text = f"a\n```console\n$ mtmoe plan --gpus 1\nold\n```\nb\n{scaling.BEGIN}\nold\n{scaling.END}\nc\n"
    fresh = scaling.refreshed(text)
    assert "old" not in fresh
    assert fresh.startswith("a\n```console\n$ mtmoe plan --gpus 1\nmtmoe_transformer: 6 + 6 layers")
    assert "Recommended: expert-parallel size 1" in fresh
    assert fresh.endswith(f"|\n{scaling.END}\nc\n")


def test_more_gpus_are_no_faster_each_and_a_slow_network_is_slower():
    for case in scaling.CASES:
        planned = scaling.simulate(case, *scaling.VARIANTS["as planned"])
        slow = scaling.simulate(case, *scaling.VARIANTS["100 Gbit/s between nodes"])
        rates = [each.tokens_a_second / gpus for gpus, each in planned.items()]
        assert rates == sorted(rates, reverse=True)
        for gpus, each in slow.items():
            assert each.tokens_a_second <= planned[gpus].tokens_a_second * (1 + 1e-9)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    scaling.draw(tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
