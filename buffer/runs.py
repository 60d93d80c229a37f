"""What the runs on a server keep there, as somebody sees it who takes no part in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import redis

from mara.buffer.keys import keys_of

_DELETE_AT_A_TIME = 100


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


class StoredRun(NamedTuple):
    """The keys of one run on one server."""

    run_id: str
    num_episodes: int
    num_bytes: int
    """Of its episodes and weights."""
    last_episode_s: float | None
    """Unix time at which the newest episode came, by the server's clock; None where there is none."""


def runs_at(client: redis.Redis) -> list[StoredRun]:
    """All runs that have keys on a server, by name. Looks at every key there is.

    Raises:
        redis.RedisError: the server cannot be asked.
    """
    shards_of: dict[str, set[int]] = {}
    for key in client.scan_iter("mara:*", count=1000):
        if found := re.fullmatch(r"mara:([A-Za-z0-9._-]{1,128}):(?:(\d+):)?.+", key.decode(errors="replace")):
            shards = shards_of.setdefault(found[1], set())
            if found[2]:
                shards.add(int(found[2]))
    return [_stored(client, run_id, shards) for run_id, shards in sorted(shards_of.items())]


def stored_bytes(client: redis.Redis, run_id: str, shards: Iterable[int]) -> int:
    """Bytes of a run's episodes and weights on a server that has ``shards`` of its log.

    Raises:
        redis.RedisError: the server cannot be asked.
    """
    sizes = [client.get(keys_of(run_id, shard).nbytes) for shard in shards]
    return client.strlen(keys_of(run_id).tensors) + sum(
        int(size) for size in sizes if isinstance(size, bytes) and size.isdigit()
    )


def delete_run(client: redis.Redis, run_id: str) -> int:
    """Delete all keys of a run on a server; how many they were.

    The index of its episodes goes first, so that nobody takes half of them for all.

    Raises:
        redis.RedisError: the server cannot be asked; some of the keys may be gone.
    """
    keys = list(client.scan_iter(f"mara:{run_id}:*", count=1000))
    keys.sort(key=lambda key: not key.endswith(b":episodes"))
    for start in range(0, len(keys), _DELETE_AT_A_TIME):
        client.unlink(*keys[start : start + _DELETE_AT_A_TIME])
    return len(keys)


def _stored(client: redis.Redis, run_id: str, shards: set[int]) -> StoredRun:
    num_episodes, last_ms = 0, 0
    for shard in shards:
        stream = keys_of(run_id, shard).episodes
        num_episodes += client.xlen(stream)
        newest = cast(list[tuple[bytes, object]], client.xrevrange(stream, count=1))
        last_ms = max([last_ms, *(int(entry_id.partition(b"-")[0]) for entry_id, _ in newest)])
    return StoredRun(run_id, num_episodes, stored_bytes(client, run_id, shards), last_ms / 1000 or None)
