"""What the display shows."""

from __future__ import annotations

import os
import time
from collections import deque

import pytest
from rich.console import Console
from rich.spinner import Spinner

from mara.deploy.console import LiveDisplay, PlainDisplay, View, draw, open_display, plain_line, sparkline

METRICS = {
    "rollout/tokens_total": 4000.0,
    "rollout/tokens_per_s": 123.4,
    "rollout/episodes_per_s": 3.25,
    "rollout/idle_ratio": 0.012,
    "actors/alive": 2.0,
    "actors/restarted": 1.0,
    "learner/gradient_step": 42.0,
    "learner/idle_ratio": 0.2,
    "sac/entropy": 0.61,
    "sac/target_entropy": 0.416,
    "sac/temperature": 0.09,
    "sac/critic_loss": 0.0123,
    "policy/lag_mean": 3.5,
    "policy/lag_max": 9.0,
    "episodes/total": 100.0,
    "replay/transitions": 5000.0,
    "replay/fill": 0.05,
}


@pytest.fixture
def view() -> View:
    view = View("mara · test", num_episodes=400, state="training")
    view.update(METRICS)
    view.remember({"episode/reward": 0.5, "episode/score/helpful": 1.0, "sac/entropy": 1.0})
    view.remember({"episode/reward": 0.75})
    return view


def test_a_plain_line_tells_state_progress_and_metrics(view: View) -> None:
    line = plain_line(view)
    for part in (
        "training",
        "episodes 100/400",
        "tokens/s 123",
        "step 42",
        "alpha 0.090",
        "learner idle now 20%",
    ):
        assert part in line
    assert "\n" not in line


def test_what_counts_something_else_shows_nothing_of_a_training() -> None:
    view = View("mara · test", num_episodes=400, state="answering", unit="answers")
    view.update({"episodes/total": 100.0, "rollout/tokens_per_s": 123.4})
    assert plain_line(view) == "[0:00] answering | answers 100/400 | tokens/s 123"
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(draw(view, Spinner("dots")))
    shown = console.export_text()
    assert "answers 100/400" in shown and "tokens/s" in shown and "123" in shown
    assert "critic loss" not in shown and "gradient step" not in shown


def test_before_the_first_episode_the_line_is_only_time_and_state() -> None:
    assert plain_line(View("t", 10, state="starting Ray")) == "[0:00] starting Ray"


def test_until_the_first_answer_the_line_shows_what_moves_and_no_zeros() -> None:
    view = View("t", 10, state="waiting for the first answers")
    view.update({"rollout/tokens_per_s": 0.0, "rollout/rows_active": 64.0, "rollout/passes_total": 320.0})
    assert plain_line(view).endswith("first answers | answers in progress per actor 64 | LLM passes 320")


def test_plain_lines_come_at_a_change_of_state_and_then_once_a_period(
    view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    display = PlainDisplay(view, period_s=1000)
    for _ in range(3):
        display.refresh()
    view.state = "stopping"
    display.refresh()
    display.say("actor-0 died")
    lines = capsys.readouterr().out.splitlines()
    assert ["training" in lines[0], "stopping" in lines[1], lines[2]] == [True, True, "actor-0 died"]


@pytest.mark.parametrize(
    ("seconds_ago", "num_done", "remaining_s"),
    [
        (10, 100, None),  # None since those that came at once.
        (10, 120, None),  # A twentieth of all: the pace is that of one wave.
        (9, 200, None),  # A third of all, and yet a single wave.
        (10, 200, 20),
        (70, 120, 980),
    ],
)
def test_the_remaining_time_follows_the_pace_once_that_is_steady(
    view: View, seconds_ago: float, num_done: int, remaining_s: float | None
) -> None:
    view.update({"episodes/total": num_done})
    assert view.first_seen is not None and view.first_seen[1] == 100
    view.first_seen = (time.monotonic() - seconds_ago, 100)
    assert view.remaining_s == (remaining_s if remaining_s is None else pytest.approx(remaining_s, rel=0.05))


def test_the_live_panel_shows_progress_losses_rewards_and_actors(view: View) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(view, Spinner("dots")))
    text = console.export_text()
    for part in (
        "episodes 100/400",
        "target entropy 0.416",
        "longest lag",
        "score helpful",
        "+0.750",
        "5.0%",
    ):
        assert part in text
    assert "▁█" in text


def panel(view: View, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(view, Spinner("dots")))
    return console.export_text().splitlines()


def test_the_live_panel_fits_a_terminal_of_80_columns_and_24_lines(view: View) -> None:
    large = dict.fromkeys(view.metrics, 0.0) | dict.fromkeys(
        ("rollout/tokens_per_s", "learner/gradient_step", "episodes/total", "policy/lag_max"), 123456.0
    )
    large |= {"replay/transitions": 1_000_000.0, "rollout/idle_ratio": 1.0, "replay/fill": 1.0}
    large |= {"sac/policy_loss": -12.3456, "sac/q_gap": -12.345, "weights/publish_to_applied_s": 12.34}
    large |= {"rollout/episodes_per_s": 123.45, "episode/kl": 12.345, "episode/decisions_per_token": 12.34}
    view.update(large)
    view.num_episodes = 1_000_000
    for _ in range(60):
        view.remember({"episode/reward": -1.25, "episode/score/harmless": 1.0})
    narrow, wide = panel(view, 80), panel(view, 140)
    assert len(narrow) <= 24 and max(map(len, narrow)) <= 80
    words = [line.strip("│ ").split() for line in narrow[1:-1]]
    assert words == [line.strip("│ ").split() for line in wide[1:-1]]  # nothing is wrapped or cut off


def test_a_run_without_rollout_actors_shows_nothing_of_them(view: View) -> None:
    view.has_actors = False
    text = "\n".join(panel(view, 80))
    assert "critic loss" in text and "gradient step" in text
    assert "actors" not in text and "tokens/s" not in text and "first candidate" not in text


def test_a_sparkline_spans_the_least_and_the_greatest_value() -> None:
    assert sparkline(deque([0.0, 0.5, 1.0])) == "▁▅█"
    assert sparkline(deque([2.0, 2.0])) == "▅▅"


def test_what_is_no_terminal_gets_plain_lines_whatever_is_said_of_colours(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(open_display(view), PlainDisplay)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    assert isinstance(open_display(view), PlainDisplay)


def test_a_terminal_gets_the_live_display_but_not_in_ci(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    with open(reader, "rb"), open(writer, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("CI", raising=False)
        assert isinstance(open_display(view), LiveDisplay)
        monkeypatch.setenv("CI", "true")
        assert isinstance(open_display(view), PlainDisplay)
