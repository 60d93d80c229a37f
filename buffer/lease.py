"""Signs of life of those who use a run's keys, on each server that has some.

Nothing else on a server tells a run that goes on from one that was killed. A lease is a key that expires, and
that its holder puts off for as long as it lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

import redis

from mara.buffer.connection import connect
from mara.buffer.keys import keys_of

LEASE_S = 60.0
"""How long after its last sign of life somebody counts as alive, seconds."""
_RENEW_S = 10.0

Use = Literal["writes", "reads"]


class Holder(NamedTuple):
    """Somebody who uses a run's keys."""

    use: Use
    """``writes``: the run itself. ``reads``: one that trains on its episodes."""
    host: str
    pid: int
    machine: str | None
    """Where the number means something: start of the machine and namespace of numbers; None: unknown."""
    started: int | None
    """When the process began, in ticks since that start: another one may get its number."""
    seconds_left: float
    """Until it counts as dead, unless it shows that it lives."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def hold_lease(urls: Sequence[str], run_id: str, use: Use, timeout_s: float) -> Iterator[None]:
    """Show on the servers at ``urls`` that this process uses the keys of run ``run_id``.

    A thread does so every ten seconds, whatever the process waits for. A server that is away or full
    meanwhile is tried again the next time.

    Raises:
        UserError: a server cannot be used at the start.
    """
    key = f"{keys_of(run_id).lease}:{secrets.token_hex(8)}"
    value = json.dumps([use, socket.gethostname(), os.getpid(), _machine(), _started(os.getpid())])
    ended = threading.Event()
    with ExitStack() as exits:
        clients = [exits.enter_context(connect(url, timeout_s)) for url in dict.fromkeys(urls)]

        def renew() -> None:
            for client in clients:
                with contextlib.suppress(redis.RedisError):
                    _renew(client, key, value)

        def keep() -> None:
            while not ended.wait(_RENEW_S):
                renew()

        renew()
        thread = threading.Thread(target=keep, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for client in clients:
                with contextlib.suppress(redis.RedisError):
                    client.delete(key)


def holders(client: redis.Redis, run_id: str) -> list[Holder]:
    """Who uses the keys of run ``run_id`` on this server. One that was killed on this machine does not.

    Raises:
        redis.RedisError: the server cannot be asked.
    """
    found = []
    for key in client.scan_iter(f"{keys_of(run_id).lease}:*", count=1000):
        value, left_ms = client.get(key), client.pttl(key)
        try:
            use, host, pid, machine, started = json.loads(value or b"")
            holder = Holder(use, host, int(pid), machine, started, max(0, left_ms) / 1000)
        except (ValueError, TypeError):  # it has ended meanwhile, or somebody else wrote that
            continue
        if holder.machine is None or holder.machine != _machine() or _lives(holder):
            found.append(holder)
    return sorted(found, key=lambda holder: holder.use, reverse=True)


def _renew(client: redis.Redis, key: str, value: str) -> None:
    # Putting it off needs no memory: also the lease of a run that has filled its server stays.
    if not client.pexpire(key, int(LEASE_S * 1000)):
        client.set(key, value, px=int(LEASE_S * 1000))


def _machine() -> str | None:
    """This start of this machine, and the namespace in which this process has its number.

    Containers can share a host name and have numbers of their own. None where the system does not tell.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the start of the machine; -1 for one that has ended and is not
    buried yet, None where the system does not tell.
    """
    try:
        # The name, in parentheses, may hold anything. Then come the state and, 19 fields later, the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _lives(holder: Holder) -> bool:
    """Whether a holder on this machine is the process that has its number now."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    started = _started(holder.pid)
    return started is None or holder.started is None or started == holder.started
