"""A Ray node on this machine that belongs to one run: starts, waits for its standard input to close, ends.

It is a process in a session of its own, so a signal to the run's process group (Ctrl-C, ``timeout``) reaches
the run and not the processes the run still needs to save its work. Its standard input is a pipe from the run:
when the run ends, even by SIGKILL, the pipe closes and everything here ends too.

    python -m mara.deploy.ray_head FOLDER NUM_CPUS      prints the address of the node

Everything listens on the loopback interface only, behind a token made for this run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mara.deploy.exit import RunFailed

if TYPE_CHECKING:
    from mara.deploy.progress import Progress
    from mara.deploy.topology import Cluster

# Ray keeps at least this much; nothing large travels through Ray here.
OBJECT_STORE_BYTES = 100 * 2**20
STOP_S = 15.0

LOOPBACK_ENVIRONMENT = {
    # Without clusters Ray takes 127.0.0.1 as the node's address, and every part of it binds to that. The name
    # of the setting comes from the platforms where this is the default.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # Ray gives way to everything else on the machine by default; here its workers are the job.
    "RAY_worker_niceness": "0",
    # Workers are started when an actor needs one, not one for each core in advance.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}


class RayHead:
    """Owns the process of a Ray node for this run."""

    address: str
    """Of the node, once it was started."""

    def __init__(self, num_cpus: int, log_file: Path) -> None:
        """Prepare a node with ``num_cpus`` cores to give away; nothing runs before :meth:`start`.

        Ray places by that number and waits where it is too small. Processes that share cores are slow, not
        wrong, so it may exceed the cores there are.
        """
        self._num_cpus = num_cpus
        self._log_file = log_file
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None

    def start(self) -> None:
        """Start the node. Blocks for seconds. Ray must not have been imported in this process yet.

        Raises:
            RunFailed: it does not start.
        """
        assert "ray" not in sys.modules, "Ray reads its environment when it is imported"
        os.environ.update(LOOPBACK_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
        os.environ.pop("RAY_ADDRESS", None)
        # Unix sockets have short names: the folder must be near the root.
        self._folder = tempfile.mkdtemp(prefix="mara-ray-", dir="/tmp")
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mara.deploy.ray_head", self._folder, str(self._num_cpus)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().decode().strip()
        if not self.address:
            raise RunFailed(f"Ray did not start on this machine; see {self._log_file}")

    def stop(self) -> None:
        """End the node and everything it started, also while it starts. Does nothing twice or before."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)
        # What Ray left behind shares the session of its node.
        for survivor in _session(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        process.wait()
        if self._folder is not None:  # A node that was killed could not do it.
            shutil.rmtree(self._folder, ignore_errors=True)


def open_cluster(
    address: str | None, num_cpus: int, log_file: Path, progress: Progress, exits: ExitStack
) -> Cluster:
    """The cluster at ``address``, or one of the run's own on this machine; ``exits`` leaves or ends it.

    Raises:
        StoppedEarly: a signal has come.
        UserError: there is no cluster at the address.
        RunFailed: Ray does not start here.
    """
    is_own = address is None
    if address is None:
        progress.state("starting Ray")
        head = RayHead(num_cpus, log_file)
        exits.callback(head.stop)
        progress.wait_for(head.start, may_be_left=True)
        address = head.address
    progress.state("joining the Ray cluster")
    from mara.deploy.topology import Cluster  # Imports Ray, after the head has set its environment.

    cluster = Cluster(address, is_own=is_own)
    progress.wait_for(cluster.open, may_be_left=True)
    exits.callback(cluster.close)
    # Ray's handler of SIGTERM prints a stack and aborts the process three seconds later.
    progress.stop.install()
    return cluster


def _session(leader: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                members.append(process)
        except OSError:
            continue
    return members


def main(folder: str, num_cpus: str) -> None:
    """Run the node until standard input closes; then leave nothing, not even the folder."""
    try:
        import ray

        context = ray.init(
            address="local",
            num_cpus=int(num_cpus),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        sys.stdout.write(f"{context.address_info['gcs_address']}\n")
        sys.stdout.flush()
        sys.stdin.read()
        ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
