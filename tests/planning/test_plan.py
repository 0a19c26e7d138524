"""What a plan recommends, and what it refuses."""

import json
from dataclasses import asdict, fields, replace

import pytest

from mtmoe.errors import ConfigError
from mtmoe.field_texts import field_texts
from mtmoe.planning import presets
from mtmoe.planning.assumptions import Assumptions, with_overrides
from mtmoe.planning.hardware import GIB, GPUS, Cluster
from mtmoe.planning.model import ModelShape
from mtmoe.planning.plan import effects, estimate, make_plan
from mtmoe.planning.training import TrainingSetup

BASE = presets.by_name("mtmoe_transformer_base", 32_000)
NLLB = presets.by_name("mtmoe_transformer_nllb", 256_206)
SETUP = TrainingSetup()


def cluster(gpus=8, gpu="a100-80", **changes):
    return Cluster(replace(GPUS[gpu], **changes), gpus, 8)


def test_the_fastest_that_fits_is_recommended():
    plan = make_plan(NLLB, cluster(64), TrainingSetup(dtype="bf16", zero1=True))
    assert [each.layout.expert_parallel for each in plan.estimates] == [1, 2, 4, 8, 16, 32, 64]
    assert plan.best is not None
    fitting = [each for each in plan.estimates if each.fits]
    assert 0 < len(fitting) < len(plan.estimates)
    assert plan.best.time.total == min(each.time.total for each in fitting)
    assert "would not fit in memory" in plan.reason
    assert "x the time" in plan.reason
    memory = [each.memory.weights for each in plan.estimates]
    assert memory == sorted(memory, reverse=True)


def test_a_way_out_is_named_and_works():
    setup = TrainingSetup(dtype="bf16")
    plan = make_plan(NLLB, cluster(64), setup)
    assert plan.best is None
    assert plan.reason.endswith("it would with --zero1")
    assert make_plan(NLLB, cluster(64), replace(setup, zero1=True)).best is not None
    small = cluster(64, memory=38 * GIB)
    tight = make_plan(NLLB, small, replace(setup, tokens=131_072))
    assert "--tokens" in tight.reason
    tokens = int(tight.reason.rsplit(" ", 1)[1])
    saving = replace(setup, zero1=True, recompute=True, offload=True)
    assert make_plan(NLLB, small, replace(saving, tokens=tokens)).best is not None
    assert make_plan(NLLB, small, replace(saving, tokens=2 * tokens)).best is None
    hopeless = make_plan(NLLB, cluster(8, memory=4 * GIB), setup)
    assert hopeless.reason.endswith("take more GPUs, GPUs with more memory, or a smaller model")


def test_one_gpu_and_a_dense_model_have_one_layout():
    assert len(make_plan(BASE, cluster(1), SETUP).estimates) == 1
    dense = replace(BASE, encoder_moe_freq=0, decoder_moe_freq=0)
    plan = make_plan(dense, cluster(8), SETUP)
    assert len(plan.estimates) == 1
    assert plan.estimates[0].time.experts == plan.estimates[0].time.all_to_all == 0


def test_time_adds_up_and_follows_the_rates():
    plan = make_plan(BASE, cluster(8), SETUP, expert_parallel=8)
    (one,) = plan.estimates
    assert one.time.total == pytest.approx(sum(asdict(one.time).values()))
    assumed = Assumptions()
    flops = plan.step_flops / (312e12 * assumed.utilisation)
    assert one.time.compute + one.time.experts >= flops * 0.999
    assert one.tokens_a_second == pytest.approx(4096 * 8 / one.time.total)
    (twice,) = make_plan(BASE, cluster(8), replace(SETUP, accumulate=2), expert_parallel=8).estimates
    assert twice.time.compute == pytest.approx(2 * one.time.compute)
    assert twice.time.all_reduce == one.time.all_reduce
    (halved,) = make_plan(BASE, cluster(8), SETUP, replace(assumed, all_reduce_overlap=0.5), 8).estimates
    assert halved.time.all_reduce == pytest.approx(one.time.all_reduce / 2)


def test_few_tokens_are_bound_by_reading_the_experts():
    few, many = (
        make_plan(NLLB, cluster(64), TrainingSetup(tokens=tokens, length=64, zero1=True, dtype="bf16"), None, 64)
        for tokens in (64, 65_536)
    )
    local = few.parameters.experts / 64
    # bf16 weights in both passes, and bf16 gradients, at 80 % of 2,039 GB/s.
    assert few.estimates[0].time.experts == pytest.approx(local * 6 / (0.8 * 2039e9))
    assert many.estimates[0].time.experts > 10 * few.estimates[0].time.experts


def test_effects_change_what_they_should():
    model = replace(NLLB, eom=0.0)
    plan = make_plan(model, cluster(64), TrainingSetup(dtype="bf16", zero1=True))
    rows = dict(effects(plan))
    base = rows.pop("as planned")
    assert "--zero1" not in rows and "--payload bf16" not in rows
    assert rows["--recompute"].memory.gpu < base.memory.gpu
    assert rows["--recompute"].time.total > base.time.total
    assert rows["--offload"].memory.optimiser < base.memory.optimiser
    assert rows["--gating-dropout 0.3"].all_to_all.between_nodes == pytest.approx(0.7 * base.all_to_all.between_nodes)
    assert rows["--gating-dropout 0.3"].time.experts == base.time.experts
    assert rows["--gating-dropout 0.2, gate_expert"].time.experts == pytest.approx(0.8 * base.time.experts)
    assert rows["--bilevel"].all_to_all.between_nodes == pytest.approx(base.all_to_all.between_nodes / 2)
    assert rows["--cmr --overlap"].time.all_to_all < rows["--cmr"].time.all_to_all
    fp32 = make_plan(model, cluster(64), TrainingSetup(dtype="fp32", zero1=True))
    assert dict(effects(fp32))["--payload bf16"].all_to_all.in_node == pytest.approx(
        effects(fp32)[0][1].all_to_all.in_node / 2
    )


def test_overlap_hides_no_more_than_there_is():
    layout = make_plan(BASE, cluster(8), SETUP, expert_parallel=8).estimates[0].layout
    shape = replace(BASE, cmr=True, cmr_d_ffn=1 << 15)
    hidden = estimate(shape, replace(SETUP, overlap=True), layout, Assumptions()).time.all_to_all
    assert hidden == pytest.approx(6 * Assumptions().counts_exchange)


def test_a_plan_is_plain_json():
    document = json.loads(json.dumps(make_plan(BASE, cluster(8), SETUP).to_json(), allow_nan=False))
    assert document["recommended"] in [layout["expert_parallel"] for layout in document["layouts"]]
    assert document["parameters"]["total"] == sum(
        value for name, value in document["parameters"].items() if name not in ("total", "active")
    )
    for layout in document["layouts"]:
        parts = {name: value for name, value in layout["memory"].items() if name not in ("gpu", "host")}
        assert layout["memory"]["gpu"] == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize(
    ("model", "setup", "gpu", "text"),
    [
        (BASE, SETUP, "v100-32", "v100-32 does not multiply in bf16; choose --dtype fp16 or fp32"),
        (BASE, replace(SETUP, overlap=True), "h100", "add --cmr"),
        (replace(BASE, encoder_moe_freq=0, decoder_moe_freq=0), replace(SETUP, bilevel=True), "h100",
         "bilevel is about experts, and this model has none"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be(model, setup, gpu, text):
    with pytest.raises(ConfigError, match=text):
        make_plan(model, cluster(8, gpu), setup)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokens": 0}, "tokens=0 must be between 1"),
        ({"length": 5000}, "length=5000 must not exceed tokens=4096"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; choose one of: fp32, autocast, bf16, fp16"),
        ({"payload": "fp8"}, "payload='fp8' is unknown; choose one of: compute, fp32, bf16"),
        ({"gating_dropout": 1.5}, "gating_dropout=1.5 must be between 0 and 1"),
        ({"gating_dropout_mode": "all"}, "choose one of: gate, gate_expert"),
        ({"accumulate": -1}, "accumulate=-1 must be"),
    ],
)
def test_setups_that_cannot_be(changes, text):
    with pytest.raises(ConfigError, match=text):
        replace(SETUP, **changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"top_k": 9}, "top_k=9 must be between 1 and num_experts=8"),
        ({"encoder_heads": 7}, "encoder_heads=7 must divide d_model=512"),
        ({"vocabulary_size": 0}, "vocabulary_size=0 must be between 1"),
        ({"encoder_moe_freq": -1}, "encoder_moe_freq=-1 must not be negative"),
        ({"gate": "hash"}, "gate='hash' is unknown"),
        ({"eom": 1.0}, "eom=1.0 must be at least 0 and below 1"),
    ],
)
def test_shapes_that_cannot_be(changes, text):
    with pytest.raises(ConfigError, match=text):
        replace(ModelShape(vocabulary_size=100), **changes)


def test_every_assumption_says_where_it_comes_from():
    texts = field_texts(Assumptions)
    assert set(texts) == {field.name for field in fields(Assumptions)}
    for name, text in texts.items():
        assert any(word in text for word in ("assumed", "Source:", "upper bound", "even load")), name


def test_assumptions_can_be_changed():
    changed = with_overrides(["utilisation=0.3", "master_gradients=false", "reserved_memory=1e9"])
    assert (changed.utilisation, changed.master_gradients, changed.reserved_memory) == (0.3, False, 1e9)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("utilisation", "must be NAME=VALUE with one of: utilisation, "),
        ("speed=3", "must be NAME=VALUE with one of"),
        ("utilisation=fast", "'fast' is no number, such as utilisation=0.5"),
        ("utilisation=1.5", "assumption utilisation=1.5 must be a share"),
        ("utilisation=0", "assumption utilisation=0.0 must be a share"),
        ("utilisation=nan", "assumption utilisation=nan must be a share"),
        ("rank_imbalance=0.5", "rank_imbalance=0.5 must be at least 1"),
        ("collective_latency=-1", "collective_latency=-1.0 must not be negative"),
        ("host_memory_bandwidth=0", "host_memory_bandwidth=0.0 must be above 0"),
        ("master_gradients=1", "master_gradients=true or master_gradients=false"),
    ],
)
def test_assumptions_that_cannot_be(override, text):
    with pytest.raises(ConfigError, match=text):
        with_overrides([override])
