"""``mara train``: from a configuration to a saved agent, with nothing left running.

::

    checks ─► run folder ─► server ─► Ray ─► learner, rollout actors ─► saved agent ─► evaluation
                                                      │
                                                reports once a second ──► display, recorder
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mara.actors.llm import cache_folder
from mara.deploy.agent_card import agent_card
from mara.deploy.config import RunConfig
from mara.deploy.console import View, open_display, say, warn
from mara.deploy.exit import RunFailed
from mara.deploy.finished_run import FORCED_SHARE, MUCH_FORCED
from mara.deploy.learner_host import LearnerSpec
from mara.deploy.plots import draw_plots, llm_levels
from mara.deploy.preflight import Checked, preflight
from mara.deploy.process import LEARNER, LOADING, LOADING_REWARD, REWARD_PREFIX, STARTING, WAITING
from mara.deploy.progress import TICK_S, Progress, StoppedEarly
from mara.deploy.ray_head import open_cluster
from mara.deploy.recorder import METRICS_FILE, Recorder
from mara.deploy.resume import Resumed, Start, take_run_folder, where_it_goes_on
from mara.deploy.reward_host import RewardSpec
from mara.deploy.rollout_host import RolloutSpec
from mara.deploy.run_folder import CONFIG_FILE, LATEST, LOGS, name_latest, what_is_saved
from mara.deploy.signals import StopSignal
from mara.deploy.store import Store, open_store, take_up_log, with_addresses
from mara.deploy.supervisor import Status, Supervisor
from mara.learner import health
from mara.learner.loop import LearnerSummary
from mara.learner.saving import AGENT_FOLDER, CHECKPOINT_FOLDER

if TYPE_CHECKING:
    from mara.deploy.topology import Cluster

POLL_S = 1.0
LAST_REPORT_S = 10.0
ACTORS_STOP_S = 3.0
WANDB_START_S = 45.0
WARN_PERIOD_S = 300.0

WAITS = {
    WAITING: "waiting for Ray to start {}",
    STARTING: "setting up {}",
    LOADING: "loading the LLM into {}",
    LOADING_REWARD: "loading {}",
}
"""What is said of the processes in each phase before the last."""


def train(config: RunConfig, resumed: Resumed | None = None) -> int:
    """Train an agent and, if configured, evaluate it. Returns when all is saved and every process is gone.

    With ``resumed`` that run goes on, with ``config`` as its settings, in its folder.

    Ctrl-C, SIGTERM or SIGHUP ends it early, with the agent as it is then; the exit status that is returned
    tells, else it is 0.

    Raises:
        UserError: the settings are wrong.
        RunFailed: the run could not go on.
        KeyboardInterrupt: a second signal came.
    """
    view = View(
        title=f"mara · {config.run.name}",
        num_episodes=config.learner.num_episodes,
        start_transitions=config.learner.start_transitions,
        has_actors=config.rollout.num_actors > 0,
    )
    if resumed is not None:
        view.begin_at(resumed.num_episodes, resumed.gradient_step)
    with StopSignal() as stop, ExitStack() as exits:
        with open_display(view) as display:
            progress = Progress(view, display, stop)
            folder = None if resumed is None else resumed.folder
            try:
                run_id = None if resumed is None else resumed.record.run_id
                checked = preflight(config, progress.state, run_id)
                pause = progress.wait_out("the learner of the run before to end")
                start = exits.enter_context(take_run_folder(config, checked, resumed, pause))
                folder = start.folder
                before = folder.with_name(LATEST).resolve().name
                recorder = Recorder(folder, config, display.say, start.record.wandb_id, start.position)
                exits.callback(recorder.close)
                display.say(f"run folder: {folder}")
                if resumed is not None:
                    display.say(where_it_goes_on(resumed))
                if checked.unpacks_llm:
                    display.say(
                        f"the LLM is unpacked into {cache_folder()} first, once for this machine; "
                        "that takes half a minute or more"
                    )
                summary = _Training(config, checked, start, recorder, progress).run()
            except StoppedEarly:
                if resumed is None:
                    display.say("stopped before training began; there is no agent to save")
                else:
                    display.say(
                        "stopped before training went on; agent and checkpoints are as the run had saved "
                        f"them, and `mara train --resume {resumed.folder}` goes on"
                    )
                return stop.exit_status
            except OSError as error:  # The disk is full, most likely: nothing that was saved is touched.
                if folder is None:
                    raise
                raise RunFailed(f"{_reason(error)}; the run ends; {what_is_saved(folder)}") from error
        say(closing_line(summary))
        if (reason := why_untrained(summary, config.learner.sac.critic_only_steps)) is not None:
            warn(reason)
        try:
            levels = llm_levels(checked.base_scores, config.score_weights)
            draw_plots(folder, config.decoding.truncation.top_k, levels)
        except OSError as error:
            say(f"no plots: {_reason(error)}")
        figures: dict[str, float] | None = None
        try:
            figures = _evaluate(config, folder, recorder, stop)
        except KeyboardInterrupt:
            say(f"no evaluation; `mara eval {folder}` does it later")
        finally:
            _print_places(folder, recorder, before, is_evaluated=figures is not None)
            if reason is None and (doubt := why_doubtful(view, figures or {})) is not None:
                warn(doubt)
            if (remedy := how_to_go_on(summary, folder)) is not None:
                say(remedy)
    return stop.exit_status


def _reason(error: OSError) -> str:
    return f"{error.filename or 'output'}: {error.strerror or error}"


class _Training:
    """One training, from the server to the saved agent."""

    def __init__(
        self, config: RunConfig, checked: Checked, start: Start, recorder: Recorder, progress: Progress
    ) -> None:
        self._config = config
        self._checked = checked
        self._start = start
        self._folder = start.folder
        self._recorder = recorder
        self._progress = progress
        self._is_latest = False
        self._told: dict[str, tuple[float, str]] = {}
        """Kind of a warning → when it was given last, and its words."""
        self._run_id = start.record.run_id if checked.log is None else checked.log.run_id
        """Names the keys of the replay log that is read."""

    def run(self) -> LearnerSummary:
        """Start everything, train, save; end everything, whatever happens."""
        with ExitStack() as exits:
            # Last of all, also after a failure: the learner saves what it can before it ends.
            exits.callback(self._name_latest)
            store = exits.enter_context(
                open_store(self._config, self._checked, self._folder, self._run_id, self._progress)
            )
            self._take_up_log(store)
            cluster = self._with_cluster(exits)
            has_actors = self._config.rollout.num_actors > 0
            who = "the learner and the rollout actors" if has_actors else "the learner"
            self._progress.state(f"asking Ray for {who}")
            supervisor = self._place(with_addresses(self._config, store.redis_urls), cluster)
            exits.callback(supervisor.kill)
            self._start_wandb(exits)
            summary = self._train(supervisor, store)
            self._keep_agent(supervisor)
            self._progress.view.state = f"ending {who}"
            self._progress.display.refresh()
            supervisor.wait_for_actors(ACTORS_STOP_S)
        return summary

    def _take_up_log(self, store: Store) -> None:
        """Say what is left of the episodes of a run that goes on."""
        resumed = self._start.resumed
        if resumed is None or self._checked.log is not None:
            return
        length = take_up_log(self._config, store, self._run_id)
        if length.num_kept:
            self._progress.display.say(f"{length.num_kept} of its episodes are in the replay log still")
        elif resumed.num_episodes:
            batches = self._config.learner.start_batches
            self._progress.display.say(
                "none of its episodes are left: the server that had them has ended (replay.durable=true "
                f"keeps them); training waits for {batches} batches of new ones, as at the start"
            )

    def _with_cluster(self, exits: ExitStack) -> Cluster:
        """The cluster at ``ray.address``, or one of the run's own on this machine."""
        rollout = self._config.rollout
        num_cpus = 1 + math.ceil(rollout.num_actors * rollout.num_cpus + self._config.reward_cpus)
        log_file = self._folder / LOGS / "ray.log"
        return open_cluster(self._config.ray.address, num_cpus, log_file, self._progress, exits)

    def _place(self, config: RunConfig, cluster: Cluster) -> Supervisor:
        run_id = self._run_id
        checked = self._checked
        card = agent_card(config, checked, self._start.record.run_id)
        checkpoint = self._start.checkpoint_name
        learner = LearnerSpec(LEARNER, config, run_id, self._folder, checked.hidden_size, card, checkpoint)
        rollouts = [
            RolloutSpec(name, config, run_id, self._folder, self._checked.prompts, number)
            for number, name in enumerate(self._start.actor_names(config.rollout.num_actors))
        ]
        rewards = [
            RewardSpec(f"{REWARD_PREFIX}{name}-{number}", config, run_id, self._folder, name, Path.cwd())
            for name, reward in (config.reward_models if rollouts else {}).items()
            for number in range(reward.replicas)
        ]
        return Supervisor(cluster, learner, rollouts, self._progress.display.say, rewards)

    def _start_wandb(self, exits: ExitStack) -> None:
        """Start W&B beside the loading of the LLM: both take seconds."""
        thread = threading.Thread(target=self._recorder.start_wandb, daemon=True)
        thread.start()
        exits.callback(thread.join, WANDB_START_S)

    def _train(self, supervisor: Supervisor, store: Store) -> LearnerSummary:
        """Watch until the learner is done, or was asked to stop and has saved."""
        deadline_s: float | None = None
        while True:
            store.keep(self._config, self._folder, self._progress)
            status = supervisor.poll()
            self._take(status)
            if status.summary is not None:
                supervisor.request_stop(learner=False)
                self._record(supervisor.last_rows(LAST_REPORT_S), status.metrics)
                return status.summary
            if deadline_s is None:
                self._progress.pause(POLL_S)
                if self._progress.stop.requested:
                    self._progress.view.state = "stopping: the learner saves the agent"
                    supervisor.request_stop(learner=True)
                    deadline_s = time.monotonic() + self._config.run.stop_timeout_s
            elif time.monotonic() > deadline_s:
                raise RunFailed(
                    f"the learner did not save within {self._config.run.stop_timeout_s:g} s "
                    f"(run.stop_timeout_s); see {self._folder / LOGS / 'learner.log'}"
                )
            else:
                time.sleep(TICK_S)

    def _take(self, status: Status) -> None:
        """Show and record what is new."""
        view = self._progress.view
        view.update(status.metrics)
        self._record(status.rows, status.metrics)
        self._name_latest()
        if not self._progress.stop.requested:
            view.state = describe(status, view)
        self._progress.display.refresh()

    def _name_latest(self) -> None:
        """Give the run the name ``latest`` once it has an agent that learnt."""
        if self._is_latest:
            return
        try:
            self._is_latest = name_latest(self._folder)
        except OSError as error:
            self._is_latest = True  # Told once; the run itself does not need the link.
            self._progress.display.say(f"{LATEST} names another run still: {_reason(error)}")

    def _record(self, rows: list[dict[str, float]], fleet: dict[str, float]) -> None:
        for row in rows:
            row["replay/fill"] = row.get("replay/transitions", 0.0) / self._config.replay.capacity_transitions
            self._recorder.record({**fleet, **row})
            self._progress.view.update(row)
            self._progress.view.remember(row)
            self._warn_of(health.messages(row))

    def _warn_of(self, messages: Mapping[str, str]) -> None:
        """Show what is wrong; the same kind only once in a while, and only if there is something new."""
        now = time.monotonic()
        for kind, message in messages.items():
            told_at, told = self._told.get(kind, (-math.inf, ""))
            if now - told_at >= WARN_PERIOD_S and message != told:
                self._told[kind] = (now, message)
                self._progress.display.say(f"warning: {message}")

    def _keep_agent(self, supervisor: Supervisor) -> None:
        """Fetch the agent from the learner's machine, if that is not this one.

        Raises:
            RunFailed: there is no agent.
        """
        folder = self._folder / AGENT_FOLDER
        if folder.is_dir():
            return
        files = supervisor.agent_files(self._config.run.stop_timeout_s)
        if not files:
            raise RunFailed(f"the learner's machine did not hand over the agent; it may be in {folder} there")
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)


def describe(status: Status, view: View) -> str:
    """What the run is doing and what it waits for, in a few words."""
    waits = [
        doing.format(_who(names))
        for phase, doing in WAITS.items()
        if (names := [name for name, its in status.phases.items() if its == phase])
    ]
    if view.metrics.get("learner/gradient_step", 0) > view.step_before:
        return "; ".join(["training", *waits])
    if waits:
        return "; ".join(waits)
    if not any(name != LEARNER for name in status.phases):
        return "reading the episodes"
    if view.num_done <= view.num_before:
        return "waiting for the first answers"
    if view.metrics.get("replay/transitions", 0) < view.start_transitions:
        return f"collecting answers; training starts at {view.start_transitions} transitions"
    return "training"


def _who(names: Sequence[str]) -> str:
    """The processes called ``names``: "the learner and 2 rollout actors"."""
    num_rewards = sum(name.startswith(REWARD_PREFIX) for name in names)
    num_actors = len(names) - num_rewards - (LEARNER in names)
    groups = ["the learner"] if LEARNER in names else []
    for count, what in ((num_rewards, "reward model"), (num_actors, "rollout actor")):
        if count:
            groups.append(f"{count} {what}{'s' if count > 1 else ''}")
    *others, last = groups
    return f"{', '.join(others)} and {last}" if others else last


def closing_line(summary: LearnerSummary) -> str:
    """What the run came to."""
    return (
        f"{'stopped' if summary.stopped else 'trained'}: {summary.num_episodes} episodes, "
        f"{summary.num_tokens} tokens, {summary.gradient_steps} gradient steps in {summary.seconds:.0f} s; "
        f"over the whole run the learner was idle {summary.idle_ratio:.0%} of the time"
    )


def how_to_go_on(summary: LearnerSummary, folder: Path) -> str | None:
    """How a run that was stopped goes on; None if it is complete, or has no checkpoint on this machine."""
    if not summary.stopped or not (folder / CHECKPOINT_FOLDER).is_dir():
        return None
    return f"`mara train --resume {folder}` goes on with the training"


def why_untrained(summary: LearnerSummary, critic_only_steps: int) -> str | None:
    """Why the saved agent is as it was at the start, with the remedy; None if it is not.

    Its files look like those of any other agent.
    """
    if summary.policy_steps > 0:
        return None
    if summary.gradient_steps == 0:
        return (
            "the saved agent is untrained: the run ended before the first gradient step; let it run longer "
            f"(learner.num_episodes) or begin sooner (learner.start_batches). {LATEST!r} does not name it"
        )
    return (
        f"the saved agent is untrained: in the first {critic_only_steps} gradient steps only the critic "
        f"learns, and the run ended after {summary.gradient_steps}; let it run longer (learner.num_episodes) "
        f"or lower learner.sac.critic_only_steps. {LATEST!r} does not name it"
    )


def why_doubtful(view: View, figures: Mapping[str, float]) -> str | None:
    """Why the saved agent is of little use though it has learnt, with the remedy; None if nothing says so.

    Args:
        view: with the last metrics of the training, which count where the agent was not evaluated.
        figures: of its evaluation; empty where there was none. By value nothing is rejected.
    """
    # Without rollout actors the metrics are those of episodes that another agent made.
    trained = view.metrics.get("episode/forced_rate", 0.0) if view.has_actors else 0.0
    share = figures.get(FORCED_SHARE, 0.0) if figures else trained
    if share <= MUCH_FORCED:
        return None
    return (
        f"the agent rejects all candidates for {share:.0%} of the tokens that it decides, a sign of too "
        "little training: let it train longer (learner.num_episodes) before you use it"
    )


def _evaluate(
    config: RunConfig, folder: Path, recorder: Recorder, stop: StopSignal
) -> dict[str, float] | None:
    """Compare the agent with the base LLM, if so configured; the headline figures.

    Raises:
        KeyboardInterrupt: the run was stopped, or is now: the agent is saved, the comparison can wait.
    """
    if not config.evaluation.after_training or config.prompts.evaluation is None:
        return None
    stop.interrupt_from_here()
    from mara.deploy.evaluation import run_evaluation

    figures = run_evaluation(folder, config, after_training=True)
    recorder.summarise(figures)
    return figures


def _print_places(folder: Path, recorder: Recorder, before: str, *, is_evaluated: bool) -> None:
    """Say where everything is that this start has saved; an earlier one may have left a report.

    ``before`` is the folder that was the latest until now, by its name.
    """
    places = [
        ("agent", folder / AGENT_FOLDER),
        ("checkpoints", folder / CHECKPOINT_FOLDER),
        ("settings", folder / CONFIG_FILE),
        ("metrics", folder / METRICS_FILE),
        ("W&B offline run", recorder.wandb_folder),
        *(("plot", path) for path in sorted(folder.glob("*.png"))),
        ("evaluation", folder / "report.json" if is_evaluated else None),
        ("logs", folder / LOGS),
    ]
    latest = folder.with_name(LATEST)
    is_other = before not in (LATEST, folder.name)
    say("saved:")
    if latest.resolve() == folder.resolve():
        say(f"  {'run':<16} {latest}{f' (which was {before} until now)' if is_other else ''}")
    for what, path in places:
        if path is not None and path.exists():
            say(f"  {what:<16} {path}")
