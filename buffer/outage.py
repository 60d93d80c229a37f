"""What a user of the store does while it is away or full: try again with growing pauses, and give up."""

from __future__ import annotations

import logging
import random
import time

import redis

from mara.buffer.config import ReplayConfig
from mara.common.errors import ReplayUnavailable, UserError

AWAY = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, redis.OutOfMemoryError)
"""What redis-py raises when the store is away, restarting, loading its log, failing over or out of memory.

The last may pass as well: a large reply on its way to somebody counts against the store's memory.
"""

_log = logging.getLogger(__name__)


class Outage:
    """Keeps the time of one user's failed attempts.

    ``failed`` after each, ``ended`` after a success, ``pause_s`` before the next. The pause doubles from
    ``retry_first_s`` to ``retry_longest_s`` and is drawn from its upper half, so that many actors do not
    come back at the same moment.
    """

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self._began_at: float | None = None
        self._retry_at = 0.0
        self._num_failures = 0
        self._jitter = random.Random()

    def failed(self, error: redis.RedisError) -> None:
        """Note a failed attempt.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
            UserError: it answers, but does not let us in, or has had no memory left for ``max_outage_s``.
        """
        if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
            raise UserError(
                "replay.redis_url: the store no longer accepts the user name or password; correct them there"
            ) from error
        now = time.monotonic()
        limit = self._config.max_outage_s
        is_full = isinstance(error, redis.OutOfMemoryError)
        if self._began_at is None:
            self._began_at = now
            what = "has no memory left" if is_full else f"does not answer ({error})"
            _log.warning("the replay store %s; trying again for up to %g s", what, limit)
        if now - self._began_at >= limit and is_full:
            raise UserError(
                f"replay.log_max_bytes is {self._config.log_max_bytes}, and the store has had no memory left "
                f"for {now - self._began_at:.1f} s; lower it, raise the server's maxmemory or delete other "
                "data there"
            ) from error
        if now - self._began_at >= limit:
            raise ReplayUnavailable(
                f"the replay store has not answered for {now - self._began_at:.1f} s ({error})"
            ) from error
        pause = min(self._config.retry_longest_s, self._config.retry_first_s * 2.0**self._num_failures)
        self._num_failures = min(self._num_failures + 1, 64)
        self._retry_at = min(now + pause * self._jitter.uniform(0.5, 1.0), self._began_at + limit)

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
