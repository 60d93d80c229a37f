"""Keeps the processes of a run going: places them, replaces rollout actors that die, says when it is over.

What a death means is decided here and nowhere else. A rollout actor is replaced and its episodes in progress
are lost. A reward model that dies is started again by Ray; the episodes that waited for its scores are lost.
The learner is not replaced: its death ends the run, which keeps its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from mara.common.errors import UserError
from mara.deploy.config import RunConfig
from mara.deploy.exit import RunFailed
from mara.deploy.fleet import Rates, fleet_metrics
from mara.deploy.learner_host import LearnerSpec
from mara.deploy.process import RUNNING, WAITING, Ended
from mara.deploy.progress import StoppedEarly
from mara.deploy.reward_host import RewardSpec
from mara.deploy.rollout_host import RemoteModel, RolloutSpec
from mara.deploy.run_folder import what_is_saved
from mara.learner.loop import LearnerSummary

if TYPE_CHECKING:
    from mara.deploy.topology import Handle, RewardHandle

SILENT_AFTER_S = 30.0


class Places(Protocol):
    """Where processes are started: the cluster."""

    def place_learner(self, spec: LearnerSpec) -> Handle: ...
    def place_rollout(self, spec: RolloutSpec) -> Handle: ...
    def place_reward(self, spec: RewardSpec) -> RewardHandle: ...
    def remote_models(
        self, config: RunConfig, handles: Mapping[str, Sequence[RewardHandle]]
    ) -> Mapping[str, RemoteModel]: ...
    def resources(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Status:
    """The run as a whole, now."""

    rows: list[dict[str, float]]
    """New rows of the learner's record."""
    metrics: dict[str, float]
    """The rollout actors together, and how many there are."""
    phases: dict[str, str]
    """What each process is doing, by name."""
    summary: LearnerSummary | None
    """What the learner returned, once it is done."""


class _Member:
    """A process that should be there, through all its replacements."""

    def __init__(self, spec: LearnerSpec | RolloutSpec | RewardSpec, handle: Handle) -> None:
        self.spec = spec
        self.handle = handle
        self.num_restarts = 0
        self.placed_at = self.heard_at = time.monotonic()
        self.warned = False

    def replaced_by(self, spec: RolloutSpec, handle: Handle) -> None:
        self.spec, self.handle = spec, handle
        self.num_restarts += 1
        self.placed_at = self.heard_at = time.monotonic()
        self.warned = False

    @property
    def was_running(self) -> bool:
        report = self.handle.report
        return report is not None and report.phase == RUNNING


class _RewardMember(_Member):
    """A process of a reward model."""

    def __init__(self, spec: RewardSpec, handle: RewardHandle) -> None:
        super().__init__(spec, handle)
        self.reward = spec.reward
        self.reward_handle = handle


class Supervisor:
    """Owns the learner, the rollout actors and the reward models' processes.

    Called from one thread; no call waits for a process.
    """

    def __init__(
        self,
        places: Places,
        learner: LearnerSpec,
        rollouts: Sequence[RolloutSpec],
        say: Callable[[str], None],
        rewards: Sequence[RewardSpec] = (),
    ) -> None:
        self._places = places
        self._config = learner.config
        self._say = say
        self._base_names = [spec.name for spec in rollouts]
        self._learner = _Member(learner, places.place_learner(learner))
        self._rewards = [_RewardMember(spec, places.place_reward(spec)) for spec in rewards]
        if self._rewards:
            handles: dict[str, list[RewardHandle]] = {}
            for member in self._rewards:
                handles.setdefault(member.reward, []).append(member.reward_handle)
            models = places.remote_models(self._config, handles)
            rollouts = [replace(spec, reward_models=models) for spec in rollouts]
        self._rollouts = [_Member(spec, places.place_rollout(spec)) for spec in rollouts]
        self._retired: list[dict[str, float]] = []
        self._stopping = False
        self._rates = Rates()

    @property
    def num_restarts(self) -> int:
        return sum(member.num_restarts for member in self._rollouts)

    def poll(self) -> Status:
        """Hear every process, replace what died, and say how things stand.

        Raises:
            UserError: a process found a mistake in the settings.
            StoppedEarly: the learner was stopped before it began.
            RunFailed: the learner died, or too many rollout actors or reward models did, or there is no room
                for a process.
        """
        summary = self._poll_learner()
        for reward in self._rewards:
            self._poll_reward(reward)
        for index, member in enumerate(self._rollouts):
            ended = member.handle.poll()
            if ended is not None and not self._stopping:
                self._replace(index, member, ended)
            self._check_silence(member)
        return Status(
            rows=self._learner.handle.take_rows(),
            metrics=self._fleet(),
            phases={
                m.handle.name: m.handle.report.phase if m.handle.report else WAITING
                for m in (self._learner, *self._rewards, *self._rollouts)
            },
            summary=summary,
        )

    def request_stop(self, *, learner: bool) -> None:
        """Ask the rollout actors, and the learner too if ``learner``, to end. Deaths no longer matter."""
        self._stopping = True
        if learner:
            self._learner.handle.request_stop()
        for member in self._rollouts:
            member.handle.request_stop()

    def last_rows(self, timeout_s: float) -> list[dict[str, float]]:
        """The rows the learner wrote at its very end, waited for."""
        for _ in range(2):  # The report on its way may be from before the end, the one after it is not.
            self._learner.handle.wait_for_report(timeout_s)
        return self._learner.handle.take_rows()

    def agent_files(self, timeout_s: float) -> dict[str, bytes]:
        """Content of the saved agent's files, from the learner's machine."""
        return self._learner.handle.call("agent_files", timeout_s) or {}

    def wait_for_actors(self, timeout_s: float) -> None:
        """Give the rollout actors, which were asked to stop, the time to put away what they share."""
        deadline = time.monotonic() + timeout_s
        left = [member.handle for member in self._rollouts]
        while (left := [handle for handle in left if handle.poll() is None]) and time.monotonic() < deadline:
            time.sleep(0.05)

    def kill(self) -> None:
        """End every process at once."""
        for member in (self._learner, *self._rollouts, *self._rewards):
            member.handle.kill()

    def _poll_reward(self, member: _RewardMember) -> None:
        """Hear the process of a reward model; tell of a new one in its place.

        Raises:
            RunFailed: it cannot be loaded, or dies again and again.
        """
        handle = member.reward_handle
        ended = handle.poll()
        if self._stopping:
            return
        if ended is not None:
            raise self._failure(member, ended, "the reward model could not be loaded")
        if handle.num_restarts > member.num_restarts:
            member.num_restarts = handle.num_restarts
            self._say(f"{handle.name} died and was started again; answers it was to score are dropped")
            if member.num_restarts > (limit := self._config.ray.max_actor_restarts):
                raise RunFailed(
                    f"{handle.name} died {member.num_restarts} times, more than {limit} "
                    f"(ray.max_actor_restarts); see {member.spec.log_file}"
                )
        self._check_silence(member)

    def _poll_learner(self) -> LearnerSummary | None:
        member = self._learner
        ended = member.handle.poll()
        self._check_silence(member)
        if ended is None:
            return None
        if ended.error is None and not ended.died:
            assert isinstance(ended.result, LearnerSummary)
            return ended.result
        # Of a process that is gone nothing else is known, and its log may be empty.
        how = "it was killed, or crashed, or memory ran out; " if ended.died else ""
        raise self._failure(member, ended, f"{how}the run ends; {what_is_saved(member.spec.folder)}")

    def _replace(self, index: int, member: _Member, ended: Ended) -> None:
        """Put a new rollout actor in the place of one that ended."""
        limit = self._config.ray.max_actor_restarts
        if ended.error is not None and (isinstance(ended.error, UserError) or not member.was_running):
            raise self._failure(member, ended, "it never ran")
        if self.num_restarts >= limit:
            raise self._failure(
                member, ended, f"{limit} rollout actors were replaced already (ray.max_actor_restarts)"
            )
        why = ended.tell(member.handle.name, member.spec.log_file)
        if member.handle.report is not None:
            self._retired.append(member.handle.report.metrics)
        member.handle.kill()
        assert isinstance(member.spec, RolloutSpec)
        spec = replace(member.spec, name=f"{self._base_names[index]}-{member.num_restarts + 1}")
        member.replaced_by(spec, self._places.place_rollout(spec))
        self._say(f"{why}; {spec.name} takes its place")

    def _failure(self, member: _Member, ended: Ended, consequence: str) -> BaseException:
        if isinstance(ended.error, UserError | StoppedEarly):
            return ended.error
        why = ended.tell(member.handle.name, member.spec.log_file)
        return RunFailed(f"{why}; {consequence}; see {member.spec.log_file}")

    def _check_silence(self, member: _Member) -> None:
        """Warn once of a process that does not answer; give up on one that never got a place."""
        now = time.monotonic()
        if member.handle.heard:
            member.heard_at, member.warned = now, False
            return
        if member.handle.report is None and now - member.placed_at > self._config.ray.start_timeout_s:
            raise RunFailed(
                f"{member.handle.name} found no place in {self._config.ray.start_timeout_s:g} s "
                f"(ray.start_timeout_s); the cluster has {_amounts(self._places.resources())}"
            )
        if member.handle.report is not None and now - member.heard_at > SILENT_AFTER_S and not member.warned:
            member.warned = True
            self._say(
                f"{member.handle.name} has not answered for {SILENT_AFTER_S:g} s; see {member.spec.log_file}"
            )

    def _fleet(self) -> dict[str, float]:
        reports = [m.handle.report for m in self._rollouts]
        live = [report.metrics for report in reports if report is not None and report.metrics]
        metrics = fleet_metrics(live, self._retired)
        metrics |= self._rates.update(metrics, ("rollout/tokens", "rollout/episodes", "rollout/passes"))
        metrics["actors/alive"] = float(sum(report is not None for report in reports))
        metrics["actors/restarted"] = float(self.num_restarts)
        if self._rewards:
            metrics["rewards/restarted"] = float(sum(member.num_restarts for member in self._rewards))
        return metrics


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
