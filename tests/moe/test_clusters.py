"""MoEC: its gate, its variance loss and its expert dropout, under its own gate and under the top-k one."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.cases import cases, make_case, run_layer, run_reference
from reference.compare import assert_all_close, assert_close, gradients
from torch.autograd import gradcheck
from torch.nn import functional as F

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.clusters import surviving_experts
from mtmoe.moe.losses import cluster_gap, cluster_variance_loss

MOEC = {"gate": "moec", "top_k": 1, "normalize_weights": "none", "cosine_gate_dim": 5}
BF16_UNITS = 6  # as in test_layer.py


def small(**options) -> MoEConfig:
    return MoEConfig(**({"d_model": 6, "d_ffn": 10, "num_experts": 8, "expert_clusters": 2} | options))


# Against the slow layer: outputs, losses, gradients


@settings(max_examples=150)
@given(case=cases(clusters=True), training=st.booleans())
def test_fp64_agrees_with_loop_over_tokens(case, training):
    assert_all_close(run_layer(case, torch.float64, training), run_reference(case, training), torch.float64)


@settings(max_examples=60)
@given(case=cases(policies=("sampling", "random"), clusters=True), training=st.booleans())
def test_random_policies_agree_with_loop_once_drawn(case, training):
    assert_all_close(run_layer(case, torch.float64, training), run_reference(case, training), torch.float64)


@settings(max_examples=80)
@given(case=cases(clusters=True), training=st.booleans())
def test_fp32_agrees_with_loop_over_tokens(case, training):
    assert_all_close(run_layer(case, torch.float32, training), run_reference(case, training), torch.float32)


@settings(max_examples=80)
@given(case=cases(clusters=True), training=st.booleans(), autocast=st.booleans())
def test_bf16_agrees_with_loop_over_tokens(case, training, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    actual = run_layer(case, dtype, training, autocast)
    assert_all_close(actual, run_reference(case, training), torch.bfloat16, units=BF16_UNITS)
    assert actual["cluster_variance"].dtype == torch.float32


@settings(max_examples=30)
@given(case=cases(clusters=True), training=st.booleans())
def test_statistics_agree_with_counting(case, training):
    from reference import moe as reference

    actual = case.layer.train(training)(case.x, case.padding, case.survivors).statistics
    survivors = case.survivors.tolist() if training and case.survivors is not None else None
    parameters = dict(case.layer.named_parameters())
    expected = reference.moe_layer(
        parameters, case.x, case.padding.tolist(), case.config, training, survivors=survivors
    ).statistics
    for name in ("tokens", "tokens_per_expert", "first_choice_per_expert", "probability_per_expert", "dropped", "load",
                 "entropy"):  # fmt: skip
        assert_close(getattr(actual, name), expected[name], torch.float32, name)


# Expert dropout


@settings(max_examples=60)
@given(
    clusters=st.integers(1, 4), size=st.integers(2, 6), rate=st.sampled_from([0.5, 0.75, 1.0]),
    seed=st.integers(-3, 10**10), update=st.integers(0, 10**6), layer=st.integers(0, 40),
)  # fmt: skip
def test_each_cluster_keeps_as_many(clusters, size, rate, seed, update, layer):
    config = small(
        num_experts=clusters * size, expert_clusters=clusters, cluster_expert_dropout=rate, **MOEC
    )
    survivors = surviving_experts(config, seed, update, layer)
    assert survivors.tolist() == sorted(set(survivors.tolist()))
    kept = max(1, size - int(rate * size))
    assert torch.bincount(survivors // size, minlength=clusters).tolist() == [kept] * clusters
    first = update // 250 * 250
    for same in (first, first + 249):
        assert torch.equal(surviving_experts(config, seed, same, layer), survivors)


def test_survivors_change_with_the_interval_the_seed_and_the_layer():
    config = small(num_experts=64, expert_clusters=8, cluster_expert_dropout=0.5, cluster_expert_dropout_interval=10)
    keys = [(1, 0, 0), (1, 10, 0), (1, 20, 0), (2, 0, 0), (1, 0, 1), (0, 0, 1)]
    drawn = [tuple(surviving_experts(config, *key).tolist()) for key in keys]
    assert len(set(drawn)) == len(keys)


def test_every_expert_survives_its_share_of_the_time():
    config = small(cluster_expert_dropout=0.5, cluster_expert_dropout_interval=1)
    draws = 2000
    counts = torch.zeros(8)
    for update in range(draws):
        counts[surviving_experts(config, 1, update, 3)] += 1
    assert (counts / draws - 0.5).abs().max() < 4 * math.sqrt(0.25 / draws)


def test_without_dropout_all_take_part():
    assert surviving_experts(small(), 1, 0, 0) is None


@pytest.mark.parametrize("options", [MOEC, {}, {"top_k": 1, "normalize_weights": "none"}])
def test_dropped_experts_get_neither_tokens_nor_gradient(options):
    case = make_case(small(cluster_expert_dropout=0.5, **options), 60, padding="random")
    output = case.layer.train()(case.x, case.padding, case.survivors)
    dropped = torch.ones(8, dtype=torch.bool).index_fill(0, case.survivors, False)
    assert dropped.sum() == 4
    assert output.statistics.tokens_per_expert[dropped].sum() == 0
    assert (output.statistics.tokens_per_expert[~dropped] > 0).all()
    assert output.statistics.gate_probs[:, dropped].abs().max() == 0
    total = (output.y * case.direction).sum() + sum(output.losses.values())
    for name, grad in gradients(total, dict(case.layer.named_parameters())).items():
        if len(grad) == 8 and name not in ("gate.projection",):
            assert (grad[dropped] == 0).all(), name
            assert (grad[~dropped] != 0).flatten(1).any(dim=1).all(), name


@settings(max_examples=40)
@given(case=cases(clusters=True, max_tokens=13))
def test_the_survivors_are_a_smaller_layer(case):
    """Dropping experts is having fewer of them, with their own losses, but for capacity, which counts all experts."""
    survivors = torch.arange(case.config.num_experts) if case.survivors is None else case.survivors
    config = replace(case.config, cluster_expert_dropout=0.0, capacity_factor=0.0, num_experts=len(survivors))
    small_layer = MoELayer(config).double()
    state = case.layer.state_dict()
    for name in state:
        if name.startswith("experts.") or name == "gate.weight":
            state[name] = state[name][survivors]
    small_layer.load_state_dict(state)
    whole = MoELayer(replace(case.config, capacity_factor=0.0)).double()
    whole.load_state_dict(case.layer.state_dict())
    expected, actual = small_layer(case.x, case.padding), whole(case.x, case.padding, case.survivors)
    assert_close(actual.y, expected.y, torch.float64)
    for name, loss in expected.losses.items():
        assert_close(actual.losses[name], loss, torch.float64, name)
    assert_close(actual.statistics.load, expected.statistics.load, torch.float64)


@pytest.mark.parametrize("options", [MOEC, {}])
def test_evaluation_uses_all_experts_and_nothing_draws(options):
    case = make_case(small(cluster_expert_dropout=0.5, **options), 60)
    plain = MoELayer(small(**options)).double().eval()
    plain.load_state_dict(case.layer.state_dict())
    before = torch.get_rng_state()
    surviving_experts(case.config, 1, 0, 0)
    case.layer.train()(case.x, None, case.survivors)
    evaluated = case.layer.eval()(case.x, None, case.survivors)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(evaluated.y, plain(case.x).y)
    assert torch.equal(evaluated.y, case.layer(case.x).y)
    assert (evaluated.statistics.tokens_per_expert > 0).all()


def test_training_without_survivors_is_refused():
    layer = MoELayer(small(cluster_expert_dropout=0.5))
    with pytest.raises(ValueError, match=r"cluster_expert_dropout=0\.5 needs survivors in training"):
        layer(torch.zeros(3, 6))


# Variance loss


def sums_of(seed: int = 0, experts: int = 6) -> torch.Tensor:
    return torch.rand(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10


def test_equal_sums_within_clusters_have_no_variance():
    sums = torch.tensor([5.0, 5.0, 1.0, 1.0, 3.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = cluster_variance_loss(sums, 18, 3)
    loss.backward()
    assert loss == 0
    assert (sums.grad == 0).all()
    assert cluster_variance_loss(sums, 18, 1) > 0  # over all experts they differ


def test_numbers_of_experts_matter_between_clusters_only():
    sums = torch.tensor([1.0, 2.0, 4.0, 7.0, 8.0, 10.0], dtype=torch.float64)
    loss = cluster_variance_loss(sums, 30, 2)
    assert_close(cluster_variance_loss(sums[[2, 0, 1, 4, 5, 3]], 30, 2), loss, torch.float64)
    assert_close(cluster_variance_loss(sums[[3, 4, 5, 0, 1, 2]], 30, 2), loss, torch.float64)
    assert cluster_variance_loss(sums[[3, 1, 2, 0, 4, 5]], 30, 2) > 2 * loss


def test_one_expert_a_cluster_has_no_variance():
    assert cluster_variance_loss(sums_of(), 30, 6) == 0


def test_variance_of_sums_is_the_releases_loss_for_each_token():
    sums, tokens = sums_of(), 30
    release = 6 * sums.view(2, 3).var(dim=1, correction=0).mean()  # E * V(m), m summed over tokens
    assert_close(tokens * cluster_variance_loss(sums, tokens, 2, scale="sum"), release, torch.float64)
    assert_close(tokens * cluster_variance_loss(sums, tokens, 2), release / tokens, torch.float64)


def test_gap_is_that_between_the_best_groups():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    assert_close(cluster_gap(probs[:1], 1, 2), (0.7 - 0.3) / 2, torch.float32)
    assert_close(cluster_gap(probs, 3, 2), (0.2 + 0.0 + 0.5) / 3, torch.float32)
    real = torch.tensor([True, False, False])
    assert_close(cluster_gap(probs, 1, 2, real), 0.2, torch.float32)
    sums = sums_of()
    gap = torch.tensor(0.3, dtype=torch.float64)
    assert_close(
        cluster_variance_loss(sums, 30, 2, gap=gap), cluster_variance_loss(sums, 30, 2).item() / math.exp(0.3),
        torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("options", [MOEC, {}])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_descent_on_the_variance_makes_clusters_even(options, kind):
    layer = make_case(small(cluster_variance_type=kind, **options), 1).layer
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def variance():
        sums = layer(x).statistics.probability_per_expert / 200
        return (sums if kind == 0 else sums.view(2, 4)).var(dim=-1, correction=0).mean().item()

    before = variance()
    optimizer = torch.optim.Adam(layer.gate.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        layer(x).losses["cluster_variance"].backward()
        optimizer.step()
    assert variance() < before / 2


def test_only_clusters_have_a_variance():
    assert "cluster_variance" not in MoELayer(small(expert_clusters=0))(torch.randn(3, 6)).losses
    losses = MoELayer(small())(torch.randn(3, 6)).losses
    assert set(losses) == {"load_balance", "router_z", "cluster_variance"}


# MoEC's gate


def alpha_of(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    gate = layer.gate
    cosine = F.cosine_similarity((x @ gate.projection.T)[:, None], gate.weight[None], dim=-1).amax(dim=-1)
    return torch.sigmoid(cosine / gate.log_temperature.exp())[:, None]


def network(layer: MoELayer, x: torch.Tensor, number: int = 0) -> torch.Tensor:
    bank = layer.experts
    hidden = F.relu(F.linear(x, bank.w_in[number], bank.b_in[number]))
    return F.linear(hidden, bank.w_out[number], bank.b_out[number])


def test_one_expert_is_the_dense_network_times_alpha():  # U1, whose weight of 1 MoEC does not have
    layer = make_case(small(num_experts=1, expert_clusters=1, **MOEC), 13).layer
    x = torch.randn(13, 6, dtype=torch.float64)
    assert torch.equal(layer.gate(x).expert_index, torch.zeros(13, 1, dtype=torch.int64))
    assert_close(layer(x).y, alpha_of(layer, x) * network(layer, x), torch.float64)


def test_with_the_residual_it_is_the_papers_mixture():
    """``alpha FFN(x) + (1 - alpha) x`` for an FFN with a residual connection of its own."""
    layer = make_case(small(num_experts=1, expert_clusters=1, **MOEC), 13).layer
    x = torch.randn(13, 6, dtype=torch.float64)
    normed = F.layer_norm(x, (6,))
    alpha = alpha_of(layer, normed)
    expected = alpha * (x + network(layer, normed)) + (1 - alpha) * x
    assert_close(x + layer(normed).y, expected, torch.float64)


def test_equal_experts_are_the_dense_network_times_alpha():  # U2, likewise
    layer = make_case(small(**MOEC), 13).layer
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight[:] = weight[:1].clone()
    x = torch.randn(13, 6, dtype=torch.float64)
    assert_close(layer(x).y, alpha_of(layer, x) * network(layer, x), torch.float64)


def unlimited(case) -> MoELayer:
    config = replace(case.config, capacity_factor=0.0, eval_capacity_factor=0.0, eval_capacity_token_fraction=0.0)
    layer = MoELayer(replace(config, load_balance_include_padding=False)).double()
    layer.load_state_dict(case.layer.state_dict())
    return layer


@settings(max_examples=30)
@given(case=cases(clusters=True, max_tokens=13), training=st.booleans())
def test_permuted_tokens_permute_the_output(case, training):  # U3
    layer = unlimited(case).train(training)
    order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(case.seed))
    expected = layer(case.x, case.padding, case.survivors)
    actual = layer(case.x[order], case.padding[order], case.survivors)
    assert_close(actual.y, expected.y[order], torch.float64)
    assert_close(actual.losses["cluster_variance"], expected.losses["cluster_variance"], torch.float64)


@settings(max_examples=30)
@given(case=cases(clusters=True, max_tokens=13))
def test_renumbered_experts_leave_the_output(case):  # U4; the variance loss, if they stay in their clusters
    expected = case.layer.eval()(case.x, case.padding)
    generator = torch.Generator().manual_seed(case.seed)
    size = case.config.num_experts // case.config.expert_clusters
    order = torch.cat([
        torch.randperm(size, generator=generator) + cluster * size for cluster in range(case.config.expert_clusters)
    ])  # fmt: skip
    with torch.no_grad():
        for parameter in (case.layer.gate.weight, *case.layer.experts.parameters()):
            parameter.copy_(parameter[order].clone())
    actual = case.layer(case.x, case.padding)
    assert_close(actual.y, expected.y, torch.float64)
    for name, loss in expected.losses.items():
        assert_close(actual.losses[name], loss, torch.float64, name)


@settings(max_examples=30)
@given(case=cases(clusters=True, max_tokens=13))
def test_padding_is_inert(case):  # U5
    layer, real = unlimited(case).train(), ~case.padding
    results = []
    for x, padding, direction in (
        (case.x, case.padding, case.direction),
        (case.x[real], None, case.direction[real]),
    ):
        x = x.clone().requires_grad_()
        output = layer(x, padding, case.survivors)
        total = (output.y * direction).sum() + sum(output.losses.values())
        found = gradients(total, {"x": x, **dict(layer.named_parameters())})
        results.append({"y": output.y, **output.losses, **{f"d {name}": grad for name, grad in found.items()}})
    with_padding, without = results
    for name in ("y", "d x"):
        assert (with_padding[name][case.padding] == 0).all()
        with_padding[name] = with_padding[name][real]
    for name, value in without.items():
        assert_close(with_padding[name], value, torch.float64, name)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("options", [MOEC, MOEC | {"cmr": True, "capacity_factor": 0.5}, {}])
def test_gradcheck(options, kind):  # U7
    config = small(
        d_model=3, d_ffn=4, activation="gelu", cluster_variance_type=kind, cluster_expert_dropout=0.5, **options
    )
    case = make_case(config, 5, padding="random", seed=5)
    names = [name for name, _ in case.layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in case.layer.parameters()]

    def forward(x, *weights):
        arguments = (x, case.padding, case.survivors)
        output = torch.func.functional_call(case.layer, dict(zip(names, weights, strict=True)), arguments)
        return output.y, *output.losses.values()

    assert gradcheck(forward, (case.x.clone().requires_grad_(), *values))


def test_evaluation_is_deterministic():  # U6
    case = make_case(small(cluster_expert_dropout=0.5, jitter=0.1, **MOEC), 30)
    case.layer.eval()
    assert torch.equal(case.layer(case.x).y, case.layer(case.x).y)


def test_the_gate_starts_as_in_the_paper():
    torch.manual_seed(0)
    gate = MoELayer(small(d_model=64, num_experts=16, **{**MOEC, "cosine_gate_dim": 32})).gate
    assert gate.projection.shape == (32, 64)
    assert_close(gate.log_temperature.exp(), torch.tensor([0.07]), torch.float32)
    assert_close(gate.weight @ gate.weight.T, 0.01 * torch.eye(16), torch.float32, scale=1.0)


def test_probabilities_keep_the_fixed_temperature_and_alpha_has_the_learnt_one():
    layer = make_case(small(**MOEC), 1).layer
    x = torch.randn(9, 6, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.gate.log_temperature += 1
    after = layer(x)
    assert torch.equal(after.statistics.gate_probs, before.statistics.gate_probs)
    assert not torch.equal(after.y, before.y)
    grad = torch.autograd.grad(after.y.square().sum(), layer.gate.log_temperature)[0]
    assert grad != 0
    assert torch.autograd.grad(layer(x).losses["load_balance"], layer.gate.projection)[0].abs().sum() > 0


def test_the_length_of_a_token_does_not_matter_to_its_choice():
    gate = make_case(small(**MOEC), 1).layer.gate
    x = torch.randn(20, 6, dtype=torch.float64)
    assert_close(gate(x * 7).gate_probs, gate(x).gate_probs, torch.float64)


def test_a_token_of_zeros_is_harmless():
    layer = MoELayer(small(**MOEC))
    x = torch.zeros(3, 6, requires_grad=True)
    output = layer(x)
    (output.y.sum() + sum(output.losses.values())).backward()
    assert all(torch.isfinite(each).all() for each in (output.y, x.grad, layer.gate.projection.grad))


def test_tokens_without_a_slot_pass_by():
    case = make_case(small(capacity_factor=0.25, **MOEC), 40, crowd="one_expert")
    output = case.layer.train()(case.x)
    assert output.statistics.dropped > 30
    assert (output.y == 0).all(dim=-1).sum() == output.statistics.dropped
