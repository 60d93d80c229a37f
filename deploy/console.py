"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mara.deploy.output import complain

PLAIN_PERIOD_S = 10.0
SHOWN = 60
"""Characters of a setting's value in a message."""
HISTORY = 40
LEAST_S, STEADY_SHARE, STEADY_S = 10.0, 0.1, 60.0
"""The remaining time is told this long after the first episodes and after this share of all; or, without the
share, after the last of these, seconds."""
BARS = "▁▂▃▄▅▆▇█"
MISSING = "–"
EPISODES = "episodes"


@dataclass(slots=True)
class View:
    """What there is to show, filled in by the run as it learns it."""

    title: str
    num_episodes: int
    """Episodes the run is going to train on."""
    start_transitions: int = 0
    """Transitions that must have come before training starts."""
    has_actors: bool = True
    """Whether rollout actors make the episodes, rather than a finished run's log having them."""
    unit: str = EPISODES
    """What is counted. Only of episodes there are the tables of rollouts and learner."""
    state: str = "starting"
    """One line in plain words: what is being waited for or done."""
    metrics: dict[str, float] = field(default_factory=dict)
    history: dict[str, deque[float]] = field(default_factory=dict)
    """Last values of the reward and of each score."""
    began: float = field(default_factory=time.monotonic)
    first_seen: tuple[float, int] | None = None
    """When the first episodes had come, and how many they were."""
    num_before: int = 0
    """Episodes that were read before this start of the run."""
    step_before: int = 0
    """Gradient steps that were done before it."""

    def begin_at(self, num_episodes: int, gradient_step: int) -> None:
        """Show a run that goes on from there."""
        self.num_before, self.step_before = num_episodes, gradient_step
        self.metrics |= {"episodes/total": num_episodes, "learner/gradient_step": gradient_step}

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take over the latest values."""
        self.metrics.update(metrics)
        if self.first_seen is None and self.num_done > self.num_before:
            self.first_seen = (time.monotonic(), self.num_done)

    def remember(self, row: Mapping[str, float]) -> None:
        """Add the rewards of one row of the record to the history."""
        for name, value in row.items():
            if name == "episode/reward" or name.startswith("episode/score/"):
                self.history.setdefault(name, deque(maxlen=HISTORY)).append(value)

    @property
    def num_done(self) -> int:
        """Episodes the learner has read."""
        return int(self.metrics.get("episodes/total", 0))

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def remaining_s(self) -> float | None:
        """Estimate from the pace so far; None until that is steady.

        Answers come in waves at first, as all rows of an actor begin together. Those seen first say
        nothing of the pace: they were made before anybody looked.
        """
        if self.first_seen is None:
            return None
        since_s, num_before = self.first_seen
        passed_s, num_since = time.monotonic() - since_s, self.num_done - num_before
        steady_from = STEADY_SHARE * (self.num_episodes - self.num_before)
        has_share = num_since >= steady_from
        if num_since < 1 or passed_s < (LEAST_S if has_share else STEADY_S):
            return None
        return passed_s / num_since * max(0, self.num_episodes - self.num_done)


class Display(Protocol):
    """Shows a :class:`View`. A context manager; nothing is shown after it is left."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def refresh(self) -> None:
        """The view has changed."""
        ...

    def say(self, line: str) -> None:
        """Show a line that stays."""
        ...


def open_display(view: View) -> LiveDisplay | PlainDisplay:
    """A live display on a terminal that can show one; plain lines in a pipe, a file or CI."""
    console = Console()
    # rich takes FORCE_COLOR for a terminal; escape codes that move the cursor do not belong into a file.
    is_terminal = sys.stdout.isatty() and console.is_terminal
    if is_terminal and not console.is_dumb_terminal and "CI" not in os.environ:
        return LiveDisplay(view, console)
    return PlainDisplay(view)


class PlainDisplay:
    """One line every ten seconds, and one at each change of state."""

    def __init__(self, view: View, period_s: float = PLAIN_PERIOD_S) -> None:
        self._view = view
        self._period_s = period_s
        self._shown_at = float("-inf")
        self._state = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def refresh(self) -> None:
        now, view = time.monotonic(), self._view
        if view.state == self._state and now - self._shown_at < self._period_s:
            return
        self._shown_at, self._state = now, view.state
        self.say(plain_line(view))

    def say(self, line: str) -> None:
        say(line)


def say(line: str) -> None:
    """Write a line to the standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def warn(line: str) -> None:
    """Write a warning to standard error, at once: what is on standard output stays what was asked for."""
    complain(f"mara: warning: {line}")


def shown(value: object) -> str:
    """A setting's value in a message: one line, not too long."""
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def plain_line(view: View) -> str:
    """Everything that matters in one line: time, state, and the metrics that are known."""
    parts = [f"[{clock(view.elapsed_s)}] {view.state}"]
    if view.num_done or "rollout/tokens_total" in view.metrics:
        parts.append(f"{view.unit} {view.num_done}/{view.num_episodes}")
    for label, name, form in PLAIN_COLUMNS if view.num_done else FIRST_COLUMNS:
        if name in view.metrics:
            parts.append(f"{label} {view.metrics[name]:{form}}")
    if (remaining_s := view.remaining_s) is not None:
        parts.append(f"ETA {clock(remaining_s)}")
    return " | ".join(parts)


FIRST_COLUMNS = (
    ("answers in progress per actor", "rollout/rows_active", ".0f"),
    ("LLM passes", "rollout/passes_total", ".0f"),
)
"""What moves while the first answers are made: they all end at about the same time, and tokens count then."""
PLAIN_COLUMNS = (
    ("tokens/s", "rollout/tokens_per_s", ".0f"),
    ("episodes/s", "rollout/episodes_per_s", ".2f"),
    ("reward", "episode/reward", "+.3f"),
    ("step", "learner/gradient_step", ".0f"),
    ("replay", "replay/transitions", ".0f"),
    ("critic loss", "sac/critic_loss", ".4f"),
    ("policy loss", "sac/policy_loss", ".4f"),
    ("entropy", "sac/entropy", ".3f"),
    ("alpha", "sac/temperature", ".3f"),
    ("lag", "policy/lag_mean", ".1f"),
    # The actors' share is that of their whole life, the learner's that of the last row.
    ("actors idle so far", "rollout/idle_ratio", ".0%"),
    ("learner idle now", "learner/idle_ratio", ".0%"),
)


class LiveDisplay:
    """A panel that is redrawn in place four times a second."""

    def __init__(self, view: View, console: Console) -> None:
        self._view = view
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def refresh(self) -> None:
        """The display redraws itself."""

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False)

    def _draw(self) -> RenderableType:
        return draw(self._view, self._spinner)


def draw(view: View, spinner: Spinner) -> RenderableType:
    """The live panel: state, progress, rollouts and learner side by side, rewards."""
    spinner.update(text=Text(f"{view.state}   {clock(view.elapsed_s)}"))
    parts: list[RenderableType] = [spinner]
    if view.num_done or "rollout/tokens_total" in view.metrics:
        parts.append(_progress(view))
        if view.unit == EPISODES:
            groups = [*([ROLLOUT_ROWS] if view.has_actors else []), LEARNER_ROWS, SAC_ROWS]
            columns = Table.grid(padding=(0, 3), expand=False)
            columns.add_row(*(_table(view, rows) for rows in groups))
            parts += [Text(), columns]
        elif "rollout/tokens_per_s" in view.metrics:
            parts.append(_table(view, ROLLOUT_ROWS[:1]))
    if view.history:
        parts += [Text(), _rewards(view)]
    return Panel(Group(*parts), title=view.title, title_align="left", border_style="cyan")


# Label, how the number is written, and its name. The three tables fit a terminal of 80 columns.
Row = tuple[str, str, str]
ROLLOUT_ROWS: tuple[Row, ...] = (
    ("tokens/s", "{:.0f}", "rollout/tokens_per_s"),
    ("episodes/s", "{:.2f}", "rollout/episodes_per_s"),
    ("passes/s", "{:.0f}", "rollout/passes_per_s"),
    ("actors alive", "{:.0f}", "actors/alive"),
    ("actors restarted", "{:.0f}", "actors/restarted"),
    ("idle so far", "{:.1%}", "rollout/idle_ratio"),
    ("decisions/token", "{:.2f}", "episode/decisions_per_token"),
    ("first candidate", "{:.0%}", "episode/accepted_rank_0"),
)
LEARNER_ROWS: tuple[Row, ...] = (
    ("gradient step", "{:.0f}", "learner/gradient_step"),
    ("steps/s", "{:.2f}", "learner/gradient_steps_per_s"),
    ("idle now", "{:.1%}", "learner/idle_ratio"),
    ("transitions", "{:.0f}", "replay/transitions"),
    ("replay fill", "{:.1%}", "replay/fill"),
    ("policy lag", "{:.1f}", "policy/lag_mean"),
    ("longest lag", "{:.0f}", "policy/lag_max"),
    ("weights after", "{:.2f} s", "weights/publish_to_applied_s"),
)
SAC_ROWS: tuple[Row, ...] = (
    ("critic loss", "{:.4f}", "sac/critic_loss"),
    ("policy loss", "{:.4f}", "sac/policy_loss"),
    ("entropy", "{:.3f}", "sac/entropy"),
    ("target entropy", "{:.3f}", "sac/target_entropy"),
    ("α", "{:.4f}", "sac/temperature"),
    ("Q gap", "{:+.3f}", "sac/q_gap"),
    ("accept rate", "{:.0%}", "episode/accept_rate"),
    ("KL per token", "{:.3f}", "episode/kl"),
)


def _table(view: View, rows: tuple[Row, ...]) -> Table:
    table = Table.grid(padding=(0, 1))
    for label, form, name in rows:
        value = form.format(view.metrics[name]) if name in view.metrics else MISSING
        table.add_row(Text(label, style="dim"), value)
    return table


def _progress(view: View) -> Table:
    remaining_s = view.remaining_s
    table = Table.grid(padding=(0, 1))
    table.add_row(
        f"{view.unit} {min(view.num_done, view.num_episodes)}/{view.num_episodes}",
        ProgressBar(total=view.num_episodes, completed=min(view.num_done, view.num_episodes), width=40),
        f"ETA {clock(remaining_s) if remaining_s is not None else MISSING}",
    )
    return table


def _rewards(view: View) -> Table:
    table = Table.grid(padding=(0, 1))
    for name, values in view.history.items():
        label = name.removeprefix("episode/").replace("score/", "score ")
        table.add_row(Text(label, style="dim"), f"{values[-1]:+.3f}", Text(sparkline(values), style="green"))
    return table


def sparkline(values: deque[float]) -> str:
    """One bar for each value between the least and the greatest of them."""
    low, high = min(values), max(values)
    if high == low:
        return BARS[len(BARS) // 2] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in values)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
