"""Signs of life on a real server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from mara.buffer import lease
from mara.buffer.connection import connect
from mara.buffer.lease import hold_lease, holders
from mara.buffer.server import EmbeddedServer

HOLD = """
import sys, time
from mara.buffer.lease import hold_lease
with hold_lease([sys.argv[1]], sys.argv[2], "writes", 5.0):
    print("held", flush=True)
    time.sleep(600)
"""


def test_whoever_uses_a_run_is_seen_until_it_ends(
    server: EmbeddedServer, client: redis.Redis, run_id: str
) -> None:
    assert holders(client, run_id) == []
    with hold_lease([server.url], run_id, "reads", 5.0), hold_lease([server.url] * 2, run_id, "writes", 5.0):
        found = holders(client, run_id)
        assert [holder.use for holder in found] == ["writes", "reads"]
        assert str(found[0]) == f"process {os.getpid()} on {socket.gethostname()}"
        assert 50 < found[0].seconds_left <= 60
        assert holders(client, run_id + "0") == []
    assert holders(client, run_id) == []


def test_one_that_was_killed_on_this_machine_is_gone_at_once_and_elsewhere_in_a_minute(
    server: EmbeddedServer, client: redis.Redis, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, server.url, run_id], stdout=subprocess.PIPE, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert [holder.pid for holder in holders(client, run_id)] == [process.pid]
        process.send_signal(signal.SIGKILL)
    assert holders(client, run_id) == []
    monkeypatch.setattr(lease, "_machine", lambda: "another container, of the same host name")
    (holder,) = holders(client, run_id)
    assert 0 < holder.seconds_left <= 60
    assert 0 < client.pttl(next(client.scan_iter(f"mara:{run_id}:*"))) <= 60_000


def test_a_process_that_got_the_number_of_a_killed_one_is_not_taken_for_it(
    server: EmbeddedServer, client: redis.Redis, run_id: str
) -> None:
    with hold_lease([server.url], run_id, "writes", 5.0):
        (key,) = client.scan_iter(f"mara:{run_id}:*")
        *same, started = json.loads(client.get(key) or b"")
        client.set(key, json.dumps([*same, started - 1]), px=60_000)
        assert holders(client, run_id) == []
        client.set(key, json.dumps([*same, started]), px=60_000)
        assert [holder.pid for holder in holders(client, run_id)] == [os.getpid()]


def test_one_that_was_killed_and_is_not_buried_yet_is_gone(
    server: EmbeddedServer, client: redis.Redis, run_id: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, server.url, run_id], stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # its end: it is dead, and nobody has asked for its status
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert holders(client, run_id) == []


def test_a_lease_outlasts_a_full_server_and_comes_back_after_it_was_lost(
    run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW_S", 0.02)
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    with (
        EmbeddedServer(8 << 20) as own,
        connect(own.url) as client,
        hold_lease([own.url], run_id, "writes", 5),
    ):
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.OutOfMemoryError):
            client.set("a", "b")
        client.execute_command("WAIT", 1, 1500)  # longer than the lease would last by itself
        assert len(holders(client, run_id)) == 1
        client.config_set("maxmemory", 8 << 20)
        client.flushall()
        deadline = time.monotonic() + 20
        while not (found := holders(client, run_id)):
            assert time.monotonic() < deadline
            client.execute_command("WAIT", 1, 20)
        assert len(found) == 1
