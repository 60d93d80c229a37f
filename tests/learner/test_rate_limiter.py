"""The replay ratio, from both sides."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara.learner.limiter import RateLimiter

PLENTY = 10**9
"""Transitions that have come where their number must not matter."""


def spend_all(limiter: RateLimiter) -> int:
    steps = 0
    while limiter.allows_step(0, PLENTY):
        limiter.spend()
        steps += 1
    return steps


def test_fractions_of_a_step_add_up() -> None:
    limiter = RateLimiter(2.5, 100)
    spent = []
    for _ in range(4):
        limiter.earn(1)
        spent.append(spend_all(limiter))
    assert spent == [2, 3, 2, 3]


def test_no_step_is_allowed_before_an_episode_came() -> None:
    assert not RateLimiter(10, 100).allows_step(0, PLENTY)


def test_after_a_stall_the_backlog_is_capped_and_the_rest_is_counted() -> None:
    limiter = RateLimiter(10, 5)
    limiter.earn(30)
    assert limiter.num_dropped == 250
    assert spend_all(limiter) == 50


def test_without_a_backlog_to_keep_to_nothing_is_dropped() -> None:
    limiter = RateLimiter(10, None)
    limiter.earn(10_000)
    assert limiter.num_dropped == 0
    assert spend_all(limiter) == 100_000


def test_a_ratio_far_below_one_still_comes_to_a_step() -> None:
    limiter = RateLimiter(0.25, 1)
    limiter.earn(4)
    assert spend_all(limiter) == 1


@given(st.floats(0.1, 20), st.lists(st.integers(0, 30), max_size=30))
def test_every_step_earned_is_done_owed_or_dropped(ratio: float, arrivals: list[int]) -> None:
    limiter, done = RateLimiter(ratio, 10), 0
    for num_episodes in arrivals:
        limiter.earn(num_episodes)
        if limiter.allows_step(0, PLENTY):
            limiter.spend()
            done += 1
    assert 0 <= limiter.owed <= limiter.max_owed
    assert done + limiter.owed + limiter.num_dropped == pytest.approx(ratio * sum(arrivals))


@given(st.floats(0.01, 50), st.lists(st.integers(0, 100), max_size=30), st.integers(1, 200))
def test_no_transition_is_sampled_more_often_than_allowed_and_none_less_if_steps_are_owed(
    bound: float, arrivals: list[int], batch_size: int
) -> None:
    limiter, sampled, inserted = RateLimiter(1e6, None, bound), 0, 0
    for num_transitions in arrivals:
        limiter.earn(1)
        inserted += num_transitions
        while limiter.allows_step(sampled + batch_size, inserted):
            limiter.spend()
            sampled += batch_size
        assert sampled <= bound * inserted < sampled + batch_size


def test_a_saved_limiter_owes_the_same() -> None:
    limiter, fresh = RateLimiter(2.5, 3), RateLimiter(2.5, 3)
    limiter.earn(5)
    limiter.spend()
    fresh.load_state_dict(limiter.state_dict())
    assert (fresh.owed, fresh.num_dropped) == (limiter.owed, limiter.num_dropped) == (6.5, 5.0)
