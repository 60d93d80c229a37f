"""What a run says about itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mara.deploy.console import View
from mara.deploy.finished_run import FORCED_SHARE
from mara.deploy.process import LOADING, RUNNING, STARTING, WAITING
from mara.deploy.supervisor import Status
from mara.deploy.train import (
    _print_places,
    closing_line,
    describe,
    how_to_go_on,
    why_doubtful,
    why_untrained,
)
from mara.learner.loop import LearnerSummary

SUMMARY = LearnerSummary(
    gradient_steps=3,
    policy_steps=2,
    num_episodes=20,
    num_tokens=800,
    num_transitions=900,
    steps_dropped=0,
    idle_ratio=0.25,
    seconds=12.0,
    stopped=True,
)


def test_an_agent_that_learnt_nothing_is_called_untrained_with_the_remedy() -> None:
    nothing = replace(SUMMARY, gradient_steps=0, policy_steps=0)
    assert "0 gradient steps" in closing_line(nothing)
    assert "untrained: the run ended before the first gradient step" in (why_untrained(nothing, 0) or "")
    critic_alone = why_untrained(replace(SUMMARY, policy_steps=0), critic_only_steps=100) or ""
    assert "in the first 100 gradient steps only the critic" in critic_alone and "after 3;" in critic_alone
    assert "lower learner.sac.critic_only_steps" in critic_alone
    assert why_untrained(SUMMARY, 1) is None


def test_a_run_that_was_stopped_says_how_it_goes_on_where_it_can(tmp_path: Path) -> None:
    assert how_to_go_on(SUMMARY, tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert f"`mara train --resume {tmp_path}` goes on" in (how_to_go_on(SUMMARY, tmp_path) or "")
    assert how_to_go_on(replace(SUMMARY, stopped=False), tmp_path) is None


def test_an_agent_that_rejects_nearly_all_is_doubted() -> None:
    view = View("t", num_episodes=10)
    assert why_doubtful(view, {}) is None
    view.update({"episode/forced_rate": 0.42})
    assert "rejects all candidates for 42% of the tokens" in (why_doubtful(view, {}) or "")
    # Greedy answers tell more than those that were sampled in training.
    assert why_doubtful(view, {FORCED_SHARE: 0.02}) is None
    assert why_doubtful(view, {"eval/preference/joint": 0.6}) is None  # by value nothing is rejected
    assert "learner.num_episodes" in (why_doubtful(View("t", num_episodes=10), {FORCED_SHARE: 0.5}) or "")
    view.has_actors = False  # the episodes are those of another agent
    assert why_doubtful(view, {}) is None


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_what_an_earlier_start_left_is_not_called_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_evaluated: bool
) -> None:
    for name in ("report.json", "config.yaml"):
        (tmp_path / name).touch()
    _print_places(tmp_path, SimpleNamespace(wandb_folder=None), "latest", is_evaluated=is_evaluated)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["settings", str(tmp_path / "config.yaml")] for line in lines)
    assert any("report.json" in line for line in lines) == is_evaluated


@pytest.mark.parametrize(
    ("learner", "actors", "gradient_step", "told"),
    [
        (WAITING, [WAITING, WAITING], 0, "waiting for Ray to start the learner and 2 rollout actors"),
        (
            STARTING,
            [WAITING, LOADING],
            0,
            "waiting for Ray to start 1 rollout actor; setting up the learner; "
            "loading the LLM into 1 rollout actor",
        ),
        (RUNNING, [LOADING, LOADING], 0, "loading the LLM into 2 rollout actors"),
        (RUNNING, [RUNNING, RUNNING], 0, "waiting for the first answers"),
        (RUNNING, [RUNNING, RUNNING], 5, "training"),
        (RUNNING, [RUNNING, LOADING], 5, "training; loading the LLM into 1 rollout actor"),
    ],
)
def test_what_is_waited_for_is_said_in_words(
    learner: str, actors: list[str], gradient_step: float, told: str
) -> None:
    phases = {"learner": learner, **{f"actor-{number}": phase for number, phase in enumerate(actors)}}
    view = View("t", num_episodes=10)
    view.update({"learner/gradient_step": gradient_step})
    assert describe(Status([], {}, phases, None), view) == told


def test_a_run_that_goes_on_trains_only_once_it_is_further_than_it_was() -> None:
    view = View("t", num_episodes=10, start_transitions=2048)
    view.begin_at(num_episodes=5, gradient_step=40)
    for actor, learnt, told in (
        (LOADING, {}, "loading the LLM into 1 rollout actor"),
        (RUNNING, {"learner/gradient_step": 40.0}, "waiting for the first answers"),
        (RUNNING, {"episodes/total": 6.0}, "collecting answers; training starts at 2048 transitions"),
        (RUNNING, {"replay/transitions": 2100.0}, "training"),
        (RUNNING, {"replay/transitions": 0.0, "learner/gradient_step": 41.0}, "training"),
    ):
        view.update(learnt)
        assert describe(Status([], {}, {"learner": RUNNING, "actor-0": actor}, None), view) == told


def test_until_training_starts_it_is_said_when_it_will() -> None:
    view = View("t", num_episodes=10, start_transitions=2048)
    view.update({"learner/gradient_step": 0, "episodes/total": 3})
    told = describe(Status([], {}, {"learner": RUNNING, "actor-0": RUNNING}, None), view)
    assert told == "collecting answers; training starts at 2048 transitions"


def test_the_idle_time_of_the_summary_is_that_of_the_whole_run() -> None:
    assert closing_line(SUMMARY).endswith("over the whole run the learner was idle 25% of the time")
