"""The processes of a comparison: chunks of work go to whoever is free, and back in line when one dies."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from mara.common.errors import UserError
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.comparison.host import HostSpec, Model, Work
from mara.deploy.exit import RunFailed
from mara.deploy.process import LOADING, Ended

if TYPE_CHECKING:
    from mara.deploy.topology import Handle

SILENT_AFTER_S = 60.0


class Places(Protocol):
    """Where processes are started: the cluster."""

    def place_comparison(self, spec: HostSpec) -> Handle: ...
    def resources(self) -> dict[str, float]: ...


class _Member:
    """A process and the chunk that it works on."""

    def __init__(self, spec: HostSpec, handle: Handle, num_lives: int = 1) -> None:
        self.spec, self.handle, self.num_lives = spec, handle, num_lives
        self.work: Work | None = None
        self.done: set[tuple[str, str]] = set()
        """(system, prompt id) of its chunk that it has handed in."""
        self.model: Model | None = None
        """The last one that it was asked to load."""
        self.num_chunks = 0
        self.since_s = time.monotonic()
        """Of its last report, or of its start."""
        self.warned = False

    def give(self, work: Work) -> None:
        self.work, self.done, self.model = work, set(), work.model
        self.handle.tell("give", work)


class Crew:
    """Owns the processes. Called from one thread; no call waits for a process.

    Args:
        take: called with each row that is found, and the work that it belongs to.
        say: shows a line that stays.
    """

    def __init__(
        self,
        places: Places,
        config: ComparisonConfig,
        specs: Iterable[HostSpec],
        take: Callable[[Work, dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self._places, self._config, self._take, self._say = places, config, take, say
        self._members = [_Member(spec, places.place_comparison(spec)) for spec in specs]
        self._waiting: deque[Work] = deque()
        self._attempts: Counter[int] = Counter()
        self.num_restarts = 0

    def add(self, works: Iterable[Work]) -> None:
        """Put chunks in line."""
        self._waiting.extend(works)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nobody works."""
        return not self._waiting and all(member.work is None for member in self._members)

    @property
    def num_tokens(self) -> float:
        """Tokens that the living processes have made."""
        reports = [member.handle.report for member in self._members]
        return sum(
            report.metrics.get("rollout/tokens_total", 0.0) for report in reports if report is not None
        )

    @property
    def num_started(self) -> int:
        return sum(member.handle.report is not None for member in self._members)

    @property
    def num_loading(self) -> int:
        reports = [member.handle.report for member in self._members]
        return sum(report is not None and report.phase == LOADING for report in reports)

    def poll(self) -> None:
        """Hear every process, take what they found, replace what died, hand out work.

        Raises:
            UserError: a process found a mistake in the settings.
            RunFailed: too many died, one chunk ended several, or there is no room for any.
        """
        for place, member in enumerate(self._members):
            ended = member.handle.poll()
            for row in member.handle.take_rows():
                self._receive(member, row)
            if ended is not None:
                self._members[place] = self._replaced(member, ended)
            else:
                self._check_silence(member)
        for member in self._members:
            if member.work is None and member.handle.report is not None and self._waiting:
                member.give(self._next_for(member))

    def kill(self) -> None:
        """End every process at once."""
        for member in self._members:
            member.handle.kill()

    def _receive(self, member: _Member, row: dict[str, Any]) -> None:
        work = member.work
        assert work is not None and row["work"] == work.number
        if row.get("is_done"):
            member.work = None
            member.num_chunks += 1
            return
        member.done.add((row["system"], row["row"]["id"]))
        self._take(work, row)

    def _next_for(self, member: _Member) -> Work:
        """The first chunk for the model that it has loaded, else the first of all."""
        place = next((n for n, work in enumerate(self._waiting) if work.model == member.model), 0)
        work = self._waiting[place]
        del self._waiting[place]
        return work

    def _replaced(self, member: _Member, ended: Ended) -> _Member:
        """A new process in the place of one that ended. What it had not handed in goes back in line."""
        why = ended.tell(member.spec.name, member.spec.log_file)
        if ended.error is not None and isinstance(ended.error, UserError):
            raise ended.error
        if ended.error is not None and member.num_chunks == 0 and not member.done:
            raise RunFailed(f"{why}; it never worked; see {member.spec.log_file}")
        self._put_back(member, why)
        if self.num_restarts >= self._config.ray.max_actor_restarts:
            raise RunFailed(
                f"{why}; {self.num_restarts} actors were replaced already (ray.max_actor_restarts); see "
                f"{member.spec.log_file}"
            )
        self.num_restarts += 1
        member.handle.kill()
        base = (
            member.spec.name.removesuffix(f"-{member.num_lives - 1}")
            if member.num_lives > 1
            else member.spec.name
        )
        name = f"{base}-{member.num_lives}"
        spec = replace(member.spec, name=name)
        self._say(f"{why}; {name} takes its place")
        return _Member(spec, self._places.place_comparison(spec), member.num_lives + 1)

    def _put_back(self, member: _Member, why: str) -> None:
        if member.work is None or (left := member.work.without(member.done)) is None:
            return
        self._attempts[left.number] += 1
        if self._attempts[left.number] >= self._config.max_attempts:
            first = left.questions[0]
            raise RunFailed(
                f"{why}, as did {self._attempts[left.number] - 1} others with the same {len(left.questions)} "
                f"prompts of datasets.{left.dataset} (the first: {first.id!r}, for systems.{first.system}); "
                f"see {member.spec.log_file}"
            )
        self._waiting.appendleft(left)

    def _check_silence(self, member: _Member) -> None:
        """Warn once of a process that does not answer; give up where none ever got a place."""
        now_s = time.monotonic()
        if member.handle.heard:
            member.since_s, member.warned = now_s, False
        silent_s = now_s - member.since_s
        timeout_s = self._config.ray.start_timeout_s
        if member.handle.report is None and silent_s > timeout_s:
            amounts = ", ".join(
                f"{self._places.resources().get(name, 0):g} {name}" for name in ("CPU", "GPU")
            )
            raise RunFailed(
                f"{member.spec.name} found no place in {timeout_s:g} s (ray.start_timeout_s); the cluster "
                f"has {amounts}"
            )
        if silent_s > SILENT_AFTER_S and not member.warned:
            member.warned = True
            self._say(
                f"{member.spec.name} has not answered for {SILENT_AFTER_S:g} s; see {member.spec.log_file}"
            )
