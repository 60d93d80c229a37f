"""The Valkey server of a cluster, on its head.

    python store.py start ADDRESS     listens on that address of this machine, behind a random password
    python store.py stop              ends it

The address with the password is in ``~/.mara/store_url``, which only its owner can read. Starting again while
the server runs changes nothing, so that runs in progress keep their episodes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import redis

from mara.buffer.connection import connect
from mara.buffer.server import find_server
from mara.common.errors import UserError

FOLDER = Path("~/.mara")
URL_FILE = "store_url"
LOG_FILE = "store.log"
READY_S = 30.0


def start(address: str, port: int, max_gib: float, folder: Path) -> None:
    """Start the server in the background and return once it answers.

    Raises:
        UserError: it does not start.
    """
    url_file = folder / URL_FILE
    if url_file.exists():
        url = urlsplit(url_file.read_text())
        if _is_running(url.geturl()) and (url.hostname, url.port) == (address, port):
            return
    stop(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = secrets.token_urlsafe(32)
    url_file.touch(mode=0o600)
    url_file.write_text(f"redis://:{password}@{address}:{port}")
    settings = [
        f"bind {address}",
        f"port {port}",
        f"requirepass {password}",
        "databases 1",
        "daemonize yes",
        f'logfile "{folder / LOG_FILE}"',
        f'dir "{folder}"',
        'save ""',
        f"maxmemory {int(max_gib * 2**30)}",
        "maxmemory-policy noeviction",
    ]
    # Settings on standard input: the password is in no list of processes.
    subprocess.run([find_server(), "-"], input="\n".join(settings).encode(), check=True)
    deadline = time.monotonic() + READY_S
    while not _is_running(url_file.read_text()):
        if time.monotonic() > deadline:
            raise UserError(f"no server came up at {address}:{port}; see {folder / LOG_FILE}")
        time.sleep(0.05)


def stop(folder: Path) -> None:
    """End the server that :func:`start` started and forget its password, if there is one."""
    url_file = folder / URL_FILE
    if not url_file.exists():
        return
    if _is_running(url := url_file.read_text()):
        with contextlib.suppress(redis.ConnectionError):  # That is how the server says goodbye.
            connect(url).shutdown(nosave=True)
    url_file.unlink()


def _is_running(url: str) -> bool:
    try:
        connect(url).close()
    except UserError:
        return False
    return True


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says; a mistake is one line on standard error and status 1."""
    parser = argparse.ArgumentParser(description="The Valkey server of a cluster, on its head.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where its address is kept (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("start", help="start it, unless it runs")
    starting.add_argument("address", help="private address of this machine, to listen on")
    starting.add_argument("--port", type=int, default=6379, help="TCP port (%(default)s)")
    starting.add_argument("--max-gib", type=float, default=4.0, help="most memory, GiB (%(default)s)")
    commands.add_parser("stop", help="end it")
    given = parser.parse_args(arguments)
    os.umask(0o077)
    folder = given.folder.expanduser().absolute()
    try:
        if given.command == "start":
            start(given.address, given.port, given.max_gib, folder)
        else:
            stop(folder)
    except UserError as error:
        sys.exit(f"store: {error}")


if __name__ == "__main__":
    main()
