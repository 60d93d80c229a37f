"""The losses against slow loops written close to the notation, and their gradients against differences."""

import math

import numpy as np
import pytest
import torch

from mara.learner import losses

REJECT, ACCEPT = 0, 1


def random_case(seed: int, num: int = 9) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(2, num, 2, generator=g, dtype=torch.float64),
        "logprobs": torch.log_softmax(torch.randn(num, 2, generator=g, dtype=torch.float64), -1),
        "forced": torch.rand(num, generator=g) < 0.4,
        "actions": torch.randint(0, 2, (num,), generator=g),
        "targets": torch.randn(num, generator=g, dtype=torch.float64),
    }


def slow_soft_value(q: np.ndarray, logprobs: np.ndarray, alpha: float, forced: np.ndarray) -> np.ndarray:
    values = np.zeros(len(forced))
    for b in range(len(forced)):
        if forced[b]:
            values[b] = min(q[0, b, ACCEPT], q[1, b, ACCEPT])
            continue
        for a in (REJECT, ACCEPT):
            pi = math.exp(logprobs[b, a])
            values[b] += pi * (min(q[0, b, a], q[1, b, a]) - alpha * math.log(pi))
    return values


@pytest.mark.parametrize("seed", range(3))
def test_the_soft_value_is_the_expected_smaller_q_plus_alpha_times_the_entropy(seed: int) -> None:
    case = random_case(seed)
    got = losses.soft_value(case["q"], case["logprobs"], 0.3, case["forced"])
    slow = slow_soft_value(case["q"].numpy(), case["logprobs"].numpy(), 0.3, case["forced"].numpy())
    np.testing.assert_allclose(got.numpy(), slow, rtol=1e-12)


def test_the_soft_value_of_the_example_worked_by_hand() -> None:
    q = torch.tensor([[[1.0, 3.0], [1.0, 3.0]]] * 2)
    logprobs = torch.log(torch.full((2, 2), 0.5))
    values = losses.soft_value(q, logprobs, 0.1, torch.tensor([False, True]))
    assert values.tolist() == pytest.approx([2 + 0.1 * math.log(2), 3.0])


def test_the_minimum_is_taken_for_each_action_by_itself() -> None:
    q = torch.tensor([[[1.0, 9.0]], [[5.0, 2.0]]])  # smaller: reject 1 (first head), accept 2 (second)
    logprobs = torch.log(torch.tensor([[0.25, 0.75]]))
    value = losses.soft_value(q, logprobs, 0.0, torch.tensor([False]))
    assert value.item() == pytest.approx(0.25 * 1 + 0.75 * 2)


def test_the_target_discounts_the_next_value_and_ends_with_the_episode() -> None:
    rewards, discounts = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.9, 1.0, 0.0])
    targets = losses.td_target(rewards, discounts, torch.tensor([10.0, -4.0, 7.0]))
    assert targets.tolist() == pytest.approx([10.0, -2.0, 3.0])


@pytest.mark.parametrize("unspecified", [math.nan, math.inf])
def test_whatever_follows_the_end_of_an_episode_does_not_reach_the_target(unspecified: float) -> None:
    targets = losses.td_target(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([unspecified]))
    assert targets.item() == 3.0


@pytest.mark.parametrize("seed", range(3))
def test_the_critic_loss_is_the_mean_squared_error_of_both_heads(seed: int) -> None:
    case = random_case(seed)
    total, num = 0.0, len(case["actions"])
    for h in range(2):
        for b in range(num):
            total += (case["q"][h, b, case["actions"][b]].item() - case["targets"][b].item()) ** 2
    got = losses.critic_loss(case["q"], case["actions"], case["targets"])
    assert got.item() == pytest.approx(total / (2 * num), rel=1e-12)


def test_a_row_of_the_critic_loss_counts_by_its_weight() -> None:
    case = random_case(0)
    weights = torch.linspace(0.1, 1, len(case["actions"]), dtype=torch.float64)
    got = losses.critic_loss(case["q"], case["actions"], case["targets"], weights)
    rows = [
        losses.critic_loss(case["q"][:, b : b + 1], case["actions"][b : b + 1], case["targets"][b : b + 1])
        for b in range(len(weights))
    ]
    assert got.item() == pytest.approx(float((weights * torch.stack(rows)).mean()), rel=1e-12)


def test_the_critic_loss_moves_only_the_value_of_the_action_taken() -> None:
    q = torch.zeros(2, 2, 2, requires_grad=True)
    targets = torch.tensor([1.0, 1.0], requires_grad=True)
    losses.critic_loss(q, torch.tensor([ACCEPT, REJECT]), targets).backward()
    assert q.grad is not None
    assert q.grad.tolist() == [[[0.0, -0.5], [-0.5, 0.0]]] * 2
    assert targets.grad is None


@pytest.mark.parametrize("seed", range(3))
def test_the_policy_loss_is_the_mean_of_equation_9_over_free_decisions(seed: int) -> None:
    case, alpha = random_case(seed), 0.2
    terms = []
    for b in range(len(case["forced"])):
        if case["forced"][b]:
            continue
        pi = case["logprobs"][b].exp().numpy()
        entropy = -sum(p * math.log(p) for p in pi)
        value = sum(pi[a] * min(case["q"][0, b, a].item(), case["q"][1, b, a].item()) for a in (0, 1))
        terms.append(-(alpha * entropy + value))
    got = losses.policy_loss(case["logprobs"], case["q"], alpha, case["forced"])
    assert got.item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_the_policy_loss_is_least_at_the_softmax_of_the_smaller_q() -> None:
    q = torch.tensor([[[0.3, 1.0]], [[0.5, 0.7]]], dtype=torch.float64)
    best = torch.log_softmax(torch.tensor([[0.3, 0.7]], dtype=torch.float64) / 0.4, -1)
    logits = best.clone().requires_grad_()
    losses.policy_loss(torch.log_softmax(logits, -1), q, 0.4, torch.tensor([False])).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_loss_is_alpha_times_the_mean_surplus_of_entropy(seed: int) -> None:
    case = random_case(seed)
    surplus = []
    for b in range(len(case["forced"])):
        if not case["forced"][b]:
            pi = case["logprobs"][b].exp().numpy()
            surplus.append(-sum(p * math.log(p) for p in pi) - 0.4)
    log_alpha = torch.tensor(math.log(0.3), dtype=torch.float64)
    got = losses.temperature_loss(log_alpha, case["logprobs"], case["forced"], 0.4)
    assert got.item() == pytest.approx(0.3 * np.mean(surplus), rel=1e-12)


@pytest.mark.parametrize(("probability", "rises"), [(0.5, False), (0.999, True)])
def test_the_temperature_rises_only_while_the_entropy_is_below_its_target(
    probability: float, rises: bool
) -> None:
    log_alpha = torch.tensor(0.0, requires_grad=True)
    logprobs = torch.log(torch.tensor([[1 - probability, probability]]))
    losses.temperature_loss(log_alpha, logprobs, torch.tensor([False]), 0.4).backward()
    assert log_alpha.grad is not None
    assert (log_alpha.grad.item() < 0) is rises  # descent goes against the gradient


def test_gradients_agree_with_finite_differences() -> None:
    case = random_case(7)
    forced, actions, targets = case["forced"], case["actions"], case["targets"]
    q = case["q"].clone().requires_grad_()
    logits = torch.randn(len(forced), 2, dtype=torch.float64, requires_grad=True)
    log_alpha = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def policy(logits: torch.Tensor) -> torch.Tensor:
        return losses.policy_loss(torch.log_softmax(logits, -1), case["q"], 0.2, forced)

    def critic(q: torch.Tensor) -> torch.Tensor:
        return losses.critic_loss(q, actions, targets)

    def temperature(log_alpha: torch.Tensor) -> torch.Tensor:
        return losses.temperature_loss(log_alpha, case["logprobs"], forced, 0.4)

    assert torch.autograd.gradcheck(policy, logits)
    assert torch.autograd.gradcheck(critic, q)
    assert torch.autograd.gradcheck(temperature, log_alpha)


def test_a_forced_decision_leaves_no_gradient_on_the_policy() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    q = torch.tensor([[[0.0, 5.0], [0.0, 5.0]]] * 2)
    forced = torch.tensor([True, False])
    losses.policy_loss(torch.log_softmax(logits, -1), q, 0.1, forced).backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert logits.grad[1].abs().min() > 0


def test_the_policy_loss_teaches_neither_the_critic_nor_the_temperature() -> None:
    q = torch.ones(2, 1, 2, requires_grad=True)
    alpha = torch.tensor(0.1, requires_grad=True)
    logits = torch.zeros(1, 2, requires_grad=True)
    losses.policy_loss(torch.log_softmax(logits, -1), q, alpha, torch.tensor([False])).backward()
    assert q.grad is None
    assert alpha.grad is None


def test_a_batch_of_forced_decisions_gives_zero_and_no_nan() -> None:
    forced = torch.tensor([True, True])
    logits = torch.tensor([[0.0, 200.0], [0.0, 0.0]], requires_grad=True)
    log_alpha = torch.tensor(0.0, requires_grad=True)
    logprobs = torch.log_softmax(logits, -1)
    policy = losses.policy_loss(logprobs, torch.randn(2, 2, 2), 0.1, forced)
    temperature = losses.temperature_loss(log_alpha, logprobs, forced, 0.4)
    (policy + temperature).backward()
    assert policy.item() == temperature.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().max().item() == 0.0
    assert log_alpha.grad is not None
    assert log_alpha.grad.item() == 0.0


def test_a_certain_policy_has_entropy_zero_and_finite_gradients() -> None:
    logits = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    entropy = losses.entropy(torch.log_softmax(logits, -1))
    entropy.sum().backward()
    assert entropy.item() == 0.0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_polyak_moves_the_target_by_tau_towards_the_online_values() -> None:
    target, online = [torch.tensor([0.0, 2.0])], [torch.tensor([1.0, 0.0], requires_grad=True)]
    losses.polyak_update(target, online, 0.25)
    assert target[0].tolist() == [0.25, 1.5]
    losses.polyak_update(target, online, 1.0)
    assert target[0].tolist() == [1.0, 0.0]
