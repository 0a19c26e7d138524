"""The table of what training and evaluation switch, and that a method at rate 0 is not there at all."""

import pytest
import torch
from reference.cases import make_case

from mtmoe.moe import MoEConfig, MoELayer

METHODS = {
    "dropout": {"dropout": 0.3},
    "activation dropout": {"activation_dropout": 0.3},
    "jitter": {"jitter": 0.1},
    "sampling": {"second_expert_policy": "sampling"},
    "random": {"second_expert_policy": "random"},
    "EOM": {"eom": 0.3},
    "EOM inverted": {"eom": 0.3, "masking_scale": "inverted"},
    "FOM": {"fom": 0.3},
    "FOM inverted": {"fom": 0.3, "masking_scale": "inverted"},
    "CMR gate dropout": {"cmr": True, "cmr_gate_drop": 0.3},
    "CMR gate dropout, mask": {"cmr": True, "cmr_gate_drop": 0.3, "cmr_gate_drop_mode": "mask"},
    "gating dropout": {"gating_dropout": 0.5},
    "gate-expert dropout": {"gating_dropout": 0.5, "gating_dropout_mode": "gate_expert"},
    "MoEC": {
        "gate": "moec",
        "top_k": 1,
        "normalize_weights": "none",
        "expert_clusters": 2,
        "jitter": 0.1,
        "eom": 0.3,
    },
    "SMILE": {"gate": "bilevel", "expert_nodes": 2, "normalize_weights": "none", "second_expert_policy": "random"},
    "all": {
        "dropout": 0.1,
        "jitter": 0.01,
        "second_expert_policy": "sampling",
        "eom": 0.2,
        "fom": 0.1,
        "cmr": True,
        "cmr_gate_drop": 0.2,
        "gating_dropout": 0.3,
        "capacity_factor": 1.0,
        "batch_prioritized": True,
    },
}
RATES = (
    "dropout", "activation_dropout", "jitter", "eom", "fom", "cmr_gate_drop", "gating_dropout",
    "cluster_expert_dropout",
)  # fmt: skip


def small(**options) -> MoEConfig:
    return MoEConfig(**({"d_model": 6, "d_ffn": 10, "num_experts": 4} | options))


def draws_random_numbers(layer, case) -> bool:
    before = torch.get_rng_state()
    layer(case.x, case.padding)
    return not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_training_draws_and_evaluation_does_not(options):
    case = make_case(small(**options), 15, padding="random")
    assert draws_random_numbers(case.layer.train(), case)
    assert not draws_random_numbers(case.layer.eval(), case)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_training_follows_the_seed_and_evaluation_needs_none(options):
    case = make_case(small(**options), 40, padding="random")

    def run(seed):
        torch.manual_seed(seed)
        return case.layer(case.x, case.padding).y

    case.layer.train()
    assert torch.equal(run(1), run(1))
    assert any(not torch.equal(run(1), run(seed)) for seed in range(2, 12))
    case.layer.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("cmr", [False, True])
@pytest.mark.parametrize("scale", ["eval", "inverted"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rate", RATES)
def test_rate_0_is_the_plain_layer_to_the_bit(rate, training, scale, cmr):
    case = make_case(small(cmr=cmr), 15, padding="random")
    zero = MoELayer(small(cmr=cmr, masking_scale=scale, **{rate: 0.0})).double()
    zero.load_state_dict(case.layer.state_dict())
    assert not draws_random_numbers(zero.train(training), case)

    def outputs_and_gradients(layer):
        x = case.x.clone().requires_grad_()
        output = layer.train(training)(x, case.padding)
        found = torch.autograd.grad((output.y * case.direction).sum(), [x, *layer.parameters()])
        return output.y, *output.losses.values(), *found

    for actual, expected in zip(outputs_and_gradients(zero), outputs_and_gradients(case.layer), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_losses_are_computed_in_evaluation_too(options):
    case = make_case(small(**options), 15, padding="random")
    output = case.layer.eval()(case.x, case.padding)
    assert all(loss > 0 for name, loss in output.losses.items() if name != "cluster_variance")
    assert output.losses.keys() == case.layer.train()(case.x, case.padding).losses.keys()


# Only these differ between training and evaluation when nothing is drawn.


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"cmr": True}, True),
        ({"gate": "moec", "top_k": 1, "normalize_weights": "none", "expert_clusters": 2}, True),
        ({"second_expert_policy": "threshold"}, True),
        ({"capacity_factor": 0.5}, False),
        ({"capacity_factor": 0.5, "eval_capacity_factor": 0.5}, True),
        ({"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "eval_capacity_token_fraction": 1.0}, False),
        ({"eval_capacity_factor": 0.5}, False),
        ({"capacity_factor": 4.0, "eval_capacity_token_fraction": 1.0}, True),
    ],
)
def test_capacity_is_the_only_switch_without_chance(options, same):
    case = make_case(small(**options), 25, crowd="two_groups")
    training, evaluation = case.layer.train()(case.x), case.layer.eval()(case.x)
    assert torch.equal(training.y, evaluation.y) == same
    assert torch.equal(training.losses["load_balance"], evaluation.losses["load_balance"])


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"dropout": 0.3, "activation_dropout": 0.3, "jitter": 0.2}, 1.0),
        ({"second_expert_policy": "sampling"}, 1.0),
        ({"second_expert_policy": "random"}, 1.0),
        ({"gating_dropout": 1.0}, 1.0),
        ({"gating_dropout": 1.0, "gating_dropout_mode": "gate_expert"}, 1.0),
        ({"eom": 0.25}, 0.75),
        ({"fom": 0.25}, 0.75),
        ({"eom": 0.25, "fom": 0.5, "masking_scale": "inverted"}, 1.0),
    ],
)
def test_evaluation_is_the_plain_layer_up_to_the_masking_scale(options, factor):
    case = make_case(small(), 15)
    layer = MoELayer(small(**options)).double().eval()
    layer.load_state_dict(case.layer.state_dict())
    torch.testing.assert_close(layer(case.x).y, factor * case.layer.eval()(case.x).y, rtol=1e-12, atol=1e-12)


# The order inside one sublayer: … experts (incl. dropout) → EOM → combine → CMR → FOM


@pytest.mark.parametrize("top", [{}, {"top_k": 1, "normalize_weights": "none"}])
def test_methods_stack(top):
    """All at once in evaluation: (1 - fom) * ((1 - G) * shared + G * (1 - eom) * experts)."""
    case = make_case(small(cmr=True, eom=0.25, fom=0.5, dropout=0.1, cmr_gate_drop=0.2, gating_dropout=0.3, **top), 15)
    plain = MoELayer(small(**top)).double()
    plain.load_state_dict({name: value for name, value in case.layer.state_dict().items() if "conditional" not in name})
    conditional = case.layer.eval().conditional
    gate = torch.sigmoid(conditional.gate(case.x))
    expected = 0.5 * ((1 - gate) * conditional.shared(case.x) + gate * 0.75 * plain(case.x).y)
    torch.testing.assert_close(case.layer(case.x).y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capacity", [{}, {"capacity_factor": 0.5, "batch_prioritized": True}])
def test_eom_of_a_single_expert_is_fom_in_distribution(capacity):
    top_1 = {"top_k": 1, "normalize_weights": "none"}
    case = make_case(small(eom=0.4, **top_1, **capacity), 3000)
    final = MoELayer(small(fom=0.4, **top_1, **capacity)).double()
    final.load_state_dict(case.layer.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        plain = MoELayer(small(**top_1, **capacity)).double()
        plain.load_state_dict(case.layer.state_dict())
        plain_y = plain.train()(case.x).y
        seated = (plain_y != 0).any(dim=-1)
        for layer in (case.layer.train(), final.train()):
            y = layer(case.x).y
            visible = (y != 0).any(dim=-1)
            assert torch.equal(y[visible], plain_y[visible])
            rate = 1 - visible.sum() / seated.sum()
            assert abs(rate - 0.4) < 4 * (0.24 / seated.sum()) ** 0.5
