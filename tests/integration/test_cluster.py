"""``mara train`` on a Ray cluster of two nodes that somebody else started, behind a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import AuthenticationError

from mara.buffer.codec import RecordLimits, decode_episode
from mara.buffer.connection import connect
from mara.buffer.keys import keys_of
from mara.buffer.log import record_key
from mara.buffer.server import EmbeddedServer
from mara.common.errors import UserError
from mara.deploy.topology import Cluster

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

NUM_NODES = 2
CPUS_PER_NODE = 3
"""Room for one rollout actor of two, and the learner beside it: the actors land on different nodes."""
START_S = 120.0
STOP_S = 40.0


def wait_until(condition: Callable[[], bool], timeout_s: float, describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(describe())
        time.sleep(0.1)


class Node:
    """``ray start --block``, with everything it starts in a session of its own."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str], *arguments: str) -> None:
        self.name = name
        self._output = folder / f"{name}.txt"
        common = ["--block", "--node-ip-address=127.0.0.1", f"--num-cpus={CPUS_PER_NODE}", "--num-gpus=0"]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *common, *arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until_started(self) -> None:
        def started() -> bool:
            assert self.is_running, self._output.read_text()
            return "Ray runtime started" in self._output.read_text()

        wait_until(started, START_S, self._output.read_text)

    def hosts(self) -> dict[str, str]:
        """Titles of the run's processes on this node, by the name of the log each writes: ``actor-0``."""
        found = {}
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                title, output = process.name(), Path(os.readlink(f"/proc/{process.pid}/fd/1"))
            except (psutil.NoSuchProcess, OSError):
                continue
            if title.startswith(("ray::RolloutHos", "ray::LearnerHos")):
                found[output.stem] = title
        return found

    def stop(self) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True) if self.is_running else []
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in family:
            if process.is_running():
                process.kill()


class RayCluster:
    """Two nodes on this machine that share a token."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RAY_"))}
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        # Unix sockets have short names: the folder must be near the root.
        self._ray_folder = tempfile.mkdtemp(prefix="mara-test-ray-", dir="/tmp")
        store = "--object-store-memory=100000000"
        head_only = [
            "--head",
            f"--port={port}",
            f"--temp-dir={self._ray_folder}",
            "--include-dashboard=false",
        ]
        self.nodes = [Node("head", folder, self.environment, store, *head_only)]
        try:
            self.nodes[0].wait_until_started()
            self.nodes.append(Node("second", folder, self.environment, store, f"--address={self.address}"))
            self.nodes[1].wait_until_started()
        except BaseException:
            self.stop()
            raise

    def hosts(self) -> dict[str, dict[str, str]]:
        return {node.name: node.hosts() for node in self.nodes}

    def free_cpus(self) -> list[float]:
        """Nodes alive and CPUs not given away, as a driver of its own sees them."""
        script = (
            f"import json, ray; ray.init(address='{self.address}', log_to_driver=False); "
            "alive = sum(node['Alive'] for node in ray.nodes()); "
            "print(json.dumps([alive, ray.available_resources().get('CPU', 0)]))"
        )
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answer: list[float] = json.loads(done.stdout)
        return answer

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.stop()
        shutil.rmtree(self._ray_folder, ignore_errors=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayCluster]:
    started = RayCluster(tmp_path)
    yield started
    started.stop()


class EpisodesByActor:
    """Counts the episodes in the replay log by the actor that made them."""

    def __init__(self, url: str) -> None:
        self.counts: Counter[str] = Counter()
        self._client: Any = connect(url)
        self._last = "-"

    def update(self) -> Counter[str]:
        for key in self._client.scan_iter("mara:*:episodes"):
            for entry_id, fields in self._client.xrange(key, min=self._last, count=64):
                keys = keys_of(key.decode().split(":")[1])
                record = self._client.get(record_key(keys, fields[b"u"].decode()))
                self.counts[decode_episode(record, RecordLimits()).actor_id] += 1
                self._last = f"({entry_id.decode()}"
        return self.counts


@pytest.mark.cluster
def test_a_run_joins_a_cluster_uses_all_its_nodes_saves_its_agent_at_sigterm_and_leaves_all_as_it_was(
    cluster: RayCluster,
    world: Path,
    tmp_path: Path,
    check_what_a_signal_leaves: Callable[[Path, str], None],
) -> None:
    output = tmp_path / "output.txt"
    with EmbeddedServer(1 << 29) as server, output.open("w") as stream:
        command = subprocess.Popen(
            [
                *(sys.executable, "-m", "mara.deploy.cli", "train", str(world / "run.yaml")),
                *(f"llm.model={world / 'llm'}", f"ray.address={cluster.address}", "wandb.mode=disabled"),
                *("replay.redis_url=${oc.env:STORE_URL}", "learner.num_episodes=1000000"),
                *("rollout.num_actors=2", "rollout.num_cpus=2", "learner.gradient_steps_per_episode=0.1"),
                "learner.sac.critic_only_steps=1000000",
            ],
            cwd=tmp_path,
            env={**cluster.environment, "STORE_URL": server.url},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            episodes = EpisodesByActor(server.url)

            def both_make_episodes() -> bool:
                assert command.poll() is None, output.read_text()
                return set(episodes.update()) == {"actor-0", "actor-1"}

            def is_training() -> bool:
                assert command.poll() is None, output.read_text()
                rows = [
                    json.loads(line)
                    for path in tmp_path.glob("runs/run-*/metrics.jsonl")
                    for line in path.read_text().splitlines()
                ]
                return bool(rows) and rows[-1]["learner/gradient_step"] >= 1

            wait_until(both_make_episodes, 180, output.read_text)
            wait_until(is_training, 180, output.read_text)
            placed = cluster.hosts()
            os.killpg(command.pid, signal.SIGTERM)
            assert command.wait(90) == 143, output.read_text()
        finally:
            command.kill()
            command.wait()

    actors = [{name for name in placed[node.name] if name != "learner"} for node in cluster.nodes]
    assert sorted(actors, key=str) == [{"actor-0"}, {"actor-1"}], placed
    assert sum("learner" in hosts for hosts in placed.values()) == 1, placed
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if not path.is_symlink())
    check_what_a_signal_leaves(folder, output.read_text())
    untrained = "mara: warning: the saved agent is untrained: in the first 1000000 gradient steps"
    assert untrained in output.read_text()
    assert all(node.is_running for node in cluster.nodes)
    wait_until(lambda: not any(cluster.hosts().values()), 20, lambda: f"left running: {cluster.hosts()}")
    assert cluster.free_cpus() == [NUM_NODES, NUM_NODES * CPUS_PER_NODE]


OWN_NETWORK = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""Runs a command where nothing but a loopback exists, and where all it leaves running ends with it."""


def test_the_run_on_two_nodes_passes_in_a_network_of_its_own() -> None:
    """Ray's second node listens on the machine's address: here nobody outside can reach that."""
    try:
        allowed = subprocess.run([*OWN_NETWORK, "ip", "link", "set", "lo", "up"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux); `make test ARGS='-m cluster'` runs it on the open network")
    if allowed.returncode != 0:
        pytest.skip(f"may not make a network of its own: {allowed.stderr.decode().strip()}")
    options = ["-m", "cluster", "-n", "0", "-p", "no:cacheprovider"]
    pytest_command = [sys.executable, "-m", "pytest", *options, __file__]
    inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", *pytest_command]

    done = subprocess.run([*OWN_NETWORK, *inside], capture_output=True, text=True, timeout=380)

    assert done.returncode == 0, done.stdout + done.stderr
    assert " 1 passed" in done.stdout


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1", ["ray.address=127.0.0.1", "HOST:PORT"]),
        ("ray://127.0.0.1:10001", ["ray.address=ray://127.0.0.1:10001", "HOST:PORT"]),
        ("127.0.0.1:1", ["ray.address", "'127.0.0.1:1'", "Connection refused", "ray start --head"]),
    ],
)
def test_an_address_where_no_cluster_is_is_refused_at_once(address: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        Cluster(address).open()

    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR\r\n", b""])
def test_an_address_where_something_else_listens_is_refused_at_once(greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(greeting)

        listener = threading.Thread(target=answer)
        listener.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            UserError, match=f"what listens at '{address}' is no Ray cluster; give the address"
        ):
            Cluster(address).open()
        listener.join()


def test_an_address_that_says_nothing_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mara.deploy.topology.CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"'{address}' took the connection and said nothing within 0.2 s"):
            Cluster(address).open()


def test_a_missing_token_is_named_with_the_places_where_it_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_settings: object) -> None:
        raise AuthenticationError("Token authentication is enabled but no authentication token was found")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError) as refused:
        Cluster("auto").open()

    message = str(refused.value)
    assert all(word in message for word in ("no authentication token", "RAY_AUTH_MODE", "~/.ray/auth_token"))
    assert "\n" not in message
