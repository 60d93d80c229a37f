"""What only weights shared on one machine have: one fetch for all, and files that are removed."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from mara.buffer.connection import connect
from mara.buffer.server import EmbeddedServer
from mara.buffer.shared_weights import SharedWeights
from mara.buffer.weights import RedisWeightChannel


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def sent_bytes(client: redis.Redis) -> int:
    """Bytes that the server has sent so far; the tensors are by far the most of them."""
    return int(client.info("stats")["total_net_output_bytes"])


def test_many_subscribers_fetch_once(
    server: EmbeddedServer, client: redis.Redis, run_id: str, parent: Path
) -> None:
    tensors = {"w": torch.randn(1_000_000)}
    RedisWeightChannel(client, run_id).publish(3, tensors)
    subscribers = [
        SharedWeights(RedisWeightChannel(connect(server.url), run_id), run_id, parent) for _ in range(8)
    ]
    before = sent_bytes(client)
    found = [subscriber.fetch_newer(than=-1) for subscriber in subscribers]
    assert all(weights is not None and torch.equal(weights.tensors["w"], tensors["w"]) for weights in found)
    assert 4_000_000 < sent_bytes(client) - before < 5_000_000, "more than one of them came from the store"


def test_a_subscriber_does_not_wait_while_another_one_fetches(
    server: EmbeddedServer, client: redis.Redis, run_id: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RedisWeightChannel(client, run_id).publish(0, {"w": torch.ones(3)})
    slow_source = RedisWeightChannel(connect(server.url), run_id)
    slow = SharedWeights(slow_source, run_id, parent)
    other = SharedWeights(RedisWeightChannel(connect(server.url), run_id), run_id, parent)
    fetching, may_go_on = threading.Event(), threading.Event()
    fetch = slow_source.fetch_newer

    def fetch_slowly(*args: Any) -> Any:
        fetching.set()
        assert may_go_on.wait(10)
        return fetch(*args)

    monkeypatch.setattr(slow_source, "fetch_newer", fetch_slowly)
    thread = threading.Thread(target=slow.fetch_newer, args=(-1,))
    thread.start()
    assert fetching.wait(10)
    assert other.fetch_newer(-1) is None
    may_go_on.set()
    thread.join()
    assert (found := other.fetch_newer(-1)) is not None and found.version == 0


def test_only_the_latest_is_kept_and_the_last_subscriber_removes_all(
    server: EmbeddedServer, client: redis.Redis, run_id: str, parent: Path
) -> None:
    sink = RedisWeightChannel(client, run_id)
    one, other = (
        SharedWeights(RedisWeightChannel(connect(server.url), run_id), run_id, parent) for _ in range(2)
    )
    for version in range(4):
        sink.publish(version, {"w": torch.full((3,), float(version))})
        held = one.fetch_newer(version - 1)
    folder = parent / run_id
    assert [path.name for path in folder.glob("*.safetensors")] == ["3.safetensors"]
    assert folder.stat().st_mode & 0o077 == parent.stat().st_mode & 0o077 == 0
    one.close()
    assert (found := other.fetch_newer(-1)) is not None
    other.close()
    assert not folder.exists()
    assert held is not None and held.tensors["w"].tolist() == found.tensors["w"].tolist() == [3.0] * 3


def test_what_a_killed_process_left_is_removed_by_the_next_run(
    server: EmbeddedServer, run_id: str, parent: Path
) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mara.buffer.shared_weights import SharedWeights\n"
        "shared = SharedWeights(None, 'killed', Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    source = RedisWeightChannel(connect(server.url), run_id)
    with SharedWeights(source, run_id, parent):
        assert (parent / "killed").is_dir(), "it is in use"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with SharedWeights(source, run_id, parent):
        assert not (parent / "killed").exists()


def test_a_damaged_file_is_fetched_again(
    server: EmbeddedServer, client: redis.Redis, run_id: str, parent: Path
) -> None:
    RedisWeightChannel(client, run_id).publish(5, {"w": torch.ones(2)})
    with SharedWeights(RedisWeightChannel(connect(server.url), run_id), run_id, parent) as source:
        (parent / run_id / "5.safetensors").write_bytes(b"no tensors")
        assert (found := source.fetch_newer(-1)) is not None and found.tensors["w"].tolist() == [1.0, 1.0]


def test_without_room_for_the_file_every_subscriber_fetches_for_itself(
    server: EmbeddedServer, client: redis.Redis, run_id: str, parent: Path
) -> None:
    RedisWeightChannel(client, run_id).publish(5, {"w": torch.ones(100_000)})
    with SharedWeights(RedisWeightChannel(connect(server.url), run_id), run_id, parent) as source:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            found = [source.fetch_newer(-1) for _ in range(2)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert all(weights is not None and weights.version == 5 for weights in found)
        assert not list((parent / run_id).glob("*.safetensors"))


def test_a_folder_that_somebody_removed_is_done_without(
    server: EmbeddedServer, client: redis.Redis, run_id: str, parent: Path
) -> None:
    RedisWeightChannel(client, run_id).publish(5, {"w": torch.ones(2)})
    with SharedWeights(RedisWeightChannel(connect(server.url), run_id), run_id, parent) as source:
        shutil.rmtree(parent / run_id)
        assert (found := source.fetch_newer(-1)) is not None and found.version == 5
