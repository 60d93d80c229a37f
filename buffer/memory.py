"""The replay log and the weight channel in the memory of one process.

They are the single-process mode, the fake for tests and the specification: the implementations on Redis pass
the same contract suite. Safe to share between threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice

import torch

from mara.buffer.config import ReplayConfig
from mara.common.agent import not_finite
from mara.common.contracts import ReadCounts, VersionedWeights
from mara.common.episode import Episode
from mara.common.errors import DamagedWeights


class MemoryEpisodeLog:
    """An :class:`~mara.common.contracts.EpisodeSink` bounded in bytes; the oldest episodes go first."""

    def __init__(self, config: ReplayConfig | None = None) -> None:
        self._max_bytes = (config or ReplayConfig()).log_max_bytes
        self._changed = threading.Condition()
        self._records: deque[tuple[int, Episode]] = deque()
        self._uids: set[str] = set()
        self._nbytes = 0
        self._last_id = 0
        self._num_duplicates = 0

    def append(self, episodes: Sequence[Episode]) -> None:
        """Store the episodes whose uid is not stored yet."""
        with self._changed:
            for episode in episodes:
                if episode.uid in self._uids:
                    self._num_duplicates += 1
                else:
                    self._last_id += 1
                    self._records.append((self._last_id, episode))
                    self._uids.add(episode.uid)
                    self._nbytes += episode.nbytes
                    self._trim()
            self._changed.notify_all()

    def reader(self, cursor: str = "0") -> MemoryEpisodeReader:
        """A reader that starts after ``cursor``; the default is the oldest episode."""
        return MemoryEpisodeReader(self, cursor)

    @property
    def num_duplicates(self) -> int:
        """Episodes appended although they were stored."""
        return self._num_duplicates

    def _trim(self) -> None:
        while self._nbytes > self._max_bytes and len(self._records) > 1:
            _, oldest = self._records.popleft()
            self._uids.remove(oldest.uid)
            self._nbytes -= oldest.nbytes

    def wait_after(self, last_id: int, max_episodes: int, timeout_s: float) -> list[tuple[int, Episode]]:
        """Up to ``max_episodes`` records after ``last_id``; waits for the first one."""
        with self._changed:
            self._changed.wait_for(lambda: self._last_id > last_id, timeout_s)
            # The records are numbered one after another.
            first = max(0, last_id + 1 - self._records[0][0]) if self._records else 0
            return list(islice(self._records, first, first + max_episodes))

    def before(self, record_id: int, max_episodes: int) -> list[tuple[int, Episode]]:
        """Up to ``max_episodes`` records up to and with ``record_id``, newest first."""
        with self._changed:
            older = (record for record in reversed(self._records) if record[0] <= record_id)
            return list(islice(older, max_episodes))


class MemoryEpisodeReader:
    """An :class:`~mara.common.contracts.EpisodeSource` on a :class:`MemoryEpisodeLog`."""

    def __init__(self, log: MemoryEpisodeLog, cursor: str = "0") -> None:
        self._log = log
        self._last_id = int(cursor)
        self._back_to = self._last_id
        self._num_trimmed_unread = 0
        self._waited_s = 0.0

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        """Return up to ``max_episodes`` episodes after the cursor; waits at most ``timeout_s``."""
        began = time.monotonic()
        records = self._log.wait_after(self._last_id, max_episodes, timeout_s)
        self._waited_s += time.monotonic() - began
        if records:
            self._num_trimmed_unread += records[0][0] - self._last_id - 1
            self._last_id = records[-1][0]
        return [episode for _, episode in records]

    def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        """Return up to ``max_episodes`` episodes from before the first cursor, newest first."""
        records = self._log.before(self._back_to, max_episodes)
        if records:
            self._back_to = records[-1][0] - 1
        return [episode for _, episode in records]

    def at_end(self) -> bool:
        """Whether nothing is left after the cursor."""
        return not self._log.wait_after(self._last_id, 1, 0)

    @property
    def cursor(self) -> str:
        """Where the reader stands; give it to a new reader to go on from there."""
        return str(self._last_id)

    @property
    def counts(self) -> ReadCounts:
        """Nothing is encoded, so nothing is malformed."""
        return ReadCounts(
            num_trimmed_unread=self._num_trimmed_unread, num_duplicates=self._log.num_duplicates
        )

    @property
    def waited_s(self) -> float:
        """Seconds in which :meth:`read` waited for an episode to come."""
        return self._waited_s


class MemoryWeightChannel:
    """A weight sink and source in one. Tensors are copied on both ways, so nobody shares them."""

    def __init__(self, agent_digest: str = "") -> None:
        """``agent_digest`` goes out with everything published here."""
        self._agent_digest = agent_digest
        self._lock = threading.Lock()
        self._latest: VersionedWeights | None = None

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Make ``tensors`` the latest weights, always; ValueError if ``version`` is not above the last."""
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        with self._lock:
            if self._latest is not None and version <= self._latest.version:
                raise ValueError(
                    f"version {version} is not above the published {self._latest.version}; versions must grow"
                )
            self._latest = VersionedWeights(version, time.time(), copies, self._agent_digest)
        return True

    def holds(self, version: int) -> bool:
        """Whether ``version`` or a later one has been published."""
        latest = self.latest_version()
        return latest is not None and latest >= version

    def fetch_newer(self, than: int, skip: int | None = None) -> VersionedWeights | None:
        """Return the latest weights if their version exceeds ``than`` and is not ``skip``."""
        with self._lock:
            latest = self._latest
        if latest is None or latest.version <= than or latest.version == skip:
            return None
        if bad := not_finite(latest.tensors):
            raise DamagedWeights(latest.version, f"{', '.join(bad)}: not finite")
        return latest._replace(tensors={name: tensor.clone() for name, tensor in latest.tensors.items()})

    def latest_version(self) -> int | None:
        """Version of the latest weights; None before the first publication."""
        with self._lock:
            return None if self._latest is None else self._latest.version
