"""Reading the replay log in a thread of its own, so that the training loop never waits for the store.

::

    store ── read, decode ──► queue (bounded in bytes) ── read ──► training loop
             reader's thread                              caller's thread
"""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import Self

from mara.buffer.config import READ_AHEAD_BYTES
from mara.common.contracts import LogReader, ReadCounts
from mara.common.episode import Episode

_POLL_S = 0.1
"""How long one read of the log may wait: within it the thread hears that it should end."""
_CLOSE_S = 5.0


class BackgroundReader:
    """An :class:`~mara.common.contracts.EpisodeSource` that reads ahead from another, which it has to itself.

    Differs from the source it wraps in one thing: :meth:`read` returns what has been read ahead, which may be
    less than what the log has. Called from one thread; :meth:`close` it, or use it in ``with``.
    """

    def __init__(
        self, source: LogReader, max_bytes: int = READ_AHEAD_BYTES, *, log_is_finished: bool = False
    ) -> None:
        """Begin to read ``source`` from where it stands.

        Args:
            max_bytes: episodes read ahead before the thread waits, and as much of older ones. A single
                episode may be larger.
            log_is_finished: nobody appends to the log, so that it has an end.
        """
        self._source = source
        self._max_bytes = max_bytes
        self._log_is_finished = log_is_finished
        self._changed = threading.Condition()
        self._queue: deque[tuple[Episode, str]] = deque()  # with the cursor behind each
        self._queued_bytes = 0
        self._cursor = source.cursor
        self._at_end = False
        self._older: deque[Episode] = deque()
        self._older_bytes = 0
        self._wants_older = False
        self._has_all_older = False
        self._error: BaseException | None = None
        self._closing = False
        self._waited_s = 0.0
        self._thread = threading.Thread(target=self._run, name="replay reader", daemon=True)
        self._thread.start()

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        """Return up to ``max_episodes`` of the episodes read ahead; waits at most ``timeout_s`` for the
        first.

        Raises whatever reading the log raised, once all that was read before has been handed out.
        """
        with self._changed:
            if not self._queue and timeout_s > 0:
                began = time.monotonic()
                self._changed.wait_for(lambda: self._queue or self._has_ended or self._at_end, timeout_s)
                self._waited_s += time.monotonic() - began
            if not self._queue and self._error is not None:
                raise self._error
            episodes: list[Episode] = []
            while self._queue and len(episodes) < max_episodes:
                episode, self._cursor = self._queue.popleft()
                self._queued_bytes -= episode.nbytes
                episodes.append(episode)
            self._changed.notify_all()
        return episodes

    def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode] | None:
        """Return up to ``max_episodes`` episodes from before the first cursor, newest first, then older ones.

        The thread fetches them from the first call on, in turn with new ones. Empty where there are none;
        None where the thread has none yet, after ``timeout_s``. Raises whatever reading the log raised.
        """
        with self._changed:
            self._wants_older = max_episodes > 0
            self._changed.notify_all()
            if not self._wants_older:
                self._older.clear()
                self._older_bytes = 0
                return []
            if not self._older and timeout_s > 0:
                self._changed.wait_for(
                    lambda: self._older or self._has_all_older or self._has_ended, timeout_s
                )
            episodes: list[Episode] = []
            while self._older and len(episodes) < max_episodes:
                episodes.append(self._older.popleft())
                self._older_bytes -= episodes[-1].nbytes
            self._changed.notify_all()
            if not episodes and self._error is not None:
                raise self._error
            return episodes if episodes or self._has_all_older else None

    def at_end(self) -> bool:
        """Whether the log is finished, read to its end and handed out. Returns at once."""
        with self._changed:
            return self._at_end and not self._queue

    def close(self) -> None:
        """End the thread, within a tenth of a second unless the store hangs. What was read ahead is lost."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def cursor(self) -> str:
        """Behind the last episode handed out, however far the thread has read."""
        return self._cursor

    @property
    def counts(self) -> ReadCounts:
        """Those of the source: as far as the thread has read."""
        return self._source.counts

    @property
    def waited_s(self) -> float:
        """Seconds in which :meth:`read` waited: for an episode to come, or for the thread to decode it."""
        return self._waited_s

    @property
    def _has_ended(self) -> bool:
        """Whether the thread does nothing more."""
        return self._error is not None or self._closing

    @property
    def _takes_new(self) -> bool:
        return not self._at_end and self._queued_bytes < self._max_bytes

    @property
    def _takes_older(self) -> bool:
        return self._wants_older and not self._has_all_older and self._older_bytes < self._max_bytes

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._takes_new or self._takes_older)
                    takes_new, takes_older = self._takes_new, self._takes_older
                    if self._closing:
                        return
                if takes_new:
                    self._fetch_new(timeout_s=0.0 if takes_older else _POLL_S)
                if takes_older:
                    self._fetch_older()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fetch_new(self, timeout_s: float) -> None:
        # One at a time: the cursor of the source is then that of the episode.
        episodes = self._source.read(1, timeout_s)
        is_at_end = not episodes and self._log_is_finished and self._source.at_end()
        with self._changed:
            for episode in episodes:
                self._queue.append((episode, self._source.cursor))
                self._queued_bytes += episode.nbytes
            self._at_end = is_at_end
            self._changed.notify_all()

    def _fetch_older(self) -> None:
        episodes = self._source.read_back(1, _POLL_S)
        with self._changed:
            if episodes is None or not self._wants_older:
                return
            self._has_all_older = not episodes
            self._older.extend(episodes)
            self._older_bytes += sum(episode.nbytes for episode in episodes)
            self._changed.notify_all()
