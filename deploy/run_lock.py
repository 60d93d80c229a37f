"""Whether a run goes on: its process holds a lock in its folder, and loses it however it ends.

The file goes with the lock. That of a process that was killed stays, and means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mara.common.errors import UserError

LOCK = "running.lock"
PREDECESSOR_S = 30.0
"""Longest wait for the learner of a run that was killed to end, seconds."""
_LOOK_S = 0.1
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def hold_run(
    folder: Path, wait_s: float = 0.0, pause: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Keep others from running in ``folder``, and from taking its episodes for those of a finished run.

    Waits up to ``wait_s`` seconds for a process that ends. ``pause`` waits for a number of seconds, and may
    raise to end the waiting.

    Raises:
        UserError: another process holds it, or its file system has no locks.
        OSError: it cannot be written.
    """
    # Somebody who only looks holds it for a moment.
    deadline = time.monotonic() + max(wait_s, 2 * _LOOK_S)
    path = folder / LOCK
    while (descriptor := _take(path)) is None:
        if time.monotonic() >= deadline:
            raise UserError(f"{folder} is in use: its run goes on ({_shown(folder)}); wait for its end")
        pause(_LOOK_S)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_same(path, descriptor):  # A person may have removed it, and another run made its own.
                path.unlink()  # while it is held
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


def _take(path: Path) -> int | None:
    """A descriptor of the file ``path`` with its lock; None if another process has that."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        is_ours = False
        try:
            if not _locked(descriptor):
                return None
            # Whoever held it may have removed the file since it was opened: then this is the lock of nothing.
            is_ours = _is_same(path, descriptor)
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _locked(descriptor: int) -> bool:
    """Lock the file for this process alone; whether nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        raise UserError(
            f"run.dir: its file system has no file locks ({error.strerror}); choose a folder on another one"
        ) from error
    return True


def _shown(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is being written
        return f"see {folder / LOCK}"
