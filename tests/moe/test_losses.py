import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import moe as reference
from reference.compare import assert_close

from mtmoe.moe.losses import cmr_budget_loss, load_balance_loss, router_z_loss


def draw_logits(tokens, num_experts, seed=0):
    return torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40)
@given(tokens=st.integers(1, 30), num_experts=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_losses_agree_with_loops(tokens, num_experts, seed):
    logits = draw_logits(tokens, num_experts, seed)
    probs = logits.softmax(dim=-1)
    firsts = probs.argmax(dim=-1)
    expected = reference.load_balance(probs, firsts.tolist(), [False] * tokens, False)
    assert_close(load_balance_loss(probs, firsts[:, None]), expected, torch.float64)
    assert_close(router_z_loss(logits), reference.router_z(logits, list(range(tokens))), torch.float64)
    # Tutel's way to write it: sum_e (sum_t p)(E / T * count_e) / T
    counts = torch.bincount(firsts, minlength=num_experts).double()
    tutel = (probs.sum(dim=0) * (num_experts / tokens * counts)).sum() / tokens
    assert_close(load_balance_loss(probs, firsts[:, None]), tutel, torch.float64)


def test_load_balance_is_one_when_even_whatever_the_probabilities():  # 1.4
    probs = draw_logits(12, 4).softmax(dim=-1)
    assert_close(load_balance_loss(probs, torch.arange(12)[:, None] % 4), 1.0, torch.float64)


def test_load_balance_is_num_experts_when_collapsed():  # 1.4
    probs = torch.zeros(12, 4)
    probs[:, 2] = 1
    assert load_balance_loss(probs, torch.full((12, 1), 2)) == 4


def test_load_balance_looks_at_the_first_choice_only():
    probs, firsts = draw_logits(12, 4).softmax(dim=-1), torch.arange(12) % 3
    one = load_balance_loss(probs, firsts[:, None])
    two = load_balance_loss(probs, torch.stack([firsts, torch.full_like(firsts, 3)], dim=1))
    assert torch.equal(one, two)


def test_gradient_of_load_balance():  # 1.4: E f_e / T
    probs = draw_logits(10, 4).softmax(dim=-1).requires_grad_()
    firsts = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 3])
    load_balance_loss(probs, firsts[:, None]).backward()
    share = torch.tensor([0.4, 0.3, 0.0, 0.3], dtype=torch.float64)
    assert_close(probs.grad, (4 * share / 10).expand(10, 4), torch.float64)


def test_one_step_on_load_balance_alone_lowers_the_fullest_expert():  # 1.4
    torch.manual_seed(0)
    x = torch.randn(400, 8) + 0.5
    weight = torch.randn(4, 8, requires_grad=True)

    def fullest():
        return torch.bincount((x @ weight.T).argmax(dim=-1), minlength=4).max().item()

    before = fullest()
    probs = (x @ weight.T).softmax(dim=-1)
    load_balance_loss(probs, probs.argmax(dim=-1, keepdim=True)).backward()
    with torch.no_grad():
        weight -= 0.5 * weight.grad
    assert fullest() < before


def test_choices_of_minus_one_count_in_the_means_only():
    probs = draw_logits(4, 3).softmax(dim=-1)
    loss = load_balance_loss(probs, torch.tensor([[0], [-1], [0], [2]]))
    mean = probs.mean(dim=0)
    assert_close(loss, 3 * (0.5 * mean[0] + 0.25 * mean[2]), torch.float64)


def test_gradient_of_router_z():  # 1.5: 2 lse_t p_te / T
    logits = draw_logits(7, 5).requires_grad_()
    router_z_loss(logits).backward()
    lse = logits.logsumexp(dim=-1, keepdim=True)
    assert_close(logits.grad, 2 * lse * logits.softmax(dim=-1) / 7, torch.float64)


def test_a_constant_on_all_logits_changes_router_z_only():  # 1.5
    logits = draw_logits(7, 5)
    firsts = logits.argmax(dim=-1, keepdim=True)
    plain, moved = logits.softmax(dim=-1), (logits + 3).softmax(dim=-1)
    assert_close(load_balance_loss(moved, firsts), load_balance_loss(plain, firsts), torch.float64)
    assert router_z_loss(logits + 3) > router_z_loss(logits)


@pytest.mark.parametrize("loss", [lambda: load_balance_loss(torch.zeros(0, 3), torch.zeros(0, 1, dtype=torch.int64))])
def test_load_balance_of_no_tokens_is_refused(loss):
    with pytest.raises(ValueError, match="load_balance_loss needs at least one token, got none"):
        loss()


def test_router_z_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="router_z_loss needs at least one token, got none"):
        router_z_loss(torch.zeros(0, 3))


# CMR budget


def gates_of(*layers):
    values = [torch.tensor(layer, dtype=torch.float64, requires_grad=True) for layer in layers]
    return values, [value.sum() for value in values], [torch.tensor(len(value)) for value in values]


def test_budget_loss_is_zero_at_the_budget():  # 1.10: one budget over all layers, so that layers may differ
    _, sums, counts = gates_of([0.9, 0.9], [0.6, 0.8])
    assert_close(cmr_budget_loss(sums, counts, 0.8), 0.0, torch.float64)
    assert_close(cmr_budget_loss(sums[:1], counts[:1], 0.8), 0.1, torch.float64)


@pytest.mark.parametrize(("budget", "sign"), [(0.1, 1.0), (0.9, -1.0)])
def test_gradient_of_budget_loss(budget, sign):  # 1.10: sign / N
    values, sums, counts = gates_of([0.2, 0.4, 0.6], [0.5, 0.5])
    cmr_budget_loss(sums, counts, budget).backward()
    for value in values:
        assert_close(value.grad, torch.full_like(value, sign / 5), torch.float64)


def test_budget_loss_weighs_layers_by_their_tokens():
    _, sums, counts = gates_of([1.0] * 9, [0.0])
    assert_close(cmr_budget_loss(sums, counts, 0.5), 0.4, torch.float64)


def test_budget_loss_does_not_depend_on_how_a_batch_is_split():
    _, whole, whole_counts = gates_of([0.1, 0.2, 0.3, 0.9, 0.8])
    _, parts, part_counts = gates_of([0.1, 0.2], [0.3, 0.9, 0.8])
    assert_close(cmr_budget_loss(whole, whole_counts, 0.8), cmr_budget_loss(parts, part_counts, 0.8), torch.float64)


def test_budget_loss_of_no_tokens_is_zero_with_a_gradient():
    gate = torch.zeros(0, requires_grad=True)
    loss = cmr_budget_loss([gate.sum()], [torch.tensor(0)], 0.8)
    loss.backward()
    assert loss == 0
    assert gate.grad.shape == (0,)


def test_budget_loss_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one CMR layer"):
        cmr_budget_loss([], [], 0.8)


@pytest.mark.parametrize("budget", [-0.1, 1.1])
def test_budget_outside_its_range_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget={budget} must be between 0 and 1"):
        cmr_budget_loss([torch.tensor(1.0)], [torch.tensor(2)], budget)
