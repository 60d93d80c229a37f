"""Many questions to a judge that compares, at the same time; and what becomes of those that are refused."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mara.actors.llm_judge import Comparison, LLMJudge, QuestionRefused
from mara.common.errors import UserError


class Pair(NamedTuple):
    """Two answers to a prompt."""

    dataset: str
    system: str
    against: str
    id: str
    prompt: str
    first: str
    second: str


class Refused(NamedTuple):
    """A pair that the judge's endpoint did not take."""

    why: str


MANY_REFUSED = 8
"""Questions refused of which, where none was taken, the cause is no matter of what was asked: a setting is
wrong."""


class Refusals:
    """What a judge's server refused, held back until it is known to take something: of a judge that takes
    nothing nothing is kept.

    Args:
        has_taken: whether it is known already.
    """

    def __init__(self, has_taken: bool) -> None:
        self._has_taken = has_taken
        self._held: list[Callable[[], None]] = []
        self.num = 0
        """Refused, held back or not."""
        self.said = ""
        """What the server said the first time."""

    def add(self, said: str, keep: Callable[[], None]) -> None:
        """Something was refused. ``keep`` is called as soon as that may be kept."""
        self.num += 1
        self.said = self.said or said
        self._held.append(keep)
        if self._has_taken:
            self._keep_held()

    def take(self) -> None:
        """Something was not refused."""
        self._has_taken = True
        self._keep_held()

    def settle(self, error: str) -> None:
        """Nothing more will be asked; keep what is held.

        Raises:
            UserError: ``error``: many were refused, and nothing was ever taken.
        """
        if not self._has_taken and self.num >= MANY_REFUSED:
            raise UserError(error)
        self._keep_held()

    def _keep_held(self) -> None:
        for keep in self._held:
            keep()
        self._held.clear()


class Verdicts:
    """Asks a judge about ``pairs`` from several threads, which end with the process at the latest."""

    def __init__(self, judge: LLMJudge, pairs: Sequence[Pair], num_threads: int) -> None:
        self._judge = judge
        self._stop = threading.Event()
        self._pairs: queue.SimpleQueue[Pair] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[Pair, Comparison | Refused] | BaseException] = (
            queue.SimpleQueue()
        )
        for pair in pairs:
            self._pairs.put(pair)
        for _ in range(min(num_threads, len(pairs))):
            # Daemons: a question that nobody wants answered any more must not hold up the end.
            threading.Thread(target=self._ask, daemon=True).start()

    def take(self) -> Iterator[tuple[Pair, Comparison | Refused]]:
        """What has been found since the last call. Does not wait.

        Raises:
            EndpointUnavailable, UserError: as :meth:`~mara.actors.llm_judge.LLMJudge.compare`, when all else
                that was found is handed over.
        """
        errors = []
        while not self._found.empty():
            found = self._found.get()
            if isinstance(found, BaseException):
                errors.append(found)
            else:
                yield found
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """Ask nothing more. Returns at once."""
        self._stop.set()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                pair = self._pairs.get_nowait()
            except queue.Empty:
                return
            try:
                found = self._judge.compare(pair.prompt, pair.first, pair.second, wait=self._wait)
                self._found.put((pair, found))
            except QuestionRefused as refusal:
                self._found.put((pair, Refused(str(refusal))))
            except BaseException as error:
                self._found.put(error)
                return

    def _wait(self, seconds: float) -> None:
        self._stop.wait(seconds)
