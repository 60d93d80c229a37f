"""Metrics of an episode, worked by hand, and their means over a window."""

import math

import pytest

from mara.learner.meters import Window
from mara.learner.statistics import episode_statistics


def test_an_episode_worked_by_hand(make_episode) -> None:
    # Position 0: candidate 0 rejected, candidate 1 accepted. Position 2: two rejected, the last one forced.
    # Position 1 had a single candidate: no decision.
    episode = make_episode(
        actions=[0, 1, 0, 0, 1],
        ranks=[0, 1, 0, 1, 2],
        positions=[0, 0, 2, 2, 2],
        forced=[False, False, False, False, True],
        num_tokens=3,
        scores={"good": 2.0, "bad": 0.5, "watched": 9.0},
        finish_reason="length",
    )
    row = episode_statistics(episode, {"good": 1.0, "bad": -2.0})
    half = math.log(0.5)
    assert row == pytest.approx(
        {
            "reward": 2.0 - 2 * 0.5,
            "score/good": 2.0,
            "score/bad": 0.5,
            "score/watched": 9.0,
            "num_tokens": 3,
            "finish_eos_rate": 0,
            "decisions_per_token": 5 / 3,
            # reject, accept at position 0; reject twice, forced at 2; every reference log-probability is -1
            "kl": ((2 * half + 1) + (2 * half + 1)) / 3,
            "accept_rate": 1 / 4,
            "forced_rate": 1 / 2,
            "accepted_rank_0": 0,
            "accepted_rank_1": 1 / 2,
            "accepted_rank_2": 1 / 2,
            "accepted_rank_3": 0,
            "accepted_rank_4": 0,
            "accepted_rank_rest": 0,
        }
    )


def test_late_ranks_are_counted_together(make_episode) -> None:
    row = episode_statistics(make_episode([1, 1, 1, 1], ranks=[4, 5, 17, 0]), {})
    assert (row["accepted_rank_0"], row["accepted_rank_4"], row["accepted_rank_rest"]) == (0.25, 0.25, 0.5)


def test_an_answer_without_decisions_says_nothing_about_decisions(make_episode) -> None:
    row = episode_statistics(make_episode([], num_tokens=4), {"good": 1.0})
    assert row["decisions_per_token"] == row["kl"] == 0.0
    assert row["reward"] == 1.0
    assert not {"accept_rate", "forced_rate", "accepted_rank_0"} & row.keys()


def test_an_agent_that_is_never_free_has_no_rate_of_acceptance(make_episode) -> None:
    row = episode_statistics(make_episode([1], forced=[True]), {})
    assert row["forced_rate"] == 1.0
    assert "accept_rate" not in row


def test_a_window_averages_each_name_over_its_own_values_and_starts_anew() -> None:
    window = Window()
    window.average({"reward": 1.0, "kl": 4.0}, prefix="episode/")
    window.average({"reward": 2.0}, prefix="episode/")
    window.peak("policy/lag_max", 3.0)
    window.peak("policy/lag_max", -1.0)
    assert window.take() == {"episode/reward": 1.5, "episode/kl": 4.0, "policy/lag_max": 3.0}
    assert window.take() == {}
    window.peak("policy/lag_max", -2.0)
    assert window.take() == {"policy/lag_max": -2.0}
