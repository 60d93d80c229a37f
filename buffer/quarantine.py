"""Records that could not be decoded, kept so that somebody can find out where they came from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import redis

from mara.buffer.config import QUARANTINE_ENTRIES, QUARANTINE_RECORD_BYTES
from mara.buffer.keys import keys_of

_log = logging.getLogger(__name__)


class Refused(NamedTuple):
    """A record that could not be decoded."""

    origin: str
    """Its stream and the id of its entry there."""
    why: str
    """One line."""
    record: bytes


class Quarantine:
    """A stream of copies on the server the records came from; looked at by people, read by no part of a run.

    Each entry has the start of the record under ``e``, the reason under ``why``, where it was read under
    ``from``, and the size of the whole record, in bytes, under ``size``. At most
    :data:`~mara.buffer.config.QUARANTINE_ENTRIES` are kept, each with at most
    :data:`~mara.buffer.config.QUARANTINE_RECORD_BYTES` of its record, which bounds the bytes too: 4 MiB.
    """

    def __init__(self, client: redis.Redis, run_id: str) -> None:
        self._client = client
        self._stream = keys_of(run_id).quarantine
        self._warned = False
        self.num_kept = 0
        """Copies the server has taken, those that went to make room since then included."""

    def keep(self, refused: Sequence[Refused]) -> None:
        """Copy the records, in one round trip. A server that is away or full takes none, and nobody minds.

        Nothing of a run depends on the copies, so whatever a server answers is no reason to stop reading.
        """
        if not refused:
            return
        pipeline = self._client.pipeline(transaction=False)
        for one in refused[-QUARANTINE_ENTRIES:]:
            fields: dict[bytes | str, bytes | str | int] = {
                "e": one.record[:QUARANTINE_RECORD_BYTES],
                "why": one.why,
                "from": one.origin,
                "size": len(one.record),
            }
            pipeline.xadd(self._stream, fields, maxlen=QUARANTINE_ENTRIES, approximate=False)  # type: ignore[arg-type]
        try:
            replies = pipeline.execute(raise_on_error=False)
        except redis.RedisError as error:
            replies = [error]
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        self.num_kept += len(replies) - len(errors)
        if errors and not self._warned:
            self._warned = True
            _log.warning("a record that was skipped could not be copied to %s: %s", self._stream, errors[0])
