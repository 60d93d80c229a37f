"""Reading a log that is kept in several parts, on one server or on several."""

from __future__ import annotations

import time
from collections.abc import Sequence

import redis

from mara.buffer.config import ReplayConfig
from mara.buffer.log import RedisEpisodeReader
from mara.common.contracts import ReadCounts
from mara.common.episode import Episode
from mara.common.errors import ReplayUnavailable, UserError

_TURN_S = 0.02  # one wait at one shard: an episode in another one is seen at the latest after all their turns
_HANGS_S = 0.5  # a read that takes so much longer than asked for, and has nothing, found a server that hangs
_LOST_SHARE = 0.2  # most of the time that is lost to servers that hang


class ShardedEpisodeReader:
    """An :class:`~mara.common.contracts.EpisodeSource` over the readers of all shards. Not thread-safe.

    The episodes of one shard come in its order; between shards there is none. No shard waits for another:
    each read takes equal parts of those that have enough, and a shard that is away is passed over. Once one
    has been away for ``max_outage_s``, ``read`` raises what its reader does: the episodes of its actors are
    missing, and a run should not go on with the rest unnoticed.
    """

    def __init__(self, readers: Sequence[RedisEpisodeReader]) -> None:
        self._readers = list(readers)
        self._first = 0  # who is asked first
        self._waits_at = 0  # who is waited for
        self._goes_back_at = 0  # whose older episodes were read last
        self._passed_over_until = [0.0] * len(readers)
        self._waited_s = 0.0

    @property
    def cursor(self) -> str:
        """The cursors of all shards, joined by commas."""
        return ",".join(reader.cursor for reader in self._readers)

    @property
    def counts(self) -> ReadCounts:
        """The sums over all shards."""
        return ReadCounts(*map(sum, zip(*(reader.counts for reader in self._readers), strict=True)))

    @property
    def waited_s(self) -> float:
        """Seconds in which :meth:`read` waited for an episode to come, those of decoding left out."""
        return self._waited_s + sum(reader.waited_s for reader in self._readers)

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        """Return up to ``max_episodes`` episodes after the cursor; waits at most ``timeout_s``.

        Where a server hangs instead of being away, a read takes ``connect_timeout_s`` longer now and then.

        Raises:
            ReplayUnavailable: a shard has been away for ``max_outage_s``.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            episodes = self._take(max_episodes)
            left_s = deadline - time.monotonic()
            if episodes or left_s <= 0:
                return episodes
            # Whoever has its turn is waited for; the others are looked at again after it.
            self._waits_at = (self._waits_at + 1) % len(self._readers)
            if episodes := self._ask(self._waits_at, max_episodes, min(left_s, _TURN_S)):
                return episodes

    def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode] | None:
        """Return up to ``max_episodes`` episodes from before the first cursor, newest first within a shard.

        They come from the shards in turn. Empty where there are none; None where those that may have some are
        away, after a pause of at most ``timeout_s``.

        Raises:
            ReplayUnavailable: a shard has been away for ``max_outage_s``.
        """
        is_away = False
        for _ in self._readers:
            self._goes_back_at = (self._goes_back_at + 1) % len(self._readers)
            episodes = self._readers[self._goes_back_at].read_back(
                max_episodes, timeout_s / len(self._readers)
            )
            if episodes:
                return episodes
            is_away |= episodes is None
        return None if is_away else []

    def at_end(self) -> bool:
        """Whether nothing is left after the cursor in any shard. Waits for an answer of one that is away.

        Raises:
            ReplayUnavailable: a shard has been away for ``max_outage_s``.
        """
        return all(reader.at_end() for reader in self._readers)

    def _take(self, max_episodes: int) -> list[Episode]:
        """What there is, in equal parts; what one shard has not, the others may give."""
        episodes: list[Episode] = []
        self._first = (self._first + 1) % len(self._readers)
        asked = [(self._first + n) % len(self._readers) for n in range(len(self._readers))]
        while asked and len(episodes) < max_episodes:
            have_more = []
            for place, shard in enumerate(asked):
                # Rounded up, so that the last of them may get less, another one each time.
                part = -(-(max_episodes - len(episodes)) // (len(asked) - place))
                if part == 0:
                    break
                try:
                    new = self._ask(shard, part, 0.0)
                except (ReplayUnavailable, UserError):
                    if not episodes:
                        raise
                    return episodes  # they are behind the cursor already; the next read raises it again
                episodes += new
                if len(new) == part:
                    have_more.append(shard)
            asked = have_more
        return episodes

    def _ask(self, shard: int, max_episodes: int, timeout_s: float) -> list[Episode]:
        began = time.monotonic()
        if began < self._passed_over_until[shard]:
            time.sleep(timeout_s)
            self._waited_s += timeout_s
            return []
        episodes = self._readers[shard].read(max_episodes, timeout_s)
        took_s = time.monotonic() - began
        if not episodes and took_s > timeout_s + _HANGS_S:
            self._passed_over_until[shard] = began + took_s / _LOST_SHARE
        return episodes


def open_reader(
    clients: Sequence[redis.Redis], run_id: str, config: ReplayConfig, cursor: str = ""
) -> RedisEpisodeReader | ShardedEpisodeReader:
    """A reader of the whole log, from the start or from ``cursor``; ``clients`` are those of its shards.

    Raises:
        UserError: the cursor is one of another number of shards.
    """
    cursors = cursor.split(",") if cursor else ["0-0"] * len(clients)
    if len(cursors) != len(clients):
        raise UserError(
            f"replay.redis_url has {len(clients)} addresses, the log was read from {len(cursors)} before; "
            "give the same ones in the same order"
        )
    readers = [
        RedisEpisodeReader(client, run_id, config, cursor, shard=shard)
        for shard, (client, cursor) in enumerate(zip(clients, cursors, strict=True))
    ]
    return readers[0] if len(readers) == 1 else ShardedEpisodeReader(readers)
