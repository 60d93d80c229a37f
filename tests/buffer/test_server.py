"""The embedded server: reachable by us alone, gone when we are."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mara.buffer import server as server_module
from mara.buffer.connection import connect
from mara.buffer.server import EmbeddedServer, find_server
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
    shutil.rmtree(Path(path).parent)
    with EmbeddedServer(max_bytes=1 << 26, data_dir=data_dir) as successor:
        assert connect(successor.url).get("kept") == (b"yes" if durable else None)


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
