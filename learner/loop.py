"""The learner: read episodes, train, publish weights, report; never wait for anybody while there is work.

::

    log ── read ──► mirror ── sample ──► SAC.update ──► weights (latest wins)
            │                               │
            └ earns gradient steps          └ metrics, checkpoints
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mara.buffer.config import NORMALISE_FROM_EPISODES, ReplayConfig, ShapingConfig
from mara.buffer.mirror import Mirror
from mara.common.config import AgentConfig
from mara.common.contracts import LogReader, TransitionBatch, WeightSink
from mara.common.episode import Episode
from mara.common.errors import UserError
from mara.common.seeding import generator
from mara.learner import health
from mara.learner.config import LearnerConfig
from mara.learner.limiter import RateLimiter
from mara.learner.meters import Clock, Window
from mara.learner.sac import SAC
from mara.learner.saving import Saver
from mara.learner.statistics import episode_statistics

READ_EPISODES = 64
"""Most episodes read between two gradient steps."""
WAIT_S = 0.1
"""How long one wait for episodes lasts; a stop request is seen within it."""
LOOK_S = 1.0
"""Time between two looks at whether the store still has the weights, while there are no newer ones."""

_LOST = ("num_malformed", "num_quarantined", "num_trimmed_unread")
"""What the source counts since it began to read."""


@dataclass(frozen=True, slots=True)
class LearnerSummary:
    """What a run of the learner came to."""

    gradient_steps: int
    policy_steps: int
    """Those in which the agent moved: not the first ``sac.critic_only_steps``."""
    num_episodes: int
    num_tokens: int
    num_transitions: int
    steps_dropped: float
    """Gradient steps that the replay ratio allowed and the learner was too slow for."""
    idle_ratio: float
    """Share of the time spent waiting for episodes."""
    seconds: float
    """What it took; where it went on from a checkpoint, with what it had taken until then."""
    stopped: bool
    """Whether :meth:`Learner.stop` ended it, rather than the last episode."""


class Learner:
    """Trains one agent from one log, in one thread; only :meth:`stop` may be called from another.

    Args:
        config: what and how much to train.
        agent_config: the accept-reject network.
        replay: size of the mirror.
        shaping: how scores become rewards.
        hidden_size: of the LLM, D.
        source: the log, at the position to start from.
        weights: where the agent's weights go. Version n is the agent after n gradient steps.
        log_is_finished: nobody appends to the log, so it can wait: the next episode is taken in only when
            every step that is owed was done, none is dropped, and the run ends with the log. All happens in
            the order of the log: the same log and seed give the same agent.
        seed: of the networks and the sampling.
        on_metrics: called with one row of numbers by name, every ``log_period_s`` and at the end.
        run_folder: where ``checkpoints/`` and ``agent/`` are kept up to date. None: nothing is written.
        agent_card: what is written beside the agent: its LLM, truncation and rewards.
    """

    def __init__(
        self,
        config: LearnerConfig,
        agent_config: AgentConfig,
        replay: ReplayConfig,
        shaping: ShapingConfig,
        *,
        hidden_size: int,
        source: LogReader,
        weights: WeightSink,
        log_is_finished: bool = False,
        seed: int = 0,
        on_metrics: Callable[[dict[str, float]], None] = lambda row: None,
        run_folder: Path | None = None,
        agent_card: Mapping[str, Any] | None = None,
    ) -> None:
        check_start(config, replay, shaping)
        device = learner_device(config.device)
        self.config = config
        self.sac = SAC(hidden_size, agent_config, config.sac, device, seed)
        self.mirror = Mirror(hidden_size, replay, shaping, device)
        self._reward_weights = shaping.score_weights
        self._source = source
        self._weights = weights
        self._on_metrics = on_metrics
        self._run_folder = run_folder
        self._saver = None if run_folder is None else Saver(run_folder, config.num_checkpoints)
        self._agent_card = dict(agent_card or {})
        self._generator = generator(seed, "sampling")
        # By priorities the next batch depends on what this one finds.
        self.draws_ahead = device.type == "cuda" and replay.sampling != "prioritised"
        """Whether the next batch is drawn while a GPU is at work on the present one. It is drawn again where
        episodes come in between: the batches are the same as without."""
        if self.draws_ahead:
            self.mirror.num_batches_kept = 2
        self._drawn: TransitionBatch | None = None
        self._state_before_drawn: torch.Tensor | None = None
        self._log_is_finished = log_is_finished
        self._limiter = RateLimiter(
            config.gradient_steps_per_episode,
            None if log_is_finished else config.max_backlog_episodes,
            config.max_samples_per_transition,
        )
        self._stop = threading.Event()
        self._refilling = False
        self._has_ended = False
        self._started = False
        self._starts_at = config.start_transitions
        """Transitions that must have come, ever, before training starts."""
        self._num_held_before = 0
        """Transitions in the ring when the state was saved that was loaded."""
        self._num_skipped = 0
        self._num_skipped_in_a_row = 0
        self._num_episodes = 0
        self._num_tokens = 0
        self._num_sampled = 0
        self._waiting_since: float | None = None
        self._published_version: int | None = None
        self._published_at = self._saved_at = self._looked_for_publication_at = 0.0
        self._window = Window()
        self._lost_before = dict.fromkeys(_LOST, 0)
        self._clock = self._new_clock()
        self._whole_run = self._new_clock()
        self._before_s = self._idle_before_s = 0.0

    @property
    def gradient_step(self) -> int:
        """Gradient steps done."""
        return self.sac.step

    @property
    def num_episodes(self) -> int:
        """Episodes read."""
        return self._num_episodes

    def stop(self) -> None:
        """End :meth:`run` after the gradient step it is at; it still saves, publishes and reports."""
        self._stop.set()

    def run(self) -> LearnerSummary:
        """Train until ``num_episodes`` were read and their gradient steps done, or until :meth:`stop`.

        A finished log may end earlier.

        Publishes the agent at once, so that the rollouts can begin. Sets the number of threads of this
        process's arithmetic. Whatever is raised, the agent and a checkpoint are saved before, unless nothing
        was learnt yet.

        Raises:
            UserError: all episodes came and were too few to begin training, or do not fit the settings; or
                none came for ``data_timeout_s``.
            ReplayUnavailable: the store has been away for too long.
            FloatingPointError: too many gradient steps in a row were not finite.
        """
        torch.set_num_threads(self.config.num_threads)
        self._clock, self._whole_run = self._new_clock(), self._new_clock(self._before_s)
        self._whole_run.idle_s = self._idle_before_s
        self._saved_at = time.monotonic()
        try:
            self._train_to_the_end()
        except Exception as error:
            self._save_before(error)
            raise
        stopped = self._stop.is_set()
        # Saved first: the store may be away by now, and nobody needs the last publication as much.
        self._save(wait=True)
        self._publish()
        self._report()
        if not stopped and self.mirror.total_transitions < self.config.start_transitions:
            raise UserError(
                f"learner.start_batches: training starts at {self.config.start_transitions} transitions "
                f"(start_batches {self.config.start_batches} × batch_size {self.config.batch_size}), but the "
                f"{self._num_episodes} episodes held {self.mirror.total_transitions}; lower it or raise "
                f"learner.num_episodes"
            )
        if not stopped and not self._started:
            raise UserError(
                "learner.num_episodes: the log has lost the episodes from before the checkpoint, and those "
                "that were left did not fill the replay again ("
                f"{self._starts_at - self.mirror.total_transitions} transitions missing); go on with "
                "a higher number"
            )
        return LearnerSummary(
            gradient_steps=self.sac.step,
            policy_steps=self.sac.policy_steps,
            num_episodes=self._num_episodes,
            num_tokens=self._num_tokens,
            num_transitions=self.mirror.total_transitions,
            steps_dropped=self._limiter.num_dropped,
            idle_ratio=self._whole_run.idle_ratio,
            seconds=self._whole_run.seconds,
            stopped=stopped,
        )

    def _train_to_the_end(self) -> None:
        self._publish()
        while not self._stop.is_set():
            self._read()
            if self._refilling:
                self._refill()
            if self._can_train:
                self._train()
            elif self._has_all and not self._refilling:
                self._has_ended = self._started
                break
            self._do_what_is_due()

    @property
    def _has_all(self) -> bool:
        """Whether no more episodes will come."""
        return self._num_episodes >= self.config.num_episodes or (
            self._log_is_finished and self._source.at_end()
        )

    @property
    def _can_train(self) -> bool:
        """Whether a gradient step is owed and there is enough to do it on."""
        if self._refilling:
            # Of a finished log all comes back first: what is drawn must not depend on the time it takes.
            is_enough = self.mirror.num_transitions >= self.config.start_transitions
            if self._log_is_finished or not is_enough:
                return False
        if not self._started:
            return False
        sampled = self._num_sampled + self.config.batch_size
        allowed = self._limiter.allows_step(sampled, self.mirror.total_transitions)
        return allowed and self.mirror.num_transitions > 0

    def _read(self) -> None:
        """Take in what the log has. Waits only when there is nothing to train on.

        Of a finished log one episode at a time, and none while a gradient step is owed.
        """
        left = self.config.num_episodes - self._num_episodes
        can_train = self._can_train
        if left <= 0 or (self._log_is_finished and (can_train or self._refilling)):
            return
        waited_before_s = self._source.waited_s
        wanted = 1 if self._log_is_finished else min(READ_EPISODES, left)
        has_other_work = can_train or self._refilling
        episodes = self._source.read(wanted, timeout_s=0.0 if has_other_work else WAIT_S)
        waited_s = self._source.waited_s - waited_before_s
        self._clock.idle_s += waited_s
        self._whole_run.idle_s += waited_s
        for episode in episodes:
            self._take_in(episode)
        self._check_waiting(is_waiting=not episodes and not has_other_work)

    def _check_waiting(self, *, is_waiting: bool) -> None:
        """Give up where nothing has come for too long."""
        if not is_waiting:
            self._waiting_since = None
            return
        now, limit_s = time.monotonic(), self.config.data_timeout_s
        self._waiting_since = self._waiting_since or now
        if limit_s is not None and now - self._waiting_since >= limit_s:
            raise UserError(
                f"learner.data_timeout_s: no episode has come for {limit_s:g} s; see what the logs of the "
                "rollout actors say, or raise it"
            )

    def _refill(self) -> None:
        """Take back what came before the checkpoint, newest first, until the ring is full or that was all."""
        episodes = self._source.read_back(READ_EPISODES, timeout_s=0.0 if self._can_train else WAIT_S)
        if episodes is None:
            return
        if episodes:
            self._put_back_drawn()
        self._refilling = bool(episodes) and all(self.mirror.prepend(episode) for episode in episodes)
        if self._refilling:
            return
        self._source.read_back(0, 0.0)
        missing = min(self.config.start_transitions, self._num_held_before) - self.mirror.num_transitions
        if missing > 0:  # The log has lost them: training begins anew when as many others have come.
            self._started = False
            self._starts_at = self.mirror.total_transitions + missing

    def _take_in(self, episode: Episode) -> None:
        self._put_back_drawn()
        self.mirror.add([episode])
        self._num_episodes += 1
        self._num_tokens += episode.num_tokens
        # All that ever came: the ring drops whole episodes, so it may never hold as many as its capacity.
        self._started |= self.mirror.total_transitions >= self._starts_at
        if self._started:
            self._limiter.earn(1)
        self._window.average(episode_statistics(episode, self._reward_weights), prefix="episode/")
        if episode.num_decisions:
            # After a crash the log has episodes by weights that were lost with the steps that led to them.
            lags_T = np.maximum(self.sac.step - episode.policy_versions_T, 0)
            self._window.average({"policy/lag_mean": float(lags_T.mean())})
            self._window.peak("policy/lag_max", float(lags_T.max()))

    def _train(self) -> None:
        began = time.monotonic()
        batch, self._drawn = self._drawn or self._draw(), None
        self._limiter.spend()
        self._num_sampled += len(batch)
        lag_mean = self.sac.step - batch.policy_versions_B.double().mean()
        try:
            metrics = self.sac.update(batch, self._draw_ahead if self.draws_ahead else None)
        except FloatingPointError as error:
            self._skip(batch, error)
            return
        self._num_skipped_in_a_row = 0
        if self.sac.errors_B is not None:
            self.mirror.learnt(batch, self.sac.errors_B)
        self._window.average(asdict(metrics), prefix="sac/")
        self._window.average({"policy/sampled_lag_mean": lag_mean})
        if self._log_is_finished:
            self._clock.held_back_s += time.monotonic() - began

    def _draw(self) -> TransitionBatch:
        return self.mirror.sample(self.config.batch_size, self._generator, torch.float32)

    def _draw_ahead(self) -> None:
        self._state_before_drawn = self._generator.get_state()
        self._drawn = self._draw()

    def _put_back_drawn(self) -> None:
        """Have the batch that was drawn ahead, if there is one, drawn again."""
        if self._drawn is not None:
            assert self._state_before_drawn is not None
            self._generator.set_state(self._state_before_drawn)
            self._drawn = None

    def _skip(self, batch: TransitionBatch, error: FloatingPointError) -> None:
        """Count a step that was not done; the next one draws another batch.

        Raises:
            FloatingPointError: there were too many in a row; the batch is in the run folder.
        """
        self._num_skipped += 1
        self._num_skipped_in_a_row += 1
        if self._num_skipped_in_a_row <= self.config.max_skipped_steps:
            return
        message = f"{error}, the last of {self._num_skipped_in_a_row} in a row that are not finite"
        if bad := self.sac.not_finite():
            message += f"; so are the parameters {', '.join(bad)}"
        if self._run_folder is not None:
            place = self._run_folder / health.BATCH_FILE
            try:
                health.save_batch(place, batch, message)
                message += f"; the batch is in {place}"
            except OSError as unsaved:
                message += f"; the batch could not be saved ({unsaved})"
        raise FloatingPointError(message) from error

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if now - self._published_at >= self.config.publish_period_s:
            self._publish()
        if self._saver is not None:
            self._saver.check()
        if now - self._saved_at >= self.config.checkpoint_period_s:
            self._save(wait=False)
        if self._clock.seconds >= self.config.log_period_s:
            self._report()

    def _publish(self) -> None:
        """Publish the agent unless this version is out already. What the store did not take stays due."""
        if self._published_version == self.sac.step and not self._is_publication_lost():
            return
        if self._weights.publish(self.sac.step, self.sac.agent.state_dict()):
            self._published_version = self.sac.step
        self._published_at = time.monotonic()

    def _is_publication_lost(self) -> bool:
        """Whether the store has forgotten the weights, as one does that was restarted. Looks now and then."""
        now = time.monotonic()
        if now - self._looked_for_publication_at < LOOK_S:
            return False
        self._looked_for_publication_at = now
        return not self._weights.holds(self.sac.step)

    def _save_before(self, error: Exception) -> None:
        """Save what was learnt before ``error`` ends the run; a failure to do so must not hide it.

        The networks are good even after a loss that is not finite: the step was not done.
        """
        if self.sac.step == 0:
            return
        try:
            self._save(wait=True)
        except Exception as other:
            error.add_note(f"the agent could not be saved either: {other}")

    def _save(self, *, wait: bool) -> None:
        """Save agent and checkpoint, in another thread unless their end is waited for."""
        self._saved_at = time.monotonic()
        if self._saver is None:
            return
        if bad := self.sac.not_finite():
            raise FloatingPointError(
                f"sac: {', '.join(bad)}: not finite after gradient step {self.sac.step}; nothing is saved "
                "over the last checkpoint"
            )
        trained = {
            "gradient_steps": self.sac.step,
            "policy_steps": self.sac.policy_steps,
            "episodes": self._num_episodes,
            "complete": self._has_ended,
        }
        # While the ring is being filled again it knows only some of its rewards: the last checkpoint stands.
        learner = None if self._refilling else self
        save = self._saver.save if wait else self._saver.begin
        save(self.sac.agent, self.sac.critic, {**self._agent_card, "training": trained}, learner)

    def _report(self) -> None:
        """Hand over one row: means since the last one, rates over that time, and totals."""
        clock, seconds = self._clock, max(self._clock.seconds, 1e-9)
        inserted, sampled = self.mirror.total_transitions, self._num_sampled
        lost = self._lost()
        row = self._window.take() | {
            "sac/target_entropy": self.config.sac.target_entropy,
            "replay/transitions": self.mirror.num_transitions,
            "replay/bytes": self.mirror.nbytes,
            "replay/insert_rate": (inserted - clock.inserted) / seconds,
            "replay/sample_rate": (sampled - clock.sampled) / seconds,
            "replay/samples_per_insert": sampled / max(inserted, 1),
            "replay/held_back_ratio": clock.held_back_ratio,
            "replay/malformed": lost["num_malformed"],
            "replay/quarantined": lost["num_quarantined"],
            "replay/trimmed_unread": lost["num_trimmed_unread"],
            "replay/duplicates": self._source.counts.num_duplicates,
            "replay/without_decisions": self.mirror.num_without_decisions,
            "learner/gradient_step": self.sac.step,
            "learner/gradient_steps_per_s": (self.sac.step - clock.gradient_steps) / seconds,
            "learner/idle_ratio": clock.idle_ratio,
            "learner/steps_owed": self._limiter.owed,
            "learner/steps_dropped": self._limiter.num_dropped,
            "learner/steps_skipped": self._num_skipped,
            "episodes/total": self._num_episodes,
            "tokens/total": self._num_tokens,
        }
        temperature = row.get("sac/temperature", 0.0)
        bound = health.return_bound(self.mirror.largest_return, temperature, self.mirror.longest_episode)
        row |= {"replay/return_bound": bound, **health.signs(row, bound)}
        self._clock = self._new_clock()
        self._on_metrics({name: float(value) for name, value in row.items()})

    def _lost(self) -> dict[str, int]:
        """What went wrong in reading the log, over the whole run."""
        counts = self._source.counts._asdict()
        return {name: self._lost_before[name] + counts[name] for name in _LOST}

    def _new_clock(self, seconds: float = 0.0) -> Clock:
        return Clock(self.sac.step, self.mirror.total_transitions, self._num_sampled, seconds)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: everything but the episodes. Tensors may be live, not copies."""
        return {
            "sac": self.sac.state_dict(),
            "mirror": self.mirror.state_dict(),
            "ring": self.mirror.ring_state(),
            "limiter": self._limiter.state_dict(),
            "sampling": self._generator.get_state() if self._drawn is None else self._state_before_drawn,
            "cursor": self._source.cursor,
            "started": self._started,
            "starts_at": self._starts_at,
            "lost": self._lost(),
            "num_skipped": self._num_skipped,
            "seconds": self._whole_run.seconds,
            "idle_s": self._whole_run.idle_s,
            "num_episodes": self._num_episodes,
            "num_tokens": self._num_tokens,
            "num_sampled": self._num_sampled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`, with a source that begins at its ``cursor``.

        The ring is not in it: :meth:`run` fills it again with what the log has from before the cursor,
        newest first, while new episodes come in, and trains once ``start_transitions`` are there, or as many
        as there were. What the log has lost of these must come anew before it trains.
        """
        self._refilling = True
        self._num_held_before = len(state["ring"]["rewards"])
        self.sac.load_state_dict(state["sac"])
        self.mirror.load_state_dict(state["mirror"])
        self.mirror.load_ring_state(state["ring"])
        self._limiter.load_state_dict(state["limiter"])
        self._generator.set_state(state["sampling"])
        self._started = state["started"]
        self._starts_at = state["starts_at"]
        self._lost_before = state["lost"]
        self._num_skipped = state["num_skipped"]
        self._before_s, self._idle_before_s = state["seconds"], state["idle_s"]
        self._num_episodes = state["num_episodes"]
        self._num_tokens = state["num_tokens"]
        self._num_sampled = state["num_sampled"]


def check_start(config: LearnerConfig, replay: ReplayConfig, shaping: ShapingConfig) -> None:
    """Refuse settings with which training could never start.

    Raises:
        UserError: the mirror is smaller than what training waits for, or the episodes are too few for their
            scores to be standardised.
    """
    if shaping.normalise == "running" and config.num_episodes < NORMALISE_FROM_EPISODES:
        raise UserError(
            f"learner.num_episodes is {config.num_episodes}, fewer than the {NORMALISE_FROM_EPISODES} that "
            "shaping.normalise=running takes for its first mean and deviation; raise it or use "
            "shaping.normalise=none"
        )
    if config.start_transitions > replay.capacity_transitions:
        raise UserError(
            f"learner.start_batches: training starts at {config.start_transitions} transitions "
            f"(start_batches {config.start_batches} × batch_size {config.batch_size}), more than "
            f"replay.capacity_transitions {replay.capacity_transitions}; lower it or raise the capacity"
        )


def learner_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"learner.device: {name!r} is not at hand here ({str(error).splitlines()[0]}); use auto or cpu"
        ) from error
