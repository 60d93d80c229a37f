"""The replay ratio."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara.learner.budget import StepBudget


def spend_all(budget: StepBudget) -> int:
    steps = 0
    while budget.allows_step:
        budget.spend()
        steps += 1
    return steps


def test_fractions_of_a_step_add_up() -> None:
    budget = StepBudget(2.5, 100)
    spent = []
    for _ in range(4):
        budget.earn(1)
        spent.append(spend_all(budget))
    assert spent == [2, 3, 2, 3]


def test_no_step_is_allowed_before_an_episode_came() -> None:
    assert not StepBudget(10, 100).allows_step


def test_after_a_stall_the_backlog_is_capped_and_the_rest_is_counted() -> None:
    budget = StepBudget(10, 5)
    budget.earn(30)
    assert budget.num_dropped == 250
    assert spend_all(budget) == 50


def test_a_ratio_far_below_one_still_comes_to_a_step() -> None:
    budget = StepBudget(0.25, 1)
    budget.earn(4)
    assert spend_all(budget) == 1


@given(st.floats(0.1, 20), st.lists(st.integers(0, 30), max_size=30))
def test_every_step_earned_is_done_owed_or_dropped(ratio: float, arrivals: list[int]) -> None:
    budget, done = StepBudget(ratio, 10), 0
    for num_episodes in arrivals:
        budget.earn(num_episodes)
        if budget.allows_step:
            budget.spend()
            done += 1
    assert 0 <= budget.owed <= budget.max_owed
    assert done + budget.owed + budget.num_dropped == pytest.approx(ratio * sum(arrivals))


def test_a_saved_budget_owes_the_same() -> None:
    budget, fresh = StepBudget(2.5, 3), StepBudget(2.5, 3)
    budget.earn(5)
    budget.spend()
    fresh.load_state_dict(budget.state_dict())
    assert (fresh.owed, fresh.num_dropped) == (budget.owed, budget.num_dropped) == (6.5, 5.0)
