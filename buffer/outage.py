"""What a user of the store does while it is away: try again with growing pauses, and give up in the end."""

from __future__ import annotations

import logging
import random
import time

import redis

from mara.buffer.config import ReplayConfig
from mara.common.errors import ReplayUnavailable, UserError

AWAY = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError)
"""What redis-py raises when the store is away, restarting, loading its log or failing over."""

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
            UserError: it answers, but does not let us in.
        """
        if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
            raise UserError(
                "replay.redis_url: the store no longer accepts the user name or password; correct them there"
            ) from error
        now = time.monotonic()
        limit = self._config.max_outage_s
        if self._began_at is None:
            self._began_at = now
            _log.warning("the replay store does not answer (%s); trying again for up to %g s", error, limit)
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
            _log.warning("the replay store answers again after %.1f s", time.monotonic() - self._began_at)
        self._began_at = None
        self._retry_at = 0.0
        self._num_failures = 0

    @property
    def pause_s(self) -> float:
        """Seconds until the next attempt is due; 0 where there is no outage."""
        return max(0.0, self._retry_at - time.monotonic()) if self._began_at is not None else 0.0
