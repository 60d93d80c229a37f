"""What counts as a sign of training gone wrong."""

import math

import pytest

from mara.learner.health import return_bound, signs

SOUND = {"sac/q_mean": 2.0, "sac/target_mean": 2.1, "sac/entropy": 0.3, "sac/target_entropy": 0.4}


def test_no_return_exceeds_rewards_and_entropy_together() -> None:
    assert return_bound(2.0, 0.1, 10) == pytest.approx(2 + 0.1 * 10 * math.log(2))
    assert return_bound(0.0, 0.0, 10) == 0.01


@pytest.mark.parametrize(
    ("change", "exploding", "collapsed"),
    [
        ({}, 0, 0),
        ({"sac/q_mean": 7.6}, 1, 0),
        ({"sac/q_mean": -7.6}, 1, 0),
        ({"sac/target_mean": 7.6}, 1, 0),
        ({"sac/q_mean": 7.4}, 0, 0),
        ({"sac/entropy": 0.019}, 0, 1),
        ({"sac/entropy": 0.0, "sac/target_entropy": 0.0}, 0, 0),
    ],
)
def test_signs_of_a_row(change: dict[str, float], exploding: int, collapsed: int) -> None:
    found = signs(SOUND | change, bound=2.5)
    assert found == {"health/q_exploding": exploding, "health/entropy_collapsed": collapsed}


def test_without_a_gradient_step_there_is_no_sign() -> None:
    assert signs({"sac/target_entropy": 0.4}, bound=1.0) == {}
