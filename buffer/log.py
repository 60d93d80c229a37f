"""The replay log on Redis: an append-only index of a run's episodes, and a key for each record; bounded.

A record is megabytes and an index entry a few words. The record is stored first, as a key that expires, under
the episode's uid; then one script on the server puts its entry into the index and keeps the record, or finds
that it is kept already. So an append happens whole or not at all and exactly once, and no record passes
through a script, which would copy it twice. The script also keeps the account of bytes and lets the oldest
episodes go. Each entry carries its number among all that were ever appended, so that a reader sees how many
it has missed.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import redis

from mara.buffer.codec import MalformedRecord, RecordLimits, decode_episode, encode_in_parts
from mara.buffer.config import APPEND_BYTES, READ_BYTES, ReplayConfig
from mara.buffer.connection import Value
from mara.buffer.keys import Keys, keys_of
from mara.buffer.outage import Outage
from mara.buffer.quarantine import Quarantine, Refused
from mara.common.contracts import ReadCounts
from mara.common.episode import Episode

# The newest episode always stays, however large it is.
_APPEND = """
local record, episodes, nbytes, counts = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local uid, records, max_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('PERSIST', record) == 0 then
    if redis.call('EXISTS', record) == 0 then
        return redis.error_reply('NORECORD it was evicted before its entry came')
    end
    return redis.call('HINCRBY', counts, 'duplicates', 1)
end
local size = redis.call('STRLEN', record)
local number = redis.call('HINCRBY', counts, 'appended', 1)
local duplicates = redis.call('HGET', counts, 'duplicates') or 0
redis.call('XADD', episodes, '*', 'u', uid, 's', size, 'n', number, 'd', duplicates)
local total = redis.call('INCRBY', nbytes, size)
while total > max_bytes do
    local oldest = redis.call('XRANGE', episodes, '-', '+', 'COUNT', 2)
    if #oldest < 2 then break end
    local id, fields = oldest[1][1], oldest[1][2]
    redis.call('DEL', records .. (fields[2] or ''))
    redis.call('XDEL', episodes, id)
    total = redis.call('DECRBY', nbytes, tonumber(fields[4]) or 0)
end
"""
_RECORD_S = 3600
"""How long a record waits for its entry: they come in one round trip, unless its writer dies in between."""
_INDEX_ENTRIES = 64
"""Most entries of one reply of the index."""
_BLOCK_S = 0.5  # longest single wait in the server, so that an interrupt is seen
_READ_BEFORE = 1 << 15  # uids a reader remembers: more than all actors together have under way
_MAX_WARNINGS = 20

_log = logging.getLogger(__name__)


class Record(NamedTuple):
    """An episode as it is stored."""

    uid: str
    data: Value
    """The record, perhaps in parts that lie in the memory of the episode."""
    nbytes: int
    """Of the whole record."""


def make_record(episode: Episode) -> Record:
    """Encode an episode. The record refers to the memory of its states."""
    parts = encode_in_parts(episode)
    return Record(episode.uid, parts, sum(map(len, parts)))


def take_batch(records: deque[Record], max_bytes: int) -> list[Record]:
    """Remove and return the first records that together have at most ``max_bytes``, or the first alone."""
    batch = [records.popleft()]
    num_bytes = batch[0].nbytes
    while records and num_bytes + records[0].nbytes <= max_bytes:
        num_bytes += records[0].nbytes
        batch.append(records.popleft())
    return batch


class RedisEpisodeLog:
    """An :class:`~mara.common.contracts.EpisodeSink` on one shard of the log. Not thread-safe.

    The uids of other shards are not known to it: what comes again has to come to the same shard.

    While the store is away or has no memory or disk left, ``append`` waits and tries again for up to
    ``max_outage_s``, then raises :class:`~mara.common.errors.ReplayUnavailable`, or
    :class:`~mara.common.errors.UserError` for want of memory or disk.
    """

    def __init__(self, client: redis.Redis, run_id: str, config: ReplayConfig, shard: int = 0) -> None:
        self._client = client
        self._keys = keys_of(run_id, shard)
        self._config = config
        self._sha: str | None = None
        self._outage = Outage(config)

    def append(self, episodes: Sequence[Episode]) -> None:
        """Store the episodes in order, each once.

        Raises:
            ReplayUnavailable: the store was away for too long; a prefix of the episodes is stored.
            UserError: the store has had no memory left for as long; a prefix of the episodes is stored.
        """
        left = deque(make_record(episode) for episode in episodes)
        while left:
            batch = take_batch(left, APPEND_BYTES)
            while not self.store(batch):
                time.sleep(self.pause_s)

    @property
    def pause_s(self) -> float:
        """Seconds until :meth:`store` should be tried again; 0 while the store can be used."""
        return self._outage.pause_s

    def store(self, batch: Sequence[Record]) -> bool:
        """Try once to store the records in order; whether they are. If not, any of them may be all the same.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
            UserError: it has had no memory left, or no disk that it can write to, for as long, or no longer
                lets us in.
        """
        try:
            self._send(batch)
        except redis.exceptions.NoScriptError:
            self._sha = None  # a restarted store has forgotten it
            return False
        except redis.RedisError as error:
            self._outage.failed(error)
            return False
        self._outage.ended()
        return True

    def _send(self, batch: Sequence[Record]) -> None:
        """One round trip; on the server the calls run one after another."""
        if self._sha is None:
            self._sha = self._client.script_load(_APPEND)
        keys, limit = self._keys, str(self._config.shard_max_bytes)
        pipeline = self._client.pipeline(transaction=False)
        for uid, record, _ in batch:
            key = record_key(keys, uid)
            # NX: a record that is in the log already must not begin to expire again.
            pipeline.set(key, record, nx=True, ex=_RECORD_S)  # type: ignore[arg-type]
            parts = (key, keys.episodes, keys.nbytes, keys.counts)
            pipeline.evalsha(self._sha, len(parts), *parts, uid, record_key(keys, ""), limit)
        pipeline.execute()


def record_key(keys: Keys, uid: str) -> str:
    """The key of the record of episode ``uid``."""
    return f"{keys.record}:{uid}"


class _Entry(NamedTuple):
    """An entry of the index, as the script wrote it; the rest is missing where somebody else did."""

    entry_id: str
    uid: bytes | None
    nbytes: int
    number: int | None
    """Of this episode among all that were ever appended, from 1."""
    num_duplicates: int | None
    """Episodes that came again until then."""


class RedisEpisodeReader:
    """An :class:`~mara.common.contracts.EpisodeSource` on one shard of the log. Not thread-safe.

    While the store is away, ``read`` finds nothing; once that has lasted ``max_outage_s`` it raises
    :class:`~mara.common.errors.ReplayUnavailable`. Entries trimmed before they were read are passed over and
    counted; records that cannot be decoded are counted, copied to the run's quarantine and passed over. An
    episode that was read already and was stored again, after the store had lost it, is passed over too. A
    reply of the store holds about 32 MiB: it counts against the store's own memory.
    """

    def __init__(
        self,
        client: redis.Redis,
        run_id: str,
        config: ReplayConfig,
        cursor: str = "0-0",
        limits: RecordLimits | None = None,
        shard: int = 0,
    ) -> None:
        self._client = client
        self._keys = keys_of(run_id, shard)
        self._entry_id, _, number = cursor.partition("/")
        self._number = int(number or 0)
        self._back_to = self._entry_id  # for XREVRANGE, which takes what it begins at as well
        self._limits = limits or RecordLimits()
        self._outage = Outage(config)
        self._quarantine = Quarantine(client, run_id)
        # The socket must not time out before the server's wait ends.
        self._longest_block_s = min(_BLOCK_S, config.connect_timeout_s / 2)
        # The uids read last, oldest first. A crash may take from the store what was read but not yet answered
        # for, and what its writer therefore sends again.
        self._read_before: dict[str, None] = {}
        self._num_read_again = 0
        self._entries: deque[_Entry] = deque()  # read from the index; their records are not
        self._num_malformed = 0
        self._num_trimmed_unread = 0
        self._num_duplicates = 0
        self._waited_s = 0.0

    @property
    def cursor(self) -> str:
        """The last entry read, ``ID/NUMBER``; give it to a new reader to go on from there."""
        return f"{self._entry_id}/{self._number}"

    @property
    def counts(self) -> ReadCounts:
        """See :class:`~mara.common.contracts.ReadCounts`. Duplicates are known up to the last episode read.

        A writer appends again when a reply was lost, or when a part of what it sent was refused.
        """
        return ReadCounts(
            num_malformed=self._num_malformed,
            num_quarantined=self._quarantine.num_kept,
            num_trimmed_unread=self._num_trimmed_unread,
            num_duplicates=self._num_duplicates + self._num_read_again,
        )

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
            if not self._entries and not self._read_index():
                left_s = max(0.0, deadline - time.monotonic()) if not episodes else 0.0
                if left_s == 0:
                    break
                self._wait_for_entry(left_s)
            episodes.extend(self._read_records(max_episodes - len(episodes)))
        return episodes

    def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode] | None:
        """Return up to ``max_episodes`` episodes from before the first cursor, newest first, then older ones.

        Empty where there are none; None where the store is away, after a pause of at most ``timeout_s``.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        episodes: list[Episode] = []
        while len(episodes) < max_episodes:
            reply = self._asked(
                lambda: self._client.xrevrange(
                    self._keys.episodes, max=self._back_to, count=max_episodes - len(episodes)
                )
            )
            if reply == []:
                break
            entries = cast(list[tuple[bytes, dict[bytes, bytes]]], reply or [])
            batch = _one_reply([_entry(*entry) for entry in entries])
            if not batch or (records := self._records(batch)) is None:
                if not episodes:
                    time.sleep(min(self._outage.pause_s, timeout_s))
                return episodes or None
            self._back_to = f"({batch[-1].entry_id}"
            episodes.extend(self._decoded(batch, records))
        return episodes

    def at_end(self) -> bool:
        """Whether nothing is left after the cursor. Waits for an answer of the store while it is away.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        while True:
            time.sleep(self._outage.pause_s)
            left = self._asked(
                lambda: self._client.xrange(self._keys.episodes, min=f"({self._entry_id}", count=1)
            )
            if left is not None:
                return not left

    def _wait_for_entry(self, wait_s: float) -> None:
        """Wait for the next entries; returns without if none comes within one short wait."""
        began = time.monotonic()
        if self._outage.pause_s > 0:
            time.sleep(min(self._outage.pause_s, wait_s))
        else:
            self._read_index(min(wait_s, self._longest_block_s))
        self._waited_s += time.monotonic() - began

    def _read_index(self, block_s: float = 0.0) -> bool:
        """Take the next entries from the index; False if there are none within ``block_s``."""
        block_ms = int(block_s * 1000) or None  # 0 would wait for ever
        reply = self._asked(
            lambda: self._client.xread(
                {self._keys.episodes: self._entry_id}, count=_INDEX_ENTRIES, block=block_ms
            )
        )
        if not reply:
            return False
        ((_, entries),) = cast(list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]], reply)
        self._entries.extend(_entry(entry_id, fields) for entry_id, fields in entries)
        return True

    def _read_records(self, max_episodes: int) -> list[Episode]:
        """The episodes of the first entries, as many as one reply may hold; those gone are counted."""
        batch = _one_reply(itertools.islice(self._entries, max_episodes))
        if not batch:
            return []
        records = self._records(batch)
        if records is None:
            self._entries.clear()  # a store that comes back may have lost some of them
            return []
        for entry, record in zip(batch, records, strict=True):
            self._entries.popleft()
            self._note(entry)
            self._num_trimmed_unread += record is None and entry.uid is not None
        return self._decoded(batch, records)

    def _records(self, batch: Sequence[_Entry]) -> list[bytes | None] | None:
        """The record of each entry, None if it has gone; None altogether while the store is away."""
        names = [record_key(self._keys, "").encode() + (entry.uid or b"") for entry in batch]
        return cast(list[bytes | None] | None, self._asked(lambda: self._client.mget(names)))

    def _decoded(self, batch: Sequence[_Entry], records: Sequence[bytes | None]) -> list[Episode]:
        """The episodes; records that are none are counted and copied to the quarantine."""
        episodes, refused = [], []
        for entry, record in zip(batch, records, strict=True):
            if record is None and entry.uid is not None:
                continue
            try:
                episode = decode_episode(record or b"", self._limits)
            except MalformedRecord as error:
                self._num_malformed += 1
                origin = f"{self._keys.episodes} {entry.entry_id}"
                refused.append(Refused(origin, str(error), record or b""))
                if self._num_malformed <= _MAX_WARNINGS:
                    last = "; no more warnings" if self._num_malformed == _MAX_WARNINGS else ""
                    _log.warning("record %s in the replay log is skipped: %s%s", entry.entry_id, error, last)
            else:
                if self._is_new(episode.uid):
                    episodes.append(episode)
        self._quarantine.keep(refused)
        return episodes

    def _asked(self, ask: Callable[[], object]) -> object:
        """What the store answers; None while it is away."""
        if self._outage.pause_s > 0:
            return None
        try:
            reply = ask()
        except redis.RedisError as error:
            self._outage.failed(error)
            return None
        self._outage.ended()
        return reply

    def _is_new(self, uid: str) -> bool:
        """Whether the uid is none of those read last; it is from now on."""
        if uid in self._read_before:
            self._num_read_again += 1
            return False
        self._read_before[uid] = None
        if len(self._read_before) > _READ_BEFORE:
            del self._read_before[next(iter(self._read_before))]
        return True

    def _note(self, entry: _Entry) -> None:
        """Move the cursor behind the entry, and learn from it what was missed."""
        self._entry_id = entry.entry_id
        if entry.number is not None:
            # Numbers step back where a crash of the store lost some that were read.
            self._num_trimmed_unread += max(0, entry.number - self._number - 1)
            self._number = entry.number
        if entry.num_duplicates is not None:
            self._num_duplicates = entry.num_duplicates


def _one_reply(entries: Iterable[_Entry]) -> list[_Entry]:
    """The first entries whose records one reply of the store may hold; at least one, if there is any."""
    batch: list[_Entry] = []
    num_bytes = 0
    for entry in entries:
        num_bytes += entry.nbytes
        if batch and num_bytes > READ_BYTES:
            break
        batch.append(entry)
    return batch


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> _Entry:
    number, num_duplicates = _count(fields.get(b"n")), _count(fields.get(b"d"))
    return _Entry(entry_id.decode(), fields.get(b"u"), _count(fields.get(b"s")) or 0, number, num_duplicates)


def _count(text: bytes | None) -> int | None:
    """A count as the script writes it; None for anything else."""
    return int(text) if text is not None and text.isdigit() and len(text) < 20 else None
