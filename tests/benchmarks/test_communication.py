"""Bytes by link of each method, in real processes: what must hold whatever the routing."""

import pytest

from benchmarks import communication


def test_each_method_saves_what_it_says():
    args = communication.parse(["--tokens", "64", "--d-model", "16", "--experts", "8", "--updates", "6"])
    rows = {row.name: row for row in communication.measure(args)}
    plain = rows["top-2"]
    # Two rows a token, fp32, there and back, forward and backward; half of the ranks are on the other host.
    expected = 4 * 64 * 2 * 16 * 4 * 4 / 2
    assert plain.other_hosts == pytest.approx(expected, rel=0.15)
    assert rows["top-2, bf16 payload"].other_hosts == plain.other_hosts / 2
    assert rows["top-2, CMR, gates not dropped"].other_hosts == plain.other_hosts
    assert rows["top-2, CMR, gate dropout 0.2"].other_hosts == pytest.approx(0.8 * plain.other_hosts, rel=0.1)
    assert rows["top-2, two steps"].other_hosts < plain.other_hosts
    assert rows["bilevel, top-2, two steps"].other_hosts < 0.75 * rows["bilevel, top-2"].other_hosts
    text = communication.table(list(rows.values()))
    assert "| top-2, bf16 payload |" in text and " 0.50 | 0.50 |" in text


def test_one_host_is_refused(capsys):
    with pytest.raises(SystemExit):
        communication.parse(["--hosts", "0,0"])
    assert "name two at least, such as 0,0,1,1" in capsys.readouterr().err
