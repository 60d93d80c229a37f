"""What a user of the store does while it is away or full: try again with growing pauses, and give up."""

from __future__ import annotations

import logging
import random
import time

import redis

from mara.buffer.config import ReplayConfig
from mara.common.errors import ReplayUnavailable, UserError

_PASSING = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, redis.OutOfMemoryError)
"""What redis-py raises when the store is away, restarting, loading its log, failing over or out of memory.

The last may pass as well: a large reply on its way to somebody counts against the store's memory.
"""
_PASSING_REPLIES = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED", "BUSY ", "NORECORD")
"""Replies for which redis-py has no class of their own. The store cannot write to its disk; has lost its
replicas; or its primary; changed its part while somebody waited; runs somebody's long script; has evicted a
record before its entry came."""
_DISK = "MISCONF"

_log = logging.getLogger(__name__)


class Outage:
    """Keeps the time of one user's failed attempts.

    ``failed`` after each, ``ended`` after a success, ``pause_s`` before the next. The pause doubles from
    ``retry_first_s`` to ``retry_longest_s`` and is drawn from its upper half, so that many actors do not
    come back at the same moment.

    A store that loads its file answers, says so, and will be there: that time does not count.
    """

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self._counts_from = 0.0
        self._began_at: float | None = None
        self._retry_at = 0.0
        self._num_failures = 0
        self._jitter = random.Random()

    def failed(self, error: redis.RedisError) -> None:
        """Note a failed attempt.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
            UserError: it answers, but does not let us in, or has had no memory left, or no disk that it can
                write to, for ``max_outage_s``.
            redis.RedisError: ``error`` itself, if it is none that passes.
        """
        if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
            raise UserError(
                "replay.redis_url: the store no longer accepts the user name or password; correct them there"
            ) from error
        if not isinstance(error, _PASSING) and not any(reply in str(error) for reply in _PASSING_REPLIES):
            raise error
        now = time.monotonic()
        limit = self._config.max_outage_s
        if self._began_at is None:
            self._began_at = self._counts_from = now
            _log.warning("the replay store %s; trying again for up to %g s", _what(error), limit)
        if isinstance(error, redis.BusyLoadingError):
            self._counts_from = now
        if now - self._counts_from >= limit:
            raise self._given_up(error, now - self._began_at) from error
        pause = min(self._config.retry_longest_s, self._config.retry_first_s * 2.0**self._num_failures)
        self._num_failures = min(self._num_failures + 1, 64)
        self._retry_at = min(now + pause * self._jitter.uniform(0.5, 1.0), self._counts_from + limit)

    def _given_up(self, error: redis.RedisError, after_s: float) -> Exception:
        if isinstance(error, redis.OutOfMemoryError):
            return UserError(
                f"replay.log_max_bytes is {self._config.log_max_bytes}, and the store has had no memory left "
                f"for {after_s:.1f} s; lower it, raise the server's maxmemory or delete other data there"
            )
        if _DISK in str(error):
            return UserError(
                f"the replay store has taken no writes for {after_s:.1f} s, as it cannot write to its disk "
                f"({_reply(error)}); make room there, see the server's own log, and start the run again"
            )
        return ReplayUnavailable(f"the replay store has not answered for {after_s:.1f} s ({_reply(error)})")

    def ended(self) -> None:
        """Note a success."""
        if self._began_at is not None:
            _log.warning("the replay store can be used again after %.1f s", time.monotonic() - self._began_at)
        self._began_at = None
        self._retry_at = 0.0
        self._num_failures = 0

    @property
    def pause_s(self) -> float:
        """Seconds until the next attempt is due; 0 where there is no outage."""
        return max(0.0, self._retry_at - time.monotonic()) if self._began_at is not None else 0.0


def _what(error: redis.RedisError) -> str:
    if isinstance(error, redis.OutOfMemoryError):
        return "has no memory left"
    if _DISK in str(error):
        return f"cannot write to its disk, which may be full ({_reply(error)})"
    return f"does not answer ({_reply(error)})"


def _reply(error: redis.RedisError) -> str:
    """What went wrong, on one line, without the command: redis-py puts that, with its values, before it."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text.rpartition(" caused error: ")[2]
