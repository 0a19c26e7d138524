"""The table of measured scaling: what is planned for each row, and how lines of metrics become figures."""

import dataclasses

import pytest

from benchmarks import scaling_measured
from benchmarks.scaling_measured import GATING_DROPOUT, OF_NODES, Measured, Setting, measure, predict, report, settings
from mtmoe.planning.hardware import Gpu

CORE = Gpu(
    name="core", memory=1e9, flops={"half": 5e10, "single": 5e10}, memory_bandwidth=1e10, network_in_node=1e9,
    network_between_nodes=1e9, host=1.0,
)  # fmt: skip


def planned(setting, tokens=4096, cores=2):
    return predict(setting, tokens, CORE, 0.5, cores)


def test_the_shape_that_is_planned_is_the_one_that_is_trained():
    from argparse import Namespace

    from benchmarks.plan import options_of

    made = vars(options_of(scaling_measured.SHAPE))
    trained = {name.replace("-", "_"): value for name, value in scaling_measured.OPTIONS.items()}
    shape = Namespace(**made)
    for name in ("encoder_layers", "decoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads",
                 "moe_ffn_embed_dim", "num_experts", "top_k", "share_all_embeddings"):  # fmt: skip
        assert getattr(shape, name) == trained[name], name
    assert shape.encoder_moe_freq == trained["moe_freq"]


def test_slow_links_and_shared_cores_take_longer_in_the_plan():
    one, two = planned(Setting(), 2048), planned(Setting(processes=2))
    assert one.time.all_to_all == one.time.all_reduce == 0
    assert two.time.compute == one.time.compute and two.time.all_reduce > 0
    assert planned(Setting(processes=2), cores=1).time.compute == 2 * two.time.compute
    hosts = Setting(hosts=2, expert_parallel=2, mbits=1000)
    fast, slow = planned(hosts), planned(dataclasses.replace(hosts, mbits=100))
    assert slow.time.all_to_all > 5 * fast.time.all_to_all
    assert fast.all_to_all == slow.all_to_all and fast.all_to_all.in_node == 0
    fewer = planned(dataclasses.replace(hosts, method=GATING_DROPOUT))
    assert fewer.all_to_all.between_nodes == pytest.approx(0.7 * fast.all_to_all.between_nodes)
    assert planned(Setting(method=OF_NODES[1], hosts=2, processes=2, expert_parallel=4)) is None


def test_an_update_is_the_mean_of_the_lines():
    lines = [{"wpb": 100, "wps": 50, "sent_other_hosts_mb": 3.0}, {"wpb": 300, "wps": 100, "sent_other_hosts_mb": 0.0}]
    assert measure(lines) == Measured(seconds=2.5, tokens=200, same_host=0, other_hosts=1.5e6)


def test_every_setting_has_a_row_and_the_first_is_planned_as_measured():
    rows = settings([None, 200])
    assert len({setting.name for setting in rows}) == len(rows)
    found = {setting: [Measured(2.0, 1000.0 * setting.world_size, 0, 5e5)] for setting in rows}
    lines = report(found, CORE, 2).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2 : 2 + len(rows)]]
    assert [row[1] for row in cells] == [setting.method.name for setting in rows]
    assert cells[0][0] == "1 process" and cells[0][-1] == "1.00" and cells[0][5] == "1.00"
    assert cells[1][5] == "2.00"  # two processes make twice the tokens in the same time
    assert {row[5] for row in cells[3:]} == {"1.00"}  # of top-2 in the same place
