"""The embedded server: reachable by us alone, gone when we are."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from mara.buffer import server as server_module
from mara.buffer.config import ReplayConfig
from mara.buffer.connection import _Packer, connect
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.server import EmbeddedServer, find_server
from mara.common.episode import Episode
from mara.common.errors import UserError


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than an entry waiting for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def socket_of(server: EmbeddedServer) -> Path:
    return Path(server.url.rpartition("@")[2])


def test_the_server_answers_and_has_the_bounds_it_was_given(server: EmbeddedServer) -> None:
    settings = connect(server.url).config_get("maxmemory*", "appendonly", "save", "port")
    assert settings["maxmemory"] == str(256 << 20)
    assert settings["maxmemory-policy"] == "noeviction"
    assert (settings["appendonly"], settings["save"], settings["port"]) == ("no", "", "0")


def test_only_this_user_reaches_the_socket_and_only_with_the_password(server: EmbeddedServer) -> None:
    folder = socket_of(server).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket_of(server).stat().st_mode) == 0o700
    with pytest.raises(UserError, match="refuses the user name or password"):
        connect(f"unix://{socket_of(server)}")


def test_the_password_is_in_no_file_and_no_process_list(server: EmbeddedServer) -> None:
    password = server.url.partition("//:")[2].partition("@")[0]
    assert len(password) >= 32
    command = Path(f"/proc/{server.pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{server.pid}/environ").read_bytes()
    assert password.encode() not in command + environment
    for file in socket_of(server).parent.iterdir():
        if file.is_file():
            assert password.encode() not in file.read_bytes()


def test_an_interrupt_of_the_terminal_does_not_reach_the_server(server: EmbeddedServer) -> None:
    assert server.pid is not None
    assert os.getsid(server.pid) != os.getsid(0)


def test_stopping_leaves_nothing_behind() -> None:
    server = EmbeddedServer(max_bytes=1 << 26)
    server.start()
    pid, folder = server.pid, socket_of(server).parent
    assert pid is not None and is_running(pid)
    server.stop()
    server.stop()
    assert server.pid is None
    assert not is_running(pid)
    assert not folder.exists()


def test_a_forked_child_does_not_stop_its_parents_server(server: EmbeddedServer) -> None:
    child = os.fork()
    if child == 0:
        server.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert connect(server.url).ping()


def test_a_killed_server_starts_again_at_the_same_address_with_its_data(
    durable_server: EmbeddedServer,
) -> None:
    url = durable_server.url
    client = connect(url)
    client.set("kept", "yes")
    client.execute_command("WAITAOF", 1, 0, 10_000)  # on the disk: the last second may be lost
    client.close()
    assert durable_server.pid is not None
    os.kill(durable_server.pid, signal.SIGKILL)
    assert wait_for(lambda: durable_server.pid is None)
    durable_server.start()
    assert durable_server.url == url
    assert connect(url).get("kept") == b"yes"


@pytest.mark.parametrize("durable", [False, True])
def test_the_server_dies_with_a_parent_that_is_killed(tmp_path: Path, durable: bool) -> None:
    data_dir = tmp_path if durable else None
    receive, send = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            orphan = EmbeddedServer(max_bytes=1 << 26, data_dir=data_dir)
            orphan.start()
            connect(orphan.url).set("kept", "yes")
            os.write(send, f"{orphan.pid} {socket_of(orphan)}\n".encode())
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(send)
    with open(receive) as pipe:
        pid, path = pipe.readline().split()
    assert is_running(int(pid))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert wait_for(lambda: not is_running(int(pid)))
    assert Path(path).parent.is_dir()
    # The next start removes what the killed one left, and nothing of those that live.
    with EmbeddedServer(max_bytes=1 << 26) as living, EmbeddedServer(1 << 26, data_dir) as successor:
        assert not Path(path).parent.exists()
        assert connect(living.url).ping()
        assert connect(successor.url).get("kept") == (b"yes" if durable else None)


def test_no_two_servers_write_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_READY_S", 0.2)
    with (
        EmbeddedServer(max_bytes=1 << 26, data_dir=tmp_path),
        pytest.raises(UserError, match="another server uses"),
        EmbeddedServer(max_bytes=1 << 26, data_dir=tmp_path),
    ):
        pass


SCRIPT = """
from mara.buffer.server import EmbeddedServer
server = EmbeddedServer(max_bytes=1 << 26)
server.start()
print(server.pid, server.url.rpartition("@")[2])
"""


def test_the_server_ends_with_an_interpreter_that_forgot_it() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    pid, path = done.stdout.split()
    assert wait_for(lambda: not is_running(int(pid)))
    assert not Path(path).parent.exists()


@pytest.fixture
def slow_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedServer:
    """A server, not started, that takes 2 to 3 s to load its file."""
    with EmbeddedServer(1 << 26, tmp_path / "store") as before, connect(before.url) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(10_000):
            pipeline.set(f"k{number}", "x" * 100)
        pipeline.set("last", "yes")
        pipeline.execute()
    settings = EmbeddedServer._settings
    slow = "key-load-delay 200\n"
    monkeypatch.setattr(EmbeddedServer, "_settings", lambda self, folder: settings(self, folder) + slow)
    monkeypatch.setattr(server_module, "_READY_S", 1.0)
    monkeypatch.setattr(server_module, "_ANSWER_S", 1.0)
    return EmbeddedServer(1 << 26, tmp_path / "store")


def test_a_server_is_waited_for_as_long_as_it_goes_on_loading(slow_file: EmbeddedServer) -> None:
    seen = list[server_module.Loading]()

    def look(loading: server_module.Loading) -> bool:
        seen.append(loading)
        return True

    began = time.monotonic()
    try:
        slow_file.start(look)
        assert time.monotonic() - began > 2 * server_module._READY_S
        assert connect(slow_file.url).get("last") == b"yes"
    finally:
        slow_file.stop()
    assert len(seen) > 5
    assert 0 <= seen[0].loaded_bytes < seen[-1].loaded_bytes <= seen[-1].total_bytes > 1_000_000
    assert str(server_module.Loading(1 << 29, 1 << 30)) == "50% of 1.0 GiB"


def test_a_server_that_stops_loading_is_given_up(slow_file: EmbeddedServer) -> None:
    def hang(_loading: server_module.Loading) -> bool:
        assert slow_file.pid is not None
        os.kill(slow_file.pid, signal.SIGSTOP)
        threading.Timer(3.0, os.kill, (slow_file.pid, signal.SIGCONT)).start()  # so that it can be ended
        return True

    with pytest.raises(UserError, match="the embedded server did not start"):
        slow_file.start(hang)
    assert slow_file.pid is None


def test_who_does_not_wait_finds_the_server_later(
    slow_file: EmbeddedServer, make_episode: Callable[..., Episode]
) -> None:
    """A writer, too, waits longer than a store may be away."""
    slow_file.start(lambda _loading: False)
    try:
        client = redis.Redis.from_url(slow_file.url, command_packer=_Packer())
        with pytest.raises(redis.BusyLoadingError):
            client.get("last")
        log = RedisEpisodeLog(client, "r", ReplayConfig(retry_longest_s=0.1, max_outage_s=0.3))
        log.append([make_episode()])
        assert client.get("last") == b"yes"
    finally:
        slow_file.stop()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").mkdir()
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")
    server = EmbeddedServer(max_bytes=1 << 26, data_dir=tmp_path)
    with pytest.raises(UserError, match=r"did not start \(.*(manifest|AOF|line).*\); free memory") as caught:
        server.start()
    assert "\n" not in str(caught.value)
    assert server.pid is None


def test_a_long_folder_for_temporary_files_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with EmbeddedServer(max_bytes=1 << 26) as server:
        assert connect(server.url).ping()


def test_a_data_folder_may_have_blanks_and_quotes_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / 'my "own" store'
    with EmbeddedServer(max_bytes=1 << 26, data_dir=folder) as server:
        connect(server.url).set("a", 1)
    assert any((folder / "appendonlydir").iterdir())


def test_without_the_package_the_server_comes_from_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no server to start; install one .* or give replay\.redis_url"):
        find_server()
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_server() == str(program)
