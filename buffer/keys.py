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
    """Stream: one entry per episode, its record under ``e``."""
    sizes: str
    """List: ``entry id|bytes|uid`` of every stream entry, oldest first."""
    uids: str
    """Set: the uid of every stream entry."""
    nbytes: str
    """Integer: the sum of the bytes."""
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
