"""EOM, FOM and gating dropout: what is masked, how often, what it costs in expectation, and what gets a gradient."""

import math

import pytest
import torch
from reference import moe as reference
from reference.cases import make_case
from reference.compare import assert_all_close, assert_close, gradients
from torch.utils.checkpoint import checkpoint

from mtmoe.moe import MoEConfig, MoELayer
from mtmoe.moe.capacity import limit
from mtmoe.moe.masking import mask_expert_outputs


def small(**options) -> MoEConfig:
    return MoEConfig(**({"d_model": 6, "d_ffn": 10, "num_experts": 4} | options))


def twin(case, **options) -> MoELayer:
    """A layer with the same weights and other options."""
    config = MoEConfig(**{name: getattr(case.config, name) for name in case.config.__dataclass_fields__} | options)
    layer = MoELayer(config).double()
    layer.load_state_dict(case.layer.state_dict())
    return layer


def repeated(case, copies: int):
    """One token many times: each copy gets its own masks, so one pass gives a sample of them."""
    return case.x[:1].expand(copies, -1).contiguous()


def within_four_sigma(sample, expected):
    """(draws, d_model) against (d_model,)."""
    error = (sample.mean(dim=0) - expected).abs()
    bound = 4 * sample.std(dim=0) / math.sqrt(len(sample))
    assert (error <= bound + 1e-12).all(), f"{error.tolist()} is more than {bound.tolist()}"


# EOM and FOM alike

METHODS = [{"eom": 0.3}, {"fom": 0.3}, {"eom": 0.25, "fom": 0.4}]
TOP_1 = {"top_k": 1, "normalize_weights": "none"}


@pytest.mark.parametrize("cmr", [False, True])
@pytest.mark.parametrize("top", [{}, TOP_1, {"top_k": 3, "normalize_weights": "before_drop"}])
@pytest.mark.parametrize("scale", ["eval", "inverted"])
@pytest.mark.parametrize("method", METHODS)
def test_training_has_evaluation_as_its_expectation(method, scale, top, cmr):
    case = make_case(small(cmr=cmr, **top), 1, seed=2)
    layer = twin(case, masking_scale=scale, **method)
    torch.manual_seed(0)
    with torch.no_grad():
        sample = layer.train()(repeated(case, 4000)).y
        within_four_sigma(sample, layer.eval()(case.x).y[0])


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_scales_the_plain_layer(method):
    case = make_case(small(), 9)
    plain = case.layer.eval()(case.x).y
    factor = (1 - method.get("eom", 0)) * (1 - method.get("fom", 0))
    assert_close(twin(case, **method).eval()(case.x).y, factor * plain, torch.float64)
    assert torch.equal(twin(case, masking_scale="inverted", **method).eval()(case.x).y, plain)


def test_eom_and_fom_evaluate_alike():
    case = make_case(small(), 9)
    assert_close(twin(case, eom=0.3).eval()(case.x).y, twin(case, fom=0.3).eval()(case.x).y, torch.float64)


@pytest.mark.parametrize(
    ("method", "top", "expected"),
    [
        ({"eom": 0.4}, {}, 0.4**2),  # both experts at once, not the rate
        ({"eom": 0.4}, TOP_1, 0.4),
        ({"eom": 0.4}, {"top_k": 3}, 0.4**3),
        ({"fom": 0.4}, {}, 0.4),
        ({"fom": 0.4}, TOP_1, 0.4),
        ({"eom": 0.4, "fom": 0.4}, {}, 1 - (1 - 0.4**2) * 0.6),
        ({"eom": 1.0}, {}, 1.0),
        ({"fom": 1.0}, {}, 1.0),
    ],
)
def test_share_of_outputs_that_are_zero(method, top, expected):
    layer = MoELayer(small(**method, **top)).train()
    torch.manual_seed(0)
    tokens = 10_000
    share = (layer(torch.randn(tokens, 6)).y == 0).all(dim=-1).double().mean().item()
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / tokens)


@pytest.mark.parametrize("method", [{"eom": 1.0}, {"fom": 1.0}])
def test_everything_masked_is_zero_in_evaluation_too(method):
    layer = MoELayer(small(**method)).eval()
    assert (layer(torch.randn(5, 6)).y == 0).all()


# EOM


def test_eom_hides_pairs_and_leaves_the_other_weights():
    config = small(eom=0.4)
    layer = MoELayer(config).train()
    seated = limit(layer.gate(torch.randn(5000, 6)), config, training=True)
    torch.manual_seed(0)
    masked = mask_expert_outputs(seated, config, training=True)
    hidden = masked.expert_index < 0
    assert torch.equal(masked.weight[~hidden], seated.weight[~hidden])
    assert torch.equal(masked.expert_index[~hidden], seated.expert_index[~hidden])
    assert (masked.weight[hidden] == 0).all()
    one, both = 2 * 0.4 * 0.6, 0.4**2
    assert abs((hidden.sum(dim=-1) == 1).double().mean() - one) < 4 * math.sqrt(one * (1 - one) / 5000)
    assert abs((hidden.sum(dim=-1) == 2).double().mean() - both) < 4 * math.sqrt(both * (1 - both) / 5000)


@pytest.mark.parametrize("scale", ["eval", "inverted"])
def test_a_hidden_pair_gets_no_gradient_and_the_others_their_own(scale):
    config = small(eom=0.4, masking_scale=scale, capacity_factor=1.0, cmr=True)
    case = make_case(config, 17, padding="random", seed=4)
    layer, real = case.layer.train(), ~case.padding
    x = case.x.clone().requires_grad_()
    torch.manual_seed(1)
    y = layer(x, case.padding).y
    actual = gradients((y * case.direction).sum(), {"x": x, **dict(layer.named_parameters())})

    seated = limit(layer.gate(x, real), config, training=True)
    torch.manual_seed(1)
    masked = mask_expert_outputs(seated, config, training=True)
    hidden = (seated.expert_index >= 0) & (masked.expert_index < 0)
    assert hidden.any()
    # The loop sums over what is visible: a hidden pair is not in it at all.
    visible = [[None if number < 0 else number for number in row] for row in masked.expert_index.tolist()]
    factor = 1 / (1 - 0.4) if scale == "inverted" else 1.0
    weights = [[weight * factor for weight in row] for row in seated.weight]
    parameters = dict(layer.named_parameters())
    mixed = reference.combine_by_loop(parameters, x, visible, weights, config)
    mixed, _ = reference.conditional(parameters, x, mixed, case.padding.tolist(), config)
    assert_close(y, mixed, torch.float64)
    expected = gradients((mixed * case.direction).sum(), {"x": x, **parameters})
    assert_all_close(actual, expected, torch.float64)


def test_eom_can_be_folded_into_the_experts():
    case = make_case(small(eom=0.3), 9)
    expected = case.layer.eval()(case.x).y
    folded = twin(case, eom=0.0).eval()
    with torch.no_grad():
        folded.experts.w_out *= 0.7
        folded.experts.b_out *= 0.7
    assert_close(folded(case.x).y, expected, torch.float64)


def test_eom_takes_no_slots_and_does_not_count_as_dropped():
    case = make_case(small(capacity_factor=0.5), 30, crowd="one_expert")
    plain = case.layer.train()(case.x).statistics
    masked = twin(case, eom=0.5).train()(case.x).statistics
    assert plain.dropped > 0
    assert torch.equal(masked.dropped, plain.dropped)
    assert torch.equal(masked.tokens_per_expert, plain.tokens_per_expert)


def test_masking_leaves_the_losses():
    case = make_case(small(), 30)
    plain, masked = case.layer.train()(case.x), twin(case, eom=0.5, fom=0.5, gating_dropout=1.0).train()(case.x)
    for name, value in plain.losses.items():
        assert torch.equal(masked.losses[name], value)


def test_recomputed_forward_draws_the_same_masks():  # 1.8, pitfall: activation checkpointing
    config = small(eom=0.4, fom=0.2, dropout=0.3, cmr=True, cmr_gate_drop=0.3, gating_dropout=0.5, jitter=0.1)
    case = make_case(config, 20)
    layer = case.layer.train()

    def run(recompute):
        torch.manual_seed(3)
        x = case.x.clone().requires_grad_()
        y = checkpoint(lambda x: layer(x).y, x, use_reentrant=False) if recompute else layer(x).y
        return gradients((y * case.direction).sum(), {"x": x, **dict(layer.named_parameters())})

    plain, recomputed = run(False), run(True)
    for name, grad in plain.items():
        assert torch.equal(recomputed[name], grad), name


# EOM and FOM beside CMR: EOM hides experts before the mixture, FOM the token after it


def test_eom_leaves_the_shared_network_of_cmr():
    case = make_case(small(cmr=True), 9)
    y = twin(case, eom=1.0).train()(case.x).y
    conditional = case.layer.conditional
    gate = torch.sigmoid(conditional.gate(case.x))
    assert_close(y, (1 - gate) * conditional.shared(case.x), torch.float64)


def test_fom_hides_the_shared_network_of_cmr_as_well():
    layer = MoELayer(small(cmr=True, fom=0.5)).train()
    torch.manual_seed(0)
    assert 400 < (layer(torch.randn(1000, 6)).y == 0).all(dim=-1).sum() < 600


def test_a_token_hidden_by_fom_gets_no_gradient():
    case = make_case(small(fom=0.5, cmr=True), 40)
    x = case.x.clone().requires_grad_()
    torch.manual_seed(0)
    y = case.layer.train()(x).y
    grad = torch.autograd.grad((y * case.direction).sum(), x)[0]
    hidden = (y == 0).all(dim=-1)
    assert 5 < hidden.sum() < 35
    assert (grad[hidden] == 0).all()
    assert (grad[~hidden] != 0).any(dim=-1).all()


# Gating dropout


@pytest.mark.parametrize(("num_experts", "ranks"), [(4, 2), (4, 4), (4, 0), (6, 3), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 3, 12, 17])
def test_gating_dropout_is_skipping_the_exchange(num_experts, ranks, tokens):
    config = small(num_experts=num_experts, gating_dropout=1.0, gating_dropout_ranks=ranks)
    case = make_case(config, tokens, seed=tokens)
    plain = reference.moe_layer(dict(case.layer.named_parameters()), case.x, [False] * tokens, config, training=True)
    parameters = {name: value.detach().clone().requires_grad_() for name, value in case.layer.named_parameters()}
    expected = reference.local_buffers(parameters, case.x, plain.kept, plain.weights, config)
    output = case.layer.train()(case.x)
    assert_close(output.y, expected, torch.float64)
    assert torch.equal(output.statistics.tokens_per_expert, plain.statistics["tokens_per_expert"])  # as the gate chose
    if ranks == 1:
        assert_close(output.y, plain.y, torch.float64)


def test_gating_dropout_lets_no_gradient_cross_ranks():
    config = small(gating_dropout=1.0, gating_dropout_ranks=2)
    case = make_case(config, 10)
    y = case.layer.train()(case.x).y
    first_block = torch.autograd.grad(y[:5].sum(), case.layer.experts.w_out)[0]
    assert (first_block[:2] != 0).any()
    assert (first_block[2:] == 0).all()


def test_gating_dropout_keeps_the_weights_of_the_gate_and_trains_it():
    case = make_case(small(gating_dropout=1.0), 10)
    y = case.layer.train()(case.x).y
    assert (torch.autograd.grad((y * case.direction).sum(), case.layer.experts.b_out)[0] != 0).any()
    layer = twin(case, gating_dropout_ranks=2).train()
    grad = torch.autograd.grad((layer(case.x).y * case.direction).sum(), layer.gate.weight)[0]
    assert (grad != 0).any()


@pytest.mark.parametrize("mode", ["gate", "gate_expert"])
def test_gating_dropout_is_one_draw_for_the_whole_layer(mode):
    case = make_case(small(gating_dropout=0.3, gating_dropout_mode=mode), 10)
    plain = twin(case, gating_dropout=0.0).train()(case.x).y
    always = twin(case, gating_dropout=1.0).train()(case.x).y
    layer, skipped, draws = case.layer.train(), 0, 400
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(draws):
            y = layer(case.x).y
            assert torch.equal(y, plain) or torch.equal(y, always)
            skipped += torch.equal(y, always)
    assert abs(skipped / draws - 0.3) < 4 * math.sqrt(0.3 * 0.7 / draws)


def test_gate_expert_dropout_skips_the_experts():
    case = make_case(small(gating_dropout=1.0, gating_dropout_mode="gate_expert"), 10)
    output = case.layer.train()(case.x)
    assert (output.y == 0).all()
    assert (torch.autograd.grad(output.y.sum(), case.layer.experts.w_in)[0] == 0).all()
    output = case.layer(case.x)
    assert (torch.autograd.grad(output.losses["load_balance"], case.layer.gate.weight)[0] != 0).any()


def test_gating_dropout_leaves_padding_and_the_dropped_alone():
    config = small(gating_dropout=1.0, gating_dropout_ranks=2, capacity_factor=0.5)
    case = make_case(config, 20, padding="random", crowd="one_expert")
    plain = twin(case, gating_dropout=0.0).train()(case.x, case.padding)
    skipped = case.layer.train()(case.x, case.padding)
    assert plain.statistics.dropped > 0
    nowhere = (plain.y == 0).all(dim=-1)
    assert torch.equal((skipped.y == 0).all(dim=-1), nowhere)
    assert nowhere.sum() > case.padding.sum()


def test_gating_dropout_is_for_training():
    case = make_case(small(gating_dropout=1.0), 10)
    assert torch.equal(case.layer.eval()(case.x).y, twin(case, gating_dropout=0.0).eval()(case.x).y)
