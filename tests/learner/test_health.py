"""What counts as a sign of training gone wrong."""

import math
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from mara.common.contracts import TransitionBatch
from mara.learner.health import messages, return_bound, save_batch, signs

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


def test_a_batch_for_which_the_disk_has_no_room_is_told_as_such(
    make_batch: Callable[..., TransitionBatch], tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*/\.batch\.safetensors\.partial"):
            save_batch(tmp_path / "batch.safetensors", make_batch(), "why")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_without_a_gradient_step_there_is_no_sign() -> None:
    assert signs({"sac/target_entropy": 0.4}, bound=1.0) == {}


def test_a_sound_row_is_not_talked_about() -> None:
    assert messages(SOUND | signs(SOUND, 2.5) | {"learner/steps_skipped": 0.0}) == {}


def test_what_is_wrong_is_told_with_its_numbers_and_what_may_help() -> None:
    row = SOUND | {"sac/q_mean": -99.0, "sac/entropy": 0.001, "replay/return_bound": 2.5}
    told = messages(row | signs(row, 2.5) | {"learner/steps_skipped": 3.0})
    assert told.keys() == {"q_exploding", "entropy_collapsed", "steps_skipped"}
    assert "-99 on average" in told["q_exploding"] and "2.5" in told["q_exploding"]
    assert "learner.sac.critic_learning_rate" in told["q_exploding"]
    assert "0.001 nats (target 0.4)" in told["entropy_collapsed"]
    assert told["steps_skipped"].startswith("3 gradient steps were skipped")
