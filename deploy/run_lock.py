"""Whether a run goes on: its process holds a lock in its folder, and loses it however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mara.common.errors import UserError

LOCK = "running.lock"
_LOOK_S = 0.1


@contextmanager
def hold_run(folder: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Keep others from running in ``folder``, and from taking its episodes for those of a finished run.

    Waits up to ``wait_s`` seconds for a process that ends.

    Raises:
        UserError: another process holds it.
        OSError: it cannot be written, or its file system has no locks.
    """
    deadline = time.monotonic() + wait_s
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        while not _locked(descriptor):
            if time.monotonic() >= deadline:
                raise UserError(f"{folder} is in use: its run goes on ({_shown(folder)}); wait for its end")
            time.sleep(_LOOK_S)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        yield
    finally:
        os.close(descriptor)  # releases the lock


def who_runs(folder: Path) -> str | None:
    """The process that runs in ``folder``, in a few words; None if none does.

    Raises:
        OSError: that cannot be found out.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _shown(folder)
    finally:
        os.close(descriptor)
    return None


def _locked(descriptor: int) -> bool:
    """Lock the file for this process alone; whether nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _shown(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is being written
        return f"see {folder / LOCK}"
