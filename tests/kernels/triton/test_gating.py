"""The three ways to choose experts agree, forward and backward; the Triton kernels run in Triton's interpreter."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.compare import assert_close

from mtmoe.kernels import gating
from mtmoe.kernels.gating import POLICIES, choose_experts, draw_for_policy
from mtmoe.moe import MoEConfig
from mtmoe.moe.gates import TopKGate

pytest.importorskip("triton")

OUTPUTS = ("weight", "gate_probs", "probability_per_expert", "squared_log_partition")
EXACT = ("expert_index", "tokens_per_expert", "first_choice_per_expert")


@dataclass
class Case:
    logits: torch.Tensor
    options: dict
    directions: list
    """Gradients that arrive at `OUTPUTS`; None for an output that is not used."""

    def __repr__(self):
        real = self.options["real"]
        shown = {name: value for name, value in self.options.items() if not isinstance(value, torch.Tensor)}
        used = [direction is not None for direction in self.directions]
        return f"Case(logits={tuple(self.logits.shape)}, padding={real is not None}, used={used}, {shown})"


@st.composite
def cases(draw, experts=(1, 2, 7, 33, 128), tokens=(0, 1, 2, 19, 70)):
    tokens, num_experts = draw(st.sampled_from(tokens)), draw(st.sampled_from(experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    top_k = draw(st.integers(1, min(3, num_experts)))
    # Multiples of 1/8 in random order: exact in bf16, and no two logits of a token are equal.
    logits = noise(tokens, num_experts).argsort(dim=-1) / 8 - draw(st.sampled_from([0.0, 8.0]))
    policy = draw(st.sampled_from(POLICIES))
    real = draw(st.sampled_from(["none", "some", "nothing"]))
    draws = None
    if draw(st.booleans()):
        torch.manual_seed(draw(st.integers(0, 10**6)))
        draws = draw_for_policy(logits, top_k, policy)
    shapes = [(tokens, top_k), (tokens, num_experts), (num_experts,), ()]
    options = {
        "top_k": top_k,
        "policy": policy,
        "threshold": draw(st.sampled_from([0.0, 0.31, 0.47])),
        "draws": draws,
        "normalize": draw(st.booleans()),
        "real": {"none": None, "some": noise(tokens) > -0.5, "nothing": torch.zeros(tokens, dtype=torch.bool)}[real],
    }
    used = draw(st.tuples(*[st.booleans()] * 4).filter(any))
    directions = [noise(*shape) if use else None for shape, use in zip(shapes, used, strict=True)]
    return Case(logits, options, directions)


def run(case, backend, dtype=torch.float32):
    """Everything that a backend returns, and the gradient of the logits."""
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    options = dict(case.options)
    if dtype == torch.float64 and options["draws"] is not None:
        options["draws"] = options["draws"].double()
    choice = choose_experts(logits, backend=backend, **options)
    found = {
        name: getattr(choice, name) if hasattr(choice, name) else getattr(choice.counts, name)
        for name in OUTPUTS + EXACT
    }
    pairs = [(found[name], d) for name, d in zip(OUTPUTS, case.directions, strict=True) if d is not None]
    outputs = [output for output, _ in pairs]
    directions = [direction.to(output.dtype) for output, direction in pairs]
    (found["gradient"],) = torch.autograd.grad(outputs, logits, directions)
    return found


def assert_agree(actual, expected, dtype):
    for name in EXACT:
        assert torch.equal(actual[name], expected[name]), name
    for name in OUTPUTS:
        assert_close(actual[name], expected[name], torch.float32, name)
    assert actual["gradient"].dtype == dtype
    # The terms of a gradient cancel: its own size says little about how it was rounded.
    units = 500.0 if dtype == torch.float32 else 4.0
    assert_close(actual["gradient"], expected["gradient"], dtype, "gradient", units, scale=1.0)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@settings(max_examples=70)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_agrees_with_reference(backend, case, dtype):
    assert_agree(run(case, backend, dtype), run(case, "reference", torch.float64), dtype)


@settings(max_examples=40)
@given(case=cases(experts=(1, 5, 17)))
def test_cpu_agrees_with_reference_in_fp64(case):
    actual, expected = run(case, "cpu", torch.float64), run(case, "reference", torch.float64)
    for name, value in expected.items():
        assert_close(actual[name], value, torch.float64, name, scale=1.0)


def test_triton_takes_fp16_and_up_to_1024_experts():
    torch.manual_seed(0)
    logits = torch.randn(3, 1024).argsort(dim=-1) / 64 - 8  # exact in fp16
    options = {"top_k": 2, "normalize": True, "real": torch.tensor([True, False, True])}
    case = Case(logits, options | {"draws": None}, [torch.randn(3, 2), None, torch.randn(1024), None])
    assert_agree(run(case, "triton", torch.float16), run(case, "reference", torch.float64), torch.float16)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN and inf - inf are the point
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 0.0])
def test_triton_takes_distinct_experts_of_any_logits(value):
    index = choose_experts(torch.full((5, 7), value), 3, backend="triton").expert_index
    assert torch.equal(index, torch.tensor([[0, 1, 2]]).expand(5, 3))


def test_triton_is_deterministic():
    torch.manual_seed(0)
    logits = torch.randn(300, 7)
    first, second = (choose_experts(logits, 2, backend="triton") for _ in range(2))
    assert torch.equal(first.counts.probability_per_expert, second.counts.probability_per_expert)
    assert torch.equal(first.counts.squared_log_partition, second.counts.squared_log_partition)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("normalize", ["before_drop", "after_drop"])
@pytest.mark.parametrize("include_padding", [False, True])
def test_a_gate_through_triton_is_the_same_gate(policy, normalize, include_padding, monkeypatch):
    torch.manual_seed(1)
    config = MoEConfig(
        d_model=6,
        d_ffn=4,
        num_experts=5,
        second_expert_policy=policy,
        normalize_weights=normalize,
        load_balance_include_padding=include_padding,
    )
    gate, x, real = TopKGate(config).train(), torch.randn(40, 6), torch.rand(40) > 0.2
    direction = torch.randn(40, 2)

    def decide(backend):
        monkeypatch.setattr(gating, "_best_backend", lambda _: backend)
        torch.manual_seed(2)
        decision = gate(x, real)
        total = (decision.weight * direction).sum() + decision.losses["load_balance"] + decision.losses["router_z"]
        return decision, torch.autograd.grad(total, gate.weight)[0]

    (expected, expected_grad), (actual, actual_grad) = decide("reference"), decide("triton")
    assert torch.equal(actual.expert_index, expected.expert_index)
    assert_close(actual.weight, expected.weight, torch.float32)
    for name, loss in expected.losses.items():
        assert_close(actual.losses[name], loss, torch.float32, name)
    assert_close(actual_grad, expected_grad, torch.float32)


def test_what_does_not_fit_is_refused():
    logits = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"must be \(tokens, num_experts >= top_k=4\)"):
        choose_experts(logits, 4)
    with pytest.raises(ValueError, match="policy='best' must be one of: all, sampling, random, threshold"):
        choose_experts(logits, 2, policy="best")
    with pytest.raises(ValueError, match=r"policy='random' needs draws of shape \(4, 2\)"):
        choose_experts(logits, 2, policy="random", draws=torch.rand(4, 3))
    with pytest.raises(ValueError, match="one entry for each of 4 tokens"):
        choose_experts(logits, 2, real=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend='gpu' is unknown; choose one of: cpu, reference, triton"):
        choose_experts(logits, 2, backend="gpu")
    with pytest.raises(ValueError, match="computes in fp32; use backend='cpu'"):
        choose_experts(logits.double(), 2, backend="triton")
    with pytest.raises(ValueError, match="at most 1024 experts, got 1025"):
        choose_experts(torch.randn(2, 1025), 2, backend="triton")
