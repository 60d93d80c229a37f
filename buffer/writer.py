"""The writer of a rollout actor: a bounded buffer and a thread that empties it into the log.

::

    actor ── append, at once ──► waiting ──► being sent ──► RedisEpisodeLog ──► store
                                    │   ◄── not stored ──┘
                                    └ too many bytes: the oldest are dropped
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from mara.buffer.config import APPEND_BYTES
from mara.buffer.log import Record, RedisEpisodeLog, make_record, take_batch
from mara.common.episode import Episode


class BufferedSink:
    """An :class:`~mara.common.contracts.EpisodeSink` that never waits for the store. Safe between threads.

    Episodes reach the log in the order in which they were appended, each once, later. While the store is away
    or slower than the actor they stay in memory; beyond ``max_bytes`` the oldest are dropped, and counted.
    Those being sent at that moment are not, since they may be stored already, nor is the newest, however
    large it is.

    The log must not be used by anybody else. Its errors end the writer and are raised by the next ``append``.
    """

    def __init__(self, log: RedisEpisodeLog, max_bytes: int) -> None:
        self._log = log
        self._max_bytes = max_bytes
        # A batch must leave room for others, or a small buffer would drop all that comes while it is sent.
        self._batch_bytes = min(APPEND_BYTES, max_bytes // 2)
        self._changed = threading.Condition()
        self._waiting: deque[Record] = deque()
        self._sending: list[Record] = []
        self._num_bytes = 0
        self._num_dropped = 0
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="episode writer", daemon=True)
        self._thread.start()

    def append(self, episodes: Sequence[Episode]) -> None:
        """Take over the episodes; they are stored later. Returns at once.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``; the writer has given up.
            UserError: it has had no memory left for as long, or no longer lets us in.
        """
        records = [make_record(episode) for episode in episodes]
        with self._changed:
            if self._error is not None:
                raise self._error
            assert not self._closed, "the sink is closed"
            for record in records:
                self._waiting.append(record)
                self._num_bytes += record.nbytes
                self._drop_oldest()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything appended so far is stored, at most ``timeout_s``; whether it is.

        False, too, if the writer has given up, or if some of it was dropped meanwhile.
        """
        with self._changed:
            dropped_before = self._num_dropped
            self._changed.wait_for(lambda: self._is_empty or self._error is not None, timeout_s)
            return self._is_empty and self._num_dropped == dropped_before

    def close(self, timeout_s: float) -> bool:
        """Store what is left, for at most ``timeout_s``; whether all is stored. The rest counts as dropped.

        Raises nothing: at the end of an actor there is nobody left to be told. Does nothing twice.
        """
        all_stored = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._num_dropped += len(self._waiting) + len(self._sending)
            self._waiting.clear()
            self._sending = []
            self._num_bytes = 0
            self._changed.notify_all()
        return all_stored

    @property
    def metrics(self) -> dict[str, float]:
        """``replay/dropped``, episodes that were never stored, and ``replay/buffered_bytes`` now."""
        with self._changed:
            return {"replay/dropped": self._num_dropped, "replay/buffered_bytes": self._num_bytes}

    @property
    def _is_empty(self) -> bool:
        return not self._waiting and not self._sending

    def _drop_oldest(self) -> None:
        while self._num_bytes > self._max_bytes and len(self._waiting) > 1:
            self._num_bytes -= self._waiting.popleft().nbytes
            self._num_dropped += 1

    def _write(self) -> None:
        """The thread: send what waits, batch by batch, until the sink is closed or the log gives up."""
        try:
            while batch := self._next_batch():
                stored = self._log.store(batch)
                with self._changed:
                    self._settle(stored)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._settle(stored=False)
                self._error = error
                self._changed.notify_all()

    def _next_batch(self) -> list[Record]:
        """What is sent next, as soon as there is some and an attempt is due; none once the sink is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            attempt_at = time.monotonic() + self._log.pause_s
            while not self._closed and (left_s := attempt_at - time.monotonic()) > 0:
                self._changed.wait(left_s)
            if not self._closed:
                self._sending = take_batch(self._waiting, self._batch_bytes)
            return self._sending

    def _settle(self, stored: bool) -> None:
        """Forget what was being sent, or put it back in front."""
        if stored:
            self._num_bytes -= sum(record.nbytes for record in self._sending)
        else:
            self._waiting.extendleft(reversed(self._sending))
        self._sending = []
        self._drop_oldest()
