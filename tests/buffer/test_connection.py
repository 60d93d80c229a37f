"""Every wrong address ends in one line: the setting, the value without its password, the remedy."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import redis
import torch

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import _signed, check_memory, check_stores, connect
from mara.buffer.keys import keys_of
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.runs import delete_run, stored_bytes
from mara.buffer.server import EmbeddedServer
from mara.buffer.shards import open_reader
from mara.buffer.weights import RedisWeightChannel
from mara.common.episode import Episode
from mara.common.errors import UserError

SECRET = "s3cr3t-w0rd"


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedServer]:
    """A server whose settings the tests may change."""
    with EmbeddedServer(max_bytes=64 << 20) as running:
        yield running


@pytest.fixture
def roomy_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(max_bytes=4 << 30) as running:
        yield running


def refused(url: str, timeout_s: float = 2.0) -> str:
    with pytest.raises(UserError) as caught:
        connect(url, timeout_s)
    message = str(caught.value)
    assert message.startswith("replay.redis_url: ")
    assert "; " in message
    assert "\n" not in message
    for secret in (SECRET, url.partition("//:")[2].partition("@")[0]):
        assert not secret or secret not in message
    return message


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_client_returns_bytes_and_leaves_retrying_to_its_user(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    client.set("key", "value")
    assert client.get("key") == b"value"
    assert client.get_retry().get_retries() == 0


@pytest.mark.parametrize("url", ["http://host:1", "localhost:6379", "REDIS://h", "", "redis:/h"])
def test_another_scheme_is_refused(url: str) -> None:
    assert "write redis://, rediss:// or unix://" in refused(url)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host:port/0",
        f"redis://:{SECRET}@host:99999/0",
        f"redis://:{SECRET}/more@host:6379/0",
        f"redis://:{SECRET}#more@host:6379/0",
        f"redis://:more?{SECRET}@host:6379/0",
        f"redis://:{SECRET}@[::1",
    ],
)
def test_an_address_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    assert "cannot be read; check the port" in refused(url)


@pytest.mark.parametrize("url", [f"redis://:{SECRET}@host/zero", "redis://host/0/1"])
def test_a_database_that_is_no_number_is_refused(url: str) -> None:
    assert "where the database number belongs" in refused(url)


def test_nobody_at_the_address(closed_port: int, tmp_path: Path) -> None:
    message = refused(f"redis://user:{SECRET}@127.0.0.1:{closed_port}/0")
    assert f"redis://user:***@127.0.0.1:{closed_port}/0 cannot be used (" in message
    assert "refused" in message
    assert f"{tmp_path}/none.sock cannot be used" in refused(f"unix://:{SECRET}@{tmp_path}/none.sock")
    assert "names no socket" in refused("unix://")


def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        message = refused(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3)
        assert "did not answer within 0.3 s" in message
        assert time.monotonic() - began < 30


def test_something_else_than_redis_at_the_address() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        message = refused(f"redis://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert f":{server.server_port} does not answer as Redis or Valkey does; correct the address" in message


def test_nobody_at_an_address_with_tls(closed_port: int) -> None:
    assert "cannot be used" in refused(f"rediss://127.0.0.1:{closed_port}")


@pytest.mark.parametrize("credentials", ["", f":{SECRET}@", f"nobody:{SECRET}@"])
def test_a_wrong_or_missing_password(own_server: EmbeddedServer, credentials: str) -> None:
    path = own_server.url.rpartition("@")[2]
    message = refused(f"unix://{credentials}{path}")
    assert f"{path} refuses the user name or password; correct them" in message


def test_a_password_where_none_is_set(own_server: EmbeddedServer) -> None:
    owner = connect(own_server.url)
    password = own_server.url.partition("//:")[2].partition("@")[0]
    path = own_server.url.rpartition("@")[2]
    owner.config_set("requirepass", "")
    try:
        assert "refuses the user name or password" in refused(f"unix://:{SECRET}@{path}")
    finally:
        owner.config_set("requirepass", password)


def test_a_database_that_the_server_does_not_have(own_server: EmbeddedServer) -> None:
    assert "has no such database; give one that it has, usually 0" in refused(f"{own_server.url}?db=7")


def test_an_option_that_nobody_knows(own_server: EmbeddedServer) -> None:
    assert "has an option after '?' that cannot be used" in refused(f"{own_server.url}?colour=blue")


def memory_refused(server: EmbeddedServer, needed_bytes: int) -> str:
    with pytest.raises(UserError) as caught:
        check_memory(connect(server.url), server.url, needed_bytes)
    message = str(caught.value)
    assert message.startswith(f"replay.redis_url: unix://:***@{server.url.rpartition('@')[2]} has maxmemory")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_a_server_that_evicts_is_refused(own_server: EmbeddedServer, policy: str) -> None:
    owner = connect(own_server.url)
    owner.config_set("maxmemory-policy", policy)
    try:
        message = memory_refused(own_server, needed_bytes=1)
        assert f"has maxmemory-policy {policy}" in message
        assert "set it to noeviction" in message
    finally:
        owner.config_set("maxmemory-policy", "noeviction")


def test_a_server_with_less_memory_than_the_run_needs_is_refused(own_server: EmbeddedServer) -> None:
    message = memory_refused(own_server, needed_bytes=(64 << 20) + 1)
    assert "has maxmemory 67108864, this run needs 67108865 bytes; raise it or lower replay." in message
    check_memory(connect(own_server.url), own_server.url, needed_bytes=64 << 20)


def test_what_earlier_runs_left_on_a_server_takes_its_room(
    own_server: EmbeddedServer, make_episode: Callable[..., Episode]
) -> None:
    with connect(own_server.url) as client:
        RedisEpisodeLog(client, "old", ReplayConfig()).append(
            [make_episode(uid=str(number), num_tokens=50, hidden_size=4096) for number in range(20)]
        )
        old_bytes = stored_bytes(client, "old", [0])
        assert old_bytes > 4 << 20
        message = memory_refused(own_server, needed_bytes=60 << 20)
        taken = int(message.partition("of which other data take ")[2].split(",")[0])
        assert 0.9 * old_bytes <= taken < 1.3 * old_bytes  # the server takes buffers off, at another time
        shown = f"unix://:***@{own_server.url.rpartition('@')[2]}"
        assert f"needs {60 << 20} bytes; delete old runs (`mara store list {shown}` shows them)" in message
        check_memory(client, own_server.url, (64 << 20) - 2 * old_bytes)
        # A run that goes on has what it stored before.
        check_memory(client, own_server.url, 60 << 20, old_bytes)
        assert delete_run(client, "old") == 20 + 3
        check_memory(client, own_server.url, 60 << 20)


@pytest.mark.parametrize(("printed", "bytes_"), [(0, 0), (5 << 20, 5 << 20), (18446744073709375070, -176546)])
def test_what_a_server_counts_below_zero_is_no_room_that_others_take(printed: int, bytes_: int) -> None:
    # The last is what a server really printed just after its only run was deleted.
    assert _signed(printed) == bytes_


@pytest.mark.parametrize("policy", ["allkeys-lru", "noeviction"])
def test_a_server_without_a_limit_never_evicts_and_has_room(own_server: EmbeddedServer, policy: str) -> None:
    owner = connect(own_server.url)
    owner.config_set("maxmemory-policy", policy)
    owner.config_set("maxmemory", 0)
    try:
        check_memory(owner, own_server.url, needed_bytes=1 << 40)
    finally:
        owner.config_set("maxmemory", 64 << 20)
        owner.config_set("maxmemory-policy", "noeviction")


def test_a_server_that_evicts_only_what_expires_keeps_a_run(own_server: EmbeddedServer) -> None:
    owner = connect(own_server.url)
    owner.config_set("maxmemory-policy", "volatile-lru")
    try:
        check_memory(owner, own_server.url, needed_bytes=1)
    finally:
        owner.config_set("maxmemory-policy", "noeviction")


def does_everything_a_run_does(url: str, make_episode: Callable[..., Episode]) -> None:
    run_id = f"run-{secrets.token_hex(4)}"
    config = ReplayConfig(redis_url=url)
    check_stores(config, num_actors=1)
    RedisEpisodeLog(connect(url), run_id, config).append([make_episode(uid="a")])
    connect(url).xadd(keys_of(run_id).episodes, {"e": b"garbage"})
    reader = open_reader([connect(url)], run_id, config)
    assert [episode.uid for episode in reader.read(5, 0)] == ["a"]
    assert reader.counts.num_quarantined == 1
    channel = RedisWeightChannel(connect(url), run_id, config)
    assert channel.publish(1, {"w": torch.ones(3)})
    newer = channel.fetch_newer(than=0)
    assert newer is not None and newer.version == 1


def test_a_user_with_rights_on_our_keys_alone_can_do_everything_a_run_does(
    roomy_server: EmbeddedServer, make_episode: Callable[..., Episode]
) -> None:
    owner = connect(roomy_server.url)
    owner.acl_setuser("mara", enabled=True, passwords=[f"+{SECRET}"], categories=["+@all"], keys=["mara:*"])
    path = roomy_server.url.rpartition("@")[2]
    does_everything_a_run_does(f"unix://mara:{SECRET}@{path}", make_episode)
    with pytest.raises(redis.exceptions.NoPermissionError):
        connect(f"unix://mara:{SECRET}@{path}").get("another:key")


def test_an_encrypted_connection_can_do_everything_a_run_does(
    roomy_server: EmbeddedServer, tmp_path: Path, make_episode: Callable[..., Episode]
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    make += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    credentials, _, path = roomy_server.url.removeprefix("unix://").rpartition("@")
    with encrypted(path, certificate, key) as port:
        address = f"rediss://{credentials}@localhost:{port}"
        does_everything_a_run_does(f"{address}?ssl_ca_certs={certificate}", make_episode)
        assert "cannot be used" in refused(address)  # signed by nobody that this machine trusts


@contextlib.contextmanager
def encrypted(server_path: str, certificate: Path, key: Path) -> Iterator[int]:
    """The port of a TLS end before a server that may have been built without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server_path)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield listener.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    listener.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_a_server_that_refuses_writes(own_server: EmbeddedServer) -> None:
    owner = connect(own_server.url)
    owner.replicaof("127.0.0.1", "1")
    try:
        assert "is a read-only replica; give the address of the primary" in refused(own_server.url)
    finally:
        owner.replicaof("no", "one")
    owner.config_set("maxmemory", 1)
    try:
        assert "is full; raise its maxmemory" in refused(own_server.url)
    finally:
        owner.config_set("maxmemory", 64 << 20)
    owner.acl_setuser("reader", enabled=True, passwords=[f"+{SECRET}"], categories=["+@read"], keys=["*"])
    path = own_server.url.rpartition("@")[2]
    assert "refuses a command" in refused(f"unix://reader:{SECRET}@{path}")
    assert isinstance(connect(own_server.url), redis.Redis)
