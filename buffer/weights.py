"""The weight channel on Redis: one hash with the latest agent, replaced in one command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

import redis
import torch
from safetensors.torch import load, save

from mara.buffer.config import ReplayConfig
from mara.buffer.keys import keys_of
from mara.buffer.outage import AWAY, Outage
from mara.common.contracts import VersionedWeights

# Returns the version that stands in the way, or nothing. What it stores goes neither into an append-only
# file, which would grow by the whole agent every second, nor to replicas. Before Redis 7 a script had to ask
# for the right to say so; later that does nothing.
_PUBLISH = """
if redis.replicate_commands then redis.replicate_commands() end
redis.set_repl(redis.REPL_NONE)
local current = redis.call('HGET', KEYS[1], 'version')
if current and tonumber(current) >= tonumber(ARGV[1]) then return current end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'published_at_s', ARGV[2], 'tensors', ARGV[3])
return false
"""


class RedisWeightChannel:
    """A weight sink and source in one; make one for each thread.

    Nobody waits for the store. While it is away a publication is dropped, which its publisher is told, and a
    reader hears that there is nothing newer. Once that has lasted ``max_outage_s``, both raise
    :class:`~mara.common.errors.ReplayUnavailable`.
    """

    def __init__(self, client: redis.Redis, run_id: str, config: ReplayConfig | None = None) -> None:
        self._client = client
        self._key = keys_of(run_id).weights
        self._outage = Outage(config or ReplayConfig())
        # Publications without a reply: they may have been stored all the same.
        self._unanswered: set[int] = set()

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Make ``tensors`` the latest weights; False if the store is away, and the same may be tried again.

        Raises:
            ValueError: ``version`` is not above the published one.
            ReplayUnavailable: the store has been away for ``max_outage_s``.
            UserError: it has had no memory left for as long.
        """
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        if self._outage.pause_s > 0:
            return False
        try:
            current = self._client.eval(_PUBLISH, 1, self._key, str(version), repr(time.time()), content)
        except AWAY as error:
            self._unanswered.add(version)
            self._outage.failed(error)
            return False
        self._outage.ended()
        is_our_own = current is not None and int(current) == version and version in self._unanswered
        if current is not None and not is_our_own:
            raise ValueError(
                f"version {version} is not above the published {int(current)}; versions must grow"
            )
        self._unanswered.clear()
        return True

    def holds(self, version: int) -> bool:
        """Whether the store has weights of ``version`` or later ones. True while it is away: nobody knows.

        A store that was restarted has none, or old ones: they are in no append-only file, unless it was
        rewritten since.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        latest = self.latest_version()
        return self._outage.is_on or (latest is not None and latest >= version)

    def fetch_newer(self, than: int) -> VersionedWeights | None:
        """Return the latest weights if their version exceeds ``than``; one tiny request if not.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        latest = self.latest_version()
        if latest is None or latest <= than:
            return None
        try:
            version, published_at_s, content = cast(
                tuple[bytes | None, bytes, bytes],
                self._client.hmget(self._key, ["version", "published_at_s", "tensors"]),
            )
        except AWAY as error:
            self._outage.failed(error)
            return None
        if version is None:  # deleted in between
            return None
        return VersionedWeights(int(version), float(published_at_s), load(content))

    def latest_version(self) -> int | None:
        """Version of the latest weights; None before the first publication or while the store is away."""
        if self._outage.pause_s > 0:
            return None
        try:
            version = cast(bytes | None, self._client.hget(self._key, "version"))
        except AWAY as error:
            self._outage.failed(error)
            return None
        self._outage.ended()
        return None if version is None else int(version)
