"""Names of everything a run keeps in the store."""

from __future__ import annotations

import re
from typing import NamedTuple

from mara.common.errors import UserError

PROBE = "mara:probe"
"""Written for a second by every connection, to see that it may write."""


class Keys(NamedTuple):
    """The keys of one shard of a run; all share the prefix ``mara:RUN:``, which an access rule can name."""

    episodes: str
    """Stream: one small entry per episode. ``u`` is its uid, ``s`` the bytes of its record, ``n`` its number
    among all that were ever appended, ``d`` how many duplicates had come until then."""
    record: str
    """String ``mara:RUN:SHARD:record:UID`` for each episode: its record; not in the log while it expires."""
    nbytes: str
    """Integer: the sum of the bytes of the records in the log."""
    counts: str
    """Hash: how many episodes were ever ``appended``, and how many were ``duplicates`` of stored ones."""
    quarantine: str
    """Stream, bounded: records that could not be decoded, each with the reason. One for each server."""
    weights: str
    """Hash: version, time of publication and digest of the latest agent. Only where the first shard is."""
    tensors: str
    """String: its tensors, beside it."""
    lease: str
    """String ``mara:RUN:lease:TOKEN`` for each process that uses these keys, on each server; expires."""


def keys_of(run_id: str, shard: int = 0) -> Keys:
    """The keys of shard ``shard``, from 0, of run ``run_id``: letters, digits, ``.``, ``_`` and ``-``."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", run_id):
        raise UserError(
            f"run id {run_id!r} cannot name keys in the store; use up to 128 letters, digits, '.', '_', '-'"
        )
    shared = ("quarantine", "weights", "tensors", "lease")
    return Keys(
        *(
            f"mara:{run_id}:{name}" if name in shared else f"mara:{run_id}:{shard}:{name}"
            for name in Keys._fields
        )
    )
