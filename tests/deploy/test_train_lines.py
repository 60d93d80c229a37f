"""What a run says about itself."""

from __future__ import annotations

from dataclasses import replace

from mara.deploy.train import closing_lines
from mara.learner.loop import LearnerSummary

SUMMARY = LearnerSummary(
    gradient_steps=3,
    num_episodes=20,
    num_tokens=800,
    num_transitions=900,
    steps_dropped=0,
    idle_ratio=0.25,
    seconds=12.0,
    stopped=True,
)


def test_an_agent_that_learnt_nothing_is_called_untrained_in_a_line_of_its_own() -> None:
    for stopped in (True, False):
        nothing = replace(SUMMARY, gradient_steps=0, stopped=stopped)
        first, second = closing_lines(nothing)
        assert "0 gradient steps" in first
        assert "the saved agent is untrained" in second
    assert len(closing_lines(SUMMARY)) == 1
