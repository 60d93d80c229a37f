"""Names of everything a run keeps in the store."""

from __future__ import annotations

import re
from typing import NamedTuple

from mara.common.errors import UserError

PROBE = "mara:probe"
"""Written for a second by every connection, to see that it may write."""


class Keys(NamedTuple):
    """The keys of one run; they share the prefix ``mara:RUN:``, which an access rule can name."""

    episodes: str
    """Stream: one small entry per episode. ``u`` is its uid, ``s`` the bytes of its record, ``n`` its number
    among all that were ever appended, ``d`` how many duplicates had come until then."""
    record: str
    """String ``mara:RUN:record:UID`` for each episode: its record. One that expires is not in the log yet."""
    nbytes: str
    """Integer: the sum of the bytes of the records in the log."""
    counts: str
    """Hash: how many episodes were ever ``appended``, and how many were ``duplicates`` of stored ones."""
    quarantine: str
    """Stream, bounded: records that could not be decoded, each with the reason."""
    weights: str
    """Hash: version, time of publication and tensors of the latest agent."""


def keys_of(run_id: str) -> Keys:
    """The keys of run ``run_id``, which may hold letters, digits, ``.``, ``_`` and ``-``."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", run_id):
        raise UserError(
            f"run id {run_id!r} cannot name keys in the store; use up to 128 letters, digits, '.', '_', '-'"
        )
    return Keys(*(f"mara:{run_id}:{name}" for name in Keys._fields))
