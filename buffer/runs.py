"""What the runs on a server have stored there, as somebody sees it who takes no part in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import redis

from mara.buffer.keys import keys_of


class LogLength(NamedTuple):
    """Episodes of a replay log, over all its shards."""

    num_kept: int
    """Those that can be read."""
    num_appended: int
    """All that ever came; the oldest of them made room for others."""

    @property
    def num_gone(self) -> int:
        return max(0, self.num_appended - self.num_kept)


def log_length(clients: Sequence[redis.Redis], run_id: str) -> LogLength:
    """The length of the log of run ``run_id``; ``clients`` are those of its shards, in their order.

    Raises:
        redis.RedisError: a server cannot be asked.
    """
    num_kept = num_appended = 0
    for shard, client in enumerate(clients):
        keys = keys_of(run_id, shard)
        num_kept += int(client.xlen(keys.episodes))
        appended = client.hget(keys.counts, "appended")
        num_appended += int(appended) if isinstance(appended, bytes) and appended.isdigit() else 0
    return LogLength(num_kept, num_appended)
