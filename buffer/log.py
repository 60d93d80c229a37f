"""The replay log on Redis: an append-only stream of episode records per run, bounded in bytes.

Appending is one script on the server, so it happens whole or not at all and exactly once: the script knows
the uids of all entries in the stream. It also keeps the account of bytes and trims the oldest entries. Each
entry carries its number among all that were ever appended, so that a reader sees how many it has missed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import redis

from mara.buffer.codec import MalformedRecord, RecordLimits, decode_episode, encode_episode
from mara.buffer.config import APPEND_BYTES, READ_BYTES, ReplayConfig
from mara.buffer.keys import keys_of
from mara.buffer.outage import AWAY, Outage
from mara.common.episode import Episode

# Entries are told apart by their uid; the newest always stays, however large it is. The sizes stand in a list
# of their own because a script could only learn them from the stream by reading the records.
_APPEND = """
local episodes, sizes, uids, nbytes, counts = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local uid, record, max_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('SADD', uids, uid) == 0 then
    redis.call('HINCRBY', counts, 'duplicates', 1)
    return
end
local number = redis.call('HINCRBY', counts, 'appended', 1)
local duplicates = redis.call('HGET', counts, 'duplicates') or 0
local id = redis.call('XADD', episodes, '*', 'e', record, 'n', number, 'd', duplicates)
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
"""
_READ_ENTRIES = 64  # most of one reply, however small they are
_BLOCK_S = 0.5  # longest single wait in the server, so that an interrupt is seen
_MAX_WARNINGS = 20

_log = logging.getLogger(__name__)


class RedisEpisodeLog:
    """An :class:`~mara.common.contracts.EpisodeSink` on a Redis stream. Not thread-safe.

    While the store is away or has no memory left, ``append`` waits and tries again for up to
    ``max_outage_s``, then raises :class:`~mara.common.errors.ReplayUnavailable`, or
    :class:`~mara.common.errors.UserError` for want of memory.
    """

    def __init__(self, client: redis.Redis, run_id: str, config: ReplayConfig) -> None:
        self._client = client
        keys = keys_of(run_id)
        self._keys = (keys.episodes, keys.sizes, keys.uids, keys.nbytes, keys.counts)
        self._config = config
        self._sha: str | None = None
        self._outage = Outage(config)

    def append(self, episodes: Sequence[Episode]) -> None:
        """Store the episodes in order, each once.

        Raises:
            ReplayUnavailable: the store was away for too long; a prefix of the episodes is stored.
            UserError: the store has had no memory left for as long; a prefix of the episodes is stored.
        """
        batch: list[tuple[str, bytes]] = []
        batch_bytes = 0
        for episode in episodes:
            record = encode_episode(episode)
            if batch and batch_bytes + len(record) > APPEND_BYTES:
                self._append_batch(batch)
                batch, batch_bytes = [], 0
            batch.append((episode.uid, record))
            batch_bytes += len(record)
        if batch:
            self._append_batch(batch)

    def _append_batch(self, batch: Sequence[tuple[str, bytes]]) -> None:
        while True:
            time.sleep(self._outage.pause_s)
            try:
                self._run_script(batch)
            except redis.exceptions.NoScriptError:
                self._sha = None  # a restarted store has forgotten it
            except AWAY as error:
                self._outage.failed(error)
            else:
                self._outage.ended()
                return

    def _run_script(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """One round trip; on the server the calls run one after another."""
        if self._sha is None:
            self._sha = self._client.script_load(_APPEND)
        limit = str(self._config.log_max_bytes)
        pipeline = self._client.pipeline(transaction=False)
        for uid, record in batch:
            pipeline.evalsha(self._sha, len(self._keys), *self._keys, uid, record, limit)
        pipeline.execute()


class _Entry(NamedTuple):
    """What the script appended; only the record where somebody else did."""

    entry_id: str
    record: bytes
    number: int | None
    """Of this episode among all that were ever appended, from 1."""
    num_duplicates: int | None
    """Episodes that came again until then."""


class RedisEpisodeReader:
    """An :class:`~mara.common.contracts.EpisodeSource` on a Redis stream. Not thread-safe.

    While the store is away, ``read`` finds nothing; once that has lasted ``max_outage_s`` it raises
    :class:`~mara.common.errors.ReplayUnavailable`. Entries trimmed before they were read are passed over and
    counted. A reply of the store holds about 32 MiB: it counts against the store's own memory.
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
        self._entry_id, _, number = cursor.partition("/")
        self._number = int(number or 0)
        self._back_to = self._entry_id  # for XREVRANGE, which takes what it begins at as well
        self._limits = limits or RecordLimits()
        self._outage = Outage(config)
        # The socket must not time out before the server's wait ends.
        self._longest_block_s = min(_BLOCK_S, config.connect_timeout_s / 2)
        self._num_entries = 0
        self._entries_bytes = 0
        self._num_malformed = 0
        self._num_trimmed_unread = 0
        self._num_duplicates = 0
        self._waited_s = 0.0

    @property
    def cursor(self) -> str:
        """The last entry read, ``ID/NUMBER``; give it to a new reader to go on from there."""
        return f"{self._entry_id}/{self._number}"

    @property
    def num_malformed(self) -> int:
        """Records skipped so far because they could not be decoded."""
        return self._num_malformed

    @property
    def num_trimmed_unread(self) -> int:
        """Episodes that went to make room before this reader came to them."""
        return self._num_trimmed_unread

    @property
    def num_duplicates(self) -> int:
        """Episodes that all writers appended again, up to the last episode read.

        A writer does so when a reply was lost, or when a part of what it sent was refused.
        """
        return self._num_duplicates

    @property
    def waited_s(self) -> float:
        """Seconds in which :meth:`read` waited for an episode to come, those of decoding left out."""
        return self._waited_s

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        """Return up to ``max_episodes`` episodes after the cursor; waits at most ``timeout_s``.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        deadline = time.monotonic() + timeout_s
        episodes: list[Episode] = []
        while len(episodes) < max_episodes:
            entries = self._read_entries(min(max_episodes - len(episodes), self._reply_entries))
            if not entries:
                left_s = max(0.0, deadline - time.monotonic()) if not episodes else 0.0
                if left_s == 0:
                    break
                entries = self._wait_for_entry(left_s)
            self._note(entries)
            episodes.extend(self._decoded(entries))
        return episodes

    def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode] | None:
        """Return up to ``max_episodes`` episodes from before the first cursor, newest first, then older ones.

        Empty where there are none; None where the store is away, after a pause of at most ``timeout_s``.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        episodes: list[Episode] = []
        while len(episodes) < max_episodes:
            if self._outage.pause_s > 0:
                time.sleep(min(self._outage.pause_s, timeout_s))
                return episodes or None
            count = min(max_episodes - len(episodes), self._reply_entries)
            try:
                reply = self._client.xrevrange(self._stream, max=self._back_to, count=count)
            except AWAY as error:
                self._outage.failed(error)
                return episodes or None
            self._outage.ended()
            entries = [_entry(*entry) for entry in cast(list[tuple[bytes, dict[bytes, bytes]]], reply)]
            if not entries:
                break
            self._back_to = f"({entries[-1].entry_id}"
            episodes.extend(self._decoded(entries))
        return episodes

    def at_end(self) -> bool:
        """Whether nothing is left after the cursor. Waits for an answer of the store while it is away.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        while True:
            time.sleep(self._outage.pause_s)
            try:
                left = self._client.xrange(self._stream, min=f"({self._entry_id}", count=1)
            except AWAY as error:
                self._outage.failed(error)
            else:
                self._outage.ended()
                return not left

    @property
    def _reply_entries(self) -> int:
        """Most entries of the next reply: :data:`READ_BYTES` of them, by the mean size of those read so far.

        Starts with one and at most doubles each time, since nothing is known of what was not seen.
        """
        mean_bytes = self._entries_bytes // max(1, self._num_entries)
        return min(_READ_ENTRIES, 1 + self._num_entries, max(1, READ_BYTES // max(1, mean_bytes)))

    def _wait_for_entry(self, wait_s: float) -> list[_Entry]:
        """The next entry; none if it does not come within one short wait or the store is away."""
        began = time.monotonic()
        if self._outage.pause_s > 0:
            time.sleep(min(self._outage.pause_s, wait_s))
            entries = []
        else:
            entries = self._read_entries(1, min(wait_s, self._longest_block_s))
        self._waited_s += time.monotonic() - began
        return entries

    def _read_entries(self, count: int, block_s: float = 0.0) -> list[_Entry]:
        """The next entries; none if there are none, even within ``block_s``, or the store is away."""
        if self._outage.pause_s > 0:
            return []
        block_ms = int(block_s * 1000) or None  # 0 would wait for ever
        try:
            reply = self._client.xread({self._stream: self._entry_id}, count=count, block=block_ms)
        except AWAY as error:
            self._outage.failed(error)
            return []
        self._outage.ended()
        if not reply:
            return []
        ((_, entries),) = cast(list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]], reply)
        return [_entry(entry_id, fields) for entry_id, fields in entries]

    def _decoded(self, entries: Sequence[_Entry]) -> list[Episode]:
        episodes = []
        for entry in entries:
            self._num_entries += 1
            self._entries_bytes += len(entry.record)
            try:
                episodes.append(decode_episode(entry.record, self._limits))
            except MalformedRecord as error:
                self._num_malformed += 1
                if self._num_malformed <= _MAX_WARNINGS:
                    last = "; no more warnings" if self._num_malformed == _MAX_WARNINGS else ""
                    _log.warning("record %s in the replay log is skipped: %s%s", entry.entry_id, error, last)
        return episodes

    def _note(self, entries: Sequence[_Entry]) -> None:
        """Move the cursor behind the entries, and learn from them what was missed."""
        for entry in entries:
            self._entry_id = entry.entry_id
            if entry.number is not None:
                # Numbers step back where a crash of the store lost some that were read.
                self._num_trimmed_unread += max(0, entry.number - self._number - 1)
                self._number = entry.number
            if entry.num_duplicates is not None:
                self._num_duplicates = entry.num_duplicates


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> _Entry:
    number, num_duplicates = _count(fields.get(b"n")), _count(fields.get(b"d"))
    return _Entry(entry_id.decode(), fields.get(b"e", b""), number, num_duplicates)


def _count(text: bytes | None) -> int | None:
    """A count as the script writes it; None for anything else."""
    return int(text) if text is not None and text.isdigit() and len(text) < 20 else None
