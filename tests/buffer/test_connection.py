"""Every wrong address ends in one line: the setting, the value without its password, the remedy."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from mara.buffer.connection import check_memory, connect
from mara.buffer.server import EmbeddedServer
from mara.common.errors import UserError

SECRET = "s3cr3t-w0rd"


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedServer]:
    """A server whose settings the tests may change."""
    with EmbeddedServer(max_bytes=64 << 20) as running:
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
        assert time.monotonic() - began < 3


def test_something_else_than_redis_at_the_address(own_server: EmbeddedServer, closed_port: int) -> None:
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
