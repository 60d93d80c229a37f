"""The weight channel on Redis: the latest agent, replaced in one script."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import cast

import redis
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mara.buffer.config import ReplayConfig
from mara.buffer.keys import keys_of
from mara.buffer.outage import Outage
from mara.common.agent import not_finite
from mara.common.contracts import VersionedWeights
from mara.common.errors import DamagedWeights

# Returns the version that stands in the way, or nothing. One of another agent does not, nor what is none.
# What is stored goes neither into an append-only file, which would grow by the whole agent every second, nor
# to replicas. Before Redis 7 a script had to ask for the right to say so; later that does nothing.
_PUBLISH = """
if redis.replicate_commands then redis.replicate_commands() end
redis.set_repl(redis.REPL_NONE)
local stored = redis.call('HMGET', KEYS[1], 'version', 'agent')
local current = tonumber(stored[1] or '')
if current and current >= tonumber(ARGV[1]) and stored[2] == ARGV[4] then return stored[1] end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'published_at_s', ARGV[2], 'agent', ARGV[4])
redis.call('SET', KEYS[2], ARGV[3])
return false
"""


class RedisWeightChannel:
    """A weight sink and source in one; make one for each thread.

    Nobody waits for the store. While it is away a publication is not taken, which its publisher is told, and
    a reader hears that there is nothing newer. Once that has lasted ``max_outage_s``, both raise
    :class:`~mara.common.errors.ReplayUnavailable`.
    """

    def __init__(
        self,
        client: redis.Redis,
        run_id: str,
        config: ReplayConfig | None = None,
        agent_digest: str = "",
    ) -> None:
        """``agent_digest`` goes out with everything published here; a channel that only reads needs none."""
        self._client = client
        self._agent_digest = agent_digest
        keys = keys_of(run_id)
        self._key, self._tensors_key = keys.weights, keys.tensors
        self._outage = Outage(config or ReplayConfig())
        # Publications without a reply: they may have been stored all the same.
        self._unanswered: set[int] = set()

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Make ``tensors`` the latest weights; False, not taken, if the store is away.

        Raises:
            ValueError: ``version`` is not above the one published of this agent.
            ReplayUnavailable: the store has been away for ``max_outage_s``.
            UserError: it has had no memory left for as long.
        """
        if self._outage.pause_s > 0:
            return False
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        try:
            current = self._client.eval(
                _PUBLISH,
                2,
                *(self._key, self._tensors_key),
                *(str(version), repr(time.time()), content, self._agent_digest),
            )
        except redis.RedisError as error:
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
        """Whether the store has this agent's weights of ``version`` or later. True while it is away.

        A store that was restarted has none, or old ones: they are in no append-only file, unless it was
        rewritten since.

        Raises:
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        stored = self._fetch("version", "agent")
        if stored is None:
            return True
        latest = _version(stored[0])
        return latest is not None and latest >= version and stored[1] == self._agent_digest.encode()

    def fetch_newer(self, than: int, skip: int | None = None) -> VersionedWeights | None:
        """Return the latest weights if their version exceeds ``than`` and is not ``skip``.

        One tiny request if not.

        Raises:
            DamagedWeights: they cannot be read, or are not finite.
            ReplayUnavailable: the store has been away for ``max_outage_s``.
        """
        latest = self.latest_version()
        if latest is None or latest <= than or latest == skip:
            return None
        stored = self._fetch("version", "published_at_s", "agent", with_tensors=True)
        if stored is None or (version := _version(stored[0])) is None:  # away or deleted in between
            return None
        _, published_at_s, agent, content = stored
        try:
            weights = VersionedWeights(
                version, float(published_at_s or b""), load(content or b""), (agent or b"").decode()
            )
            bad = not_finite(weights.tensors)
        # What the library says to bytes that are no safetensors, to a dtype that torch does not have, …
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DamagedWeights(version, f"they cannot be read ({reason[:120]})") from error
        if bad:
            raise DamagedWeights(version, f"{', '.join(bad)}: not finite")
        return weights

    def latest_version(self) -> int | None:
        """Version of the latest weights; None before the first publication or while the store is away."""
        stored = self._fetch("version")
        return None if stored is None else _version(stored[0])

    def _fetch(self, *fields: str, with_tensors: bool = False) -> list[bytes | None] | None:
        """The stored fields, each None if there is none; None altogether while the store is away.

        The tensors, if asked for, come last, and are those of the other fields.
        """
        if self._outage.pause_s > 0:
            return None
        try:
            if with_tensors:
                both = self._client.pipeline(transaction=True)
                both.hmget(self._key, list(fields))
                both.get(self._tensors_key)
                values, content = both.execute()
                stored = [*values, content]
            else:
                stored = cast(list[bytes | None], self._client.hmget(self._key, list(fields)))
        except redis.RedisError as error:
            self._outage.failed(error)
            return None
        self._outage.ended()
        return stored


def _version(text: bytes | None) -> int | None:
    """A version as it is stored; None for anything else, which stands in nobody's way."""
    return int(text) if text is not None and re.fullmatch(rb"-?\d{1,18}", text) else None
