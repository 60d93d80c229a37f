"""The scores of finished answers by reward models in other processes, fetched beside the decoding.

::

    rollout loop ── answers, at once ──► waiting ──► thread ──► reward models ──► Episode ──► EpisodeSink
                                            └ too many: the oldest are dropped
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch

from mara.actors.reward_models.function import FunctionFailed
from mara.common.contracts import Conversation, RewardModel
from mara.common.episode import Episode
from mara.common.errors import UserError

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 64
"""Answers that are sent to the reward models together, at most."""
MOST_FAILURES = 3
"""Calls in which a function that has never given a score may fail in the same way: that is its code, no
outage."""


class Judge(NamedTuple):
    """A reward model that is asked from another thread than the one that decodes."""

    model: RewardModel
    max_outage_s: float
    """How long it may give no score at all before the actor gives up, seconds."""


class Unscored(NamedTuple):
    """A finished answer: its episode, which has the scores of the heads, and its text."""

    episode: Episode
    conversation: Conversation


class Scorer:
    """Gets the scores of finished answers and hands their episodes over. The rollout loop never waits for it.

    All judges are asked at the same time. An episode that lacks a score is dropped and counted. If more than
    ``capacity`` answers wait, the oldest are dropped and counted: they are of the oldest policy.
    """

    def __init__(
        self, judges: Mapping[str, Judge], hand_over: Callable[[Sequence[Episode]], None], capacity: int
    ) -> None:
        """``hand_over`` is called from the thread of the scorer; what it raises ends the scorer."""
        self._judges = judges
        self._hand_over = hand_over
        self._capacity = capacity
        self._changed = threading.Condition()
        self._waiting: deque[Unscored] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._num_failed = 0
        self._num_dropped = 0
        self._failing_since: dict[str, float] = {}
        self._told: set[tuple[str, str]] = set()
        self._has_scored: set[str] = set()
        self._failures: dict[str, tuple[str, int]] = {}
        """Function that has never given a score → how it failed last, and how often in a row."""
        self._pool = ThreadPoolExecutor(len(judges), "reward")
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)
        self._thread.start()

    def submit(self, answers: Sequence[Unscored]) -> None:
        """Take over finished answers. Returns at once.

        Raises:
            UserError: a judge has given no score for longer than it may, or a function fails each time.
            BaseException: what else ended the scorer.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting += answers
            while len(self._waiting) > self._capacity:
                self._waiting.popleft()
                self._num_dropped += 1
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """End the thread; what is not scored by then is lost. Waits for at most ``timeout_s``."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def num_failed(self) -> int:
        """Episodes dropped because a score failed."""
        return self._num_failed

    @property
    def metrics(self) -> dict[str, float]:
        """``rewards/dropped``, answers given up because too many waited; ``rewards/waiting`` now."""
        with self._changed:
            return {"rewards/dropped": self._num_dropped, "rewards/waiting": len(self._waiting)}

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._score(batch)
        except BaseException as error:
            with self._changed:
                self._error = error

    def _next_batch(self) -> list[Unscored]:
        """Answers to score now, waited for; none once the scorer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            count = min(len(self._waiting), MOST_AT_ONCE)
            return [self._waiting.popleft() for _ in range(count)]

    def _score(self, batch: Sequence[Unscored]) -> None:
        conversations = [answer.conversation for answer in batch]
        asked_at = time.monotonic()
        asked = {
            name: self._pool.submit(one.model.score, conversations) for name, one in self._judges.items()
        }
        scores = {name: self._result(name, future, len(batch), asked_at) for name, future in asked.items()}
        episodes = []
        for index, (episode, _) in enumerate(batch):
            its = {name: float(scores_B[index]) for name, scores_B in scores.items()}
            if all(torch.tensor(list(its.values())).isfinite()):
                episodes.append(replace(episode, scores=episode.scores | its))
        with self._changed:
            self._num_failed += len(batch) - len(episodes)
            if self._closed:
                return
        if episodes:
            self._hand_over(episodes)

    def _result(self, name: str, future: Future[torch.Tensor], count: int, asked_at: float) -> torch.Tensor:
        """The scores of judge ``name``, float32 [B]; NaN where there is none.

        Raises:
            UserError: it has given none for longer than it may, or is a function that fails each time.
        """
        why = "some scores are not finite"
        try:
            scores_B = future.result()
            assert scores_B.shape == (count,), f"{tuple(scores_B.shape)} scores for {count} conversations"
        except FunctionFailed as error:
            why = str(error)
            scores_B = torch.full((count,), torch.nan)
            self._count_failure(name, why)
        except Exception as error:
            why = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            scores_B = torch.full((count,), torch.nan)
        if scores_B.isfinite().any():
            self._has_scored.add(name)
        if scores_B.isfinite().all():
            self._failing_since.pop(name, None)
            return scores_B
        kind = why.partition(":")[0]
        if (name, kind) not in self._told:
            self._told.add((name, kind))
            logger.warning(
                "rewards.%s: dropped episodes without its score (%s); further ones are counted as "
                "rollout/scores_failed",
                name,
                why,
            )
        if scores_B.isfinite().any():
            self._failing_since.pop(name, None)
            return scores_B
        since = self._failing_since.setdefault(name, asked_at)
        longest_s = self._judges[name].max_outage_s
        if time.monotonic() - since > longest_s:
            raise UserError(
                f"rewards.{name}: no score for {time.monotonic() - since:.0f} s ({why}); look at that, or "
                f"raise rewards.{name}.max_outage_s={longest_s:g}"
            )
        return scores_B

    def _count_failure(self, name: str, why: str) -> None:
        """The function ``name`` has failed.

        Raises:
            UserError: it has done so each time, in the same way.
        """
        kind = why.partition(":")[0]
        before, count = self._failures.get(name, (kind, 0))
        count = count + 1 if kind == before else 1
        self._failures[name] = kind, count
        if count >= MOST_FAILURES and name not in self._has_scored:
            raise UserError(
                f"rewards.{name}: its function fails each time ({why}); mend it; the log of its process has "
                "the traceback"
            )
