"""One reward model for several callers, whose conversations it scores together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch

from mara.common.contracts import Conversation, RewardModel

MOST_CONVERSATIONS = 256
"""Scored together at most: the callers wait for all of them."""


class _Call:
    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations
        self.scores: torch.Tensor | None = None
        self.error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.scores is not None or self.error is not None


class MergedCalls:
    """Scores what all callers have waiting in one go. Safe between threads; one alone uses the model."""

    def __init__(self, model: RewardModel, timeout_s: float) -> None:
        """``timeout_s``: how long a caller waits; what it asked for is not begun any more after that."""
        self._model = model
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        threading.Thread(target=self._work, name="reward model", daemon=True).start()

    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return float32 [B], as the model does for these conversations.

        Raises:
            TimeoutError: the model took longer than ``timeout_s``.
            Exception: what the model raised for them.
        """
        call = _Call(conversations)
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
            self._changed.wait_for(lambda: call.is_done, self._timeout_s)
            if call in self._waiting:
                self._waiting.remove(call)
        if call.error is not None:
            raise call.error
        if call.scores is None:
            raise TimeoutError(f"no scores within {self._timeout_s:g} s")
        return call.scores

    def _work(self) -> None:
        while True:
            calls = self._next_calls()
            if not self._try_to_score(calls) and len(calls) > 1:
                for call in calls:  # One of them has spoilt it for the others.
                    self._try_to_score([call])
            with self._changed:
                self._changed.notify_all()

    def _next_calls(self) -> list[_Call]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            calls = [self._waiting.popleft()]
            count = len(calls[0].conversations)
            while self._waiting and count + len(self._waiting[0].conversations) <= MOST_CONVERSATIONS:
                calls.append(self._waiting.popleft())
                count += len(calls[-1].conversations)
            return calls

    def _try_to_score(self, calls: Sequence[_Call]) -> bool:
        """Whether the model scored all of ``calls``; if there is one alone, it has the error."""
        try:
            scores_B = self._model.score([one for call in calls for one in call.conversations])
            parts = torch.split(scores_B, [len(call.conversations) for call in calls])
        except Exception as error:
            if len(calls) == 1:
                calls[0].error = error
            return False
        for call, scores in zip(calls, parts, strict=True):
            call.scores = scores
        return True
