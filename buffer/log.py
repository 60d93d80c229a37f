"""The replay log on Redis: an append-only stream of episode records per run, bounded in bytes.

Appending is one script on the server, so it happens whole or not at all and exactly once: the script knows
the uids of all entries in the stream. It also keeps the account of bytes and trims the oldest entries.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import cast

import redis

from mara.buffer.codec import MalformedRecord, RecordLimits, decode_episode, encode_episode
from mara.buffer.config import ReplayConfig
from mara.buffer.keys import keys_of
from mara.buffer.outage import AWAY, Outage
from mara.common.episode import Episode
from mara.common.errors import UserError

# Entries are told apart by their uid; the newest always stays, however large it is. The sizes stand in a list
# of their own because a script could only learn them from the stream by reading the records.
_APPEND = """
local episodes, sizes, uids, nbytes = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local uid, record, max_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('SADD', uids, uid) == 0 then return 0 end
local id = redis.call('XADD', episodes, '*', 'e', record)
redis.call('RPUSH', sizes, id .. '|' .. #record .. '|' .. uid)
local total = redis.call('INCRBY', nbytes, #record)
local trimmed = false
while total > max_bytes and redis.call('LLEN', sizes) > 1 do
    local size, oldest = string.match(redis.call('LPOP', sizes), '^[^|]*|([^|]*)|(.*)$')
    redis.call('SREM', uids, oldest)
    total = redis.call('DECRBY', nbytes, size)
    trimmed = true
end
if trimmed then
    local first = string.match(redis.call('LINDEX', sizes, 0), '^[^|]*')
    redis.call('XTRIM', episodes, 'MINID', first)
end
return 1
"""
_BATCH_BYTES = 64 << 20  # of records in one round trip
_BATCH_ENTRIES = 64  # of a read; bounds what one reply can hold
_BLOCK_S = 0.5  # longest single wait in the server, so that an interrupt is seen
_MAX_WARNINGS = 20

_log = logging.getLogger(__name__)


class RedisEpisodeLog:
    """An :class:`~mara.common.contracts.EpisodeSink` on a Redis stream. Not thread-safe.

    While the store is away, ``append`` waits and tries again for up to ``max_outage_s``, then raises
    :class:`~mara.common.errors.ReplayUnavailable`.
    """

    def __init__(self, client: redis.Redis, run_id: str, config: ReplayConfig) -> None:
        self._client = client
        keys = keys_of(run_id)
        self._keys = (keys.episodes, keys.sizes, keys.uids, keys.nbytes)
        self._config = config
        self._sha: str | None = None
        self._outage = Outage(config)
        self._num_duplicates = 0

    @property
    def num_duplicates(self) -> int:
        """Episodes that were stored already: appended again after a reply was lost."""
        return self._num_duplicates

    def append(self, episodes: Sequence[Episode]) -> None:
        """Store the episodes in order, each once.

        Raises:
            ReplayUnavailable: the store was away for too long; a prefix of the episodes is stored.
            UserError: the store is full.
        """
        batch: list[tuple[str, bytes]] = []
        for episode in episodes:
            batch.append((episode.uid, encode_episode(episode)))
            if sum(len(record) for _, record in batch) > _BATCH_BYTES:
                self._append_batch(batch)
                batch = []
        if batch:
            self._append_batch(batch)

    def _append_batch(self, batch: Sequence[tuple[str, bytes]]) -> None:
        while True:
            time.sleep(self._outage.pause_s)
            try:
                self._num_duplicates += sum(not stored for stored in self._run_script(batch))
            except redis.exceptions.NoScriptError:
                self._sha = None  # a restarted store has forgotten it
            except redis.OutOfMemoryError as error:
                raise UserError(
                    f"replay.log_max_bytes is {self._config.log_max_bytes}, more than the store can hold; "
                    f"lower it or raise the server's maxmemory"
                ) from error
            except AWAY as error:
                self._outage.failed(error)
            else:
                self._outage.ended()
                return

    def _run_script(self, batch: Sequence[tuple[str, bytes]]) -> list[int]:
        """One round trip; on the server the calls run one after another."""
        if self._sha is None:
            self._sha = self._client.script_load(_APPEND)
        limit = str(self._config.log_max_bytes)
        pipeline = self._client.pipeline(transaction=False)
        for uid, record in batch:
            pipeline.evalsha(self._sha, len(self._keys), *self._keys, uid, record, limit)
        return cast(list[int], pipeline.execute())


class RedisEpisodeReader:
    """An :class:`~mara.common.contracts.EpisodeSource` on a Redis stream. Not thread-safe.

    While the store is away, ``read`` finds nothing; once that has lasted ``max_outage_s`` it raises
    :class:`~mara.common.errors.ReplayUnavailable`. Entries trimmed before they were read are passed over.
    """

    def __init__(
        self,
        client: redis.Redis,
        run_id: str,
        config: ReplayConfig,
        cursor: str = "0-0",
        limits: RecordLimits | None = None,
    ) -> None:
        self._client = client
        self._stream = keys_of(run_id).episodes
        self._cursor = cursor
        self._limits = limits or RecordLimits()
        self._outage = Outage(config)
        # The socket must not time out before the server's wait ends.
        self._longest_block_s = min(_BLOCK_S, config.connect_timeout_s / 2)
        self._num_malformed = 0

    @property
    def cursor(self) -> str:
        """The id of the last entry read; give it to a new reader to go on from there."""
        return self._cursor

    @property
    def num_malformed(self) -> int:
        """Records skipped so far because they could not be decoded."""
        return self._num_malformed

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        """Return up to ``max_episodes`` episodes after the cursor; waits at most ``timeout_s``.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        deadline = time.monotonic() + timeout_s
        episodes: list[Episode] = []
        while len(episodes) < max_episodes:
            left_s = max(0.0, deadline - time.monotonic()) if not episodes else 0.0
            if self._outage.pause_s > 0:
                if left_s == 0:
                    break
                time.sleep(min(self._outage.pause_s, left_s))
                continue
            entries = self._read_entries(min(max_episodes - len(episodes), _BATCH_ENTRIES), left_s)
            episodes.extend(self._decoded(entries))
            if not entries and left_s == 0:
                break
        return episodes

    def _read_entries(self, count: int, wait_s: float) -> list[tuple[bytes, bytes]]:
        """(id, record) of the next entries; none if the store is away or nothing came in one short wait."""
        block_ms = int(min(wait_s, self._longest_block_s) * 1000)
        try:
            # BLOCK 0 would wait for ever.
            reply = self._client.xread({self._stream: self._cursor}, count=count, block=block_ms or None)
        except AWAY as error:
            self._outage.failed(error)
            return []
        self._outage.ended()
        if not reply:
            return []
        ((_, entries),) = cast(list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]], reply)
        return [(entry_id, fields.get(b"e", b"")) for entry_id, fields in entries]

    def _decoded(self, entries: Sequence[tuple[bytes, bytes]]) -> list[Episode]:
        episodes = []
        for entry_id, record in entries:
            self._cursor = entry_id.decode()
            try:
                episodes.append(decode_episode(record, self._limits))
            except MalformedRecord as error:
                self._num_malformed += 1
                if self._num_malformed <= _MAX_WARNINGS:
                    last = "; no more warnings" if self._num_malformed == _MAX_WARNINGS else ""
                    _log.warning("record %s in the replay log is skipped: %s%s", self._cursor, error, last)
        return episodes
