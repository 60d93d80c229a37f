"""What writers, readers and the weight channel do while a real server is away, cut off or restarted."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import torch

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog, RedisEpisodeReader, make_record
from mara.buffer.server import EmbeddedServer
from mara.buffer.weights import RedisWeightChannel
from mara.buffer.writer import BufferedSink
from mara.common.episode import Episode
from mara.common.errors import ReplayUnavailable, UserError

MakeEpisode = Callable[..., Episode]
PATIENT = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.1, max_outage_s=30)
IMPATIENT = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.1, max_outage_s=0.4)
WEIGHTS = {"w": torch.zeros(2)}


def kill(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.pid is not None:
        time.sleep(0.005)


def repeat(attempt: Callable[[], object], for_s: float = 5.0) -> None:
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        assert not attempt()
        time.sleep(0.01)


def start_without_loss(server: EmbeddedServer) -> None:
    """On the disk before the reply. By default, a crash may lose the last second."""
    server.start()
    connect(server.url).config_set("appendfsync", "always")


def test_a_writer_goes_on_after_the_store_was_killed_and_nothing_is_lost_or_doubled(
    durable_server: EmbeddedServer, make_episode: MakeEpisode
) -> None:
    sink = RedisEpisodeLog(connect(durable_server.url), "r", PATIENT)
    reader = RedisEpisodeReader(connect(durable_server.url), "r", PATIENT)
    stop, written = threading.Event(), list[str]()

    def write() -> None:
        while not stop.is_set():
            sink.append([make_episode(uid=str(len(written)), seed=len(written))])
            written.append(str(len(written)))

    start_without_loss(durable_server)
    writer = threading.Thread(target=write)
    writer.start()
    read = list[str]()
    for _ in range(4):
        target = len(written) + 30
        while len(written) < target:
            read += [episode.uid for episode in reader.read(5, timeout_s=0.1)]
        kill(durable_server)
        start_without_loss(durable_server)
    stop.set()
    writer.join()
    while len(read) < len(written) and (new := reader.read(50, timeout_s=10)):
        read += [episode.uid for episode in new]
    assert read == written
    assert len(written) >= 120
    assert reader.read(10, 0) == []


@contextlib.contextmanager
def cut_after_the_first_script(
    server_path: str, path: Path, command: bytes = b"EVALSHA"
) -> Iterator[list[int]]:
    """Forwards to the server; the reply to the first call of a script gets lost with the connection."""
    cuts = list[int]()

    def serve(inside: socket.socket) -> None:
        with inside, socket.socket(socket.AF_UNIX) as outside:
            outside.connect(server_path)
            while data := inside.recv(1 << 20):
                outside.sendall(data)
                reply = outside.recv(1 << 20)
                if command in data and not cuts:
                    cuts.append(len(reply))
                    return
                inside.sendall(reply)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=accept, daemon=True).start()
        yield cuts
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("buffered", [False, True])
def test_an_episode_whose_reply_was_lost_is_stored_once(
    server: EmbeddedServer, run_id: str, tmp_path: Path, make_episode: MakeEpisode, buffered: bool
) -> None:
    credentials, _, server_path = server.url.removeprefix("unix://").rpartition("@")
    with cut_after_the_first_script(server_path, tmp_path / "s") as cuts:
        log = RedisEpisodeLog(connect(f"unix://{credentials}@{tmp_path / 's'}"), run_id, PATIENT)
        sink = BufferedSink(log, 1 << 20) if buffered else log
        sink.append([make_episode(uid="a"), make_episode(uid="b")])
        if isinstance(sink, BufferedSink):
            assert sink.flush(30)
        sink.append([make_episode(uid="c")])
        if isinstance(sink, BufferedSink):
            assert sink.close(30)
            assert sink.metrics["replay/dropped"] == 0
    assert len(cuts) == 1
    reader = RedisEpisodeReader(connect(server.url), run_id, PATIENT)
    assert [episode.uid for episode in reader.read(10, 0)] == ["a", "b", "c"]
    assert reader.counts.num_duplicates == 2


def test_weights_whose_reply_was_lost_are_published_again_without_complaint(
    server: EmbeddedServer, run_id: str, tmp_path: Path
) -> None:
    credentials, _, server_path = server.url.removeprefix("unix://").rpartition("@")
    source = RedisWeightChannel(connect(server.url), run_id, PATIENT)
    with cut_after_the_first_script(server_path, tmp_path / "s", b"EVAL") as cuts:
        sink = RedisWeightChannel(connect(f"unix://{credentials}@{tmp_path / 's'}"), run_id, PATIENT)
        assert not sink.publish(1, WEIGHTS)
        assert len(cuts) == 1
        assert source.latest_version() == 1
        deadline = time.monotonic() + 10
        while not sink.publish(1, WEIGHTS):
            assert time.monotonic() < deadline
        assert sink.publish(2, WEIGHTS)
        with pytest.raises(ValueError, match="version 2 is not above the published 2"):
            sink.publish(2, WEIGHTS)


def test_weights_that_find_no_memory_are_dropped_and_not_fatal(run_id: str) -> None:
    with EmbeddedServer(max_bytes=8 << 20) as small:
        client = connect(small.url)
        sink = RedisWeightChannel(connect(small.url), run_id, PATIENT)
        client.config_set("maxmemory", 1)
        assert not sink.publish(1, WEIGHTS)
        client.config_set("maxmemory", 8 << 20)
        deadline = time.monotonic() + 10
        while not sink.publish(1, WEIGHTS):
            assert time.monotonic() < deadline
        assert sink.latest_version() == 1


def test_a_writer_gives_up_after_the_time_allowed(
    durable_server: EmbeddedServer, make_episode: MakeEpisode
) -> None:
    sink = RedisEpisodeLog(connect(durable_server.url), "r", IMPATIENT)
    kill(durable_server)
    began = time.monotonic()
    with pytest.raises(ReplayUnavailable, match=r"has not answered for [\d.]+ s"):
        sink.append([make_episode()])
    assert 0.3 < time.monotonic() - began < PATIENT.max_outage_s
    durable_server.start()
    sink.append([make_episode()])  # it may try again later
    assert len(RedisEpisodeReader(connect(durable_server.url), "r", PATIENT).read(10, 0)) == 1


def test_a_reader_finds_nothing_in_an_outage_and_keeps_its_deadlines(
    durable_server: EmbeddedServer, make_episode: MakeEpisode
) -> None:
    sink = RedisEpisodeLog(connect(durable_server.url), "r", PATIENT)
    reader = RedisEpisodeReader(connect(durable_server.url), "r", PATIENT)
    start_without_loss(durable_server)
    sink.append([make_episode(uid="before"), make_episode(uid="between")])
    assert [episode.uid for episode in reader.read(1, 0)] == ["before"]
    kill(durable_server)
    began = time.monotonic()
    assert reader.read(5, timeout_s=0) == []
    assert reader.read(5, timeout_s=0.3) == []
    assert 0.28 < time.monotonic() - began < PATIENT.max_outage_s
    durable_server.start()
    assert [episode.uid for episode in reader.read(1, timeout_s=10)] == ["between"]


@pytest.fixture
def diskless(tmp_path: Path) -> Iterator[redis.Redis]:
    """A client of a server that refuses writes with MISCONF, since the folder it should save to has gone."""
    with EmbeddedServer(64 << 20, tmp_path / "gone") as own, connect(own.url) as owner:
        owner.config_set("appendonly", "no")
        shutil.rmtree(tmp_path / "gone")
        owner.config_set("save", "3600 100000")
        owner.set("a", 1)
        owner.bgsave()
        while owner.info("persistence")["rdb_last_bgsave_status"] == "ok":
            time.sleep(0.01)
        yield owner
        assert own.pid is not None
        os.kill(own.pid, signal.SIGTERM)  # what it gets when its parent has died
        deadline = time.monotonic() + 10
        while own.pid is not None:
            assert time.monotonic() < deadline, "it does not end before it has saved"
            time.sleep(0.01)


def find_disk(owner: redis.Redis) -> None:
    owner.config_set("save", "")
    owner.config_set("stop-writes-on-bgsave-error", "no")


def test_a_store_that_cannot_write_to_its_disk_is_waited_for(
    diskless: redis.Redis, make_episode: MakeEpisode, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(redis.ResponseError, match="^MISCONF"):
        diskless.set("a", 1)
    options = diskless.connection_pool.connection_kwargs
    with pytest.raises(UserError, match=r"\*\*\*.* cannot write to its disk; make room there"):
        connect(f"unix://:{options['password']}@{options['path']}")
    slow = RedisEpisodeLog(diskless, "r", ReplayConfig(retry_first_s=30, retry_longest_s=30))
    assert not slow.store([make_record(make_episode())])
    assert 0 < slow.pause_s <= 30
    log = RedisEpisodeLog(diskless, "r", PATIENT)
    sink = RedisWeightChannel(diskless, "r", PATIENT)
    assert not sink.publish(1, WEIGHTS)
    reader = RedisEpisodeReader(diskless, "r", PATIENT)
    assert reader.read(1, timeout_s=0) == []
    assert "cannot write to its disk, which may be full (MISCONF" in caplog.text
    assert "#" not in caplog.text  # not the command with all that it was to write
    find_disk(diskless)
    log.append([make_episode()])
    repeat(lambda: False, for_s=0.2)
    assert sink.publish(1, WEIGHTS)
    assert [episode.uid for episode in reader.read(1, timeout_s=5)] == ["e"]


def test_a_disk_that_stays_full_is_given_up_with_what_to_do(
    diskless: redis.Redis, make_episode: MakeEpisode
) -> None:
    for attempt in (
        lambda: RedisEpisodeLog(diskless, "r", IMPATIENT).append([make_episode()]),
        lambda: repeat(functools.partial(RedisWeightChannel(diskless, "r", IMPATIENT).publish, 1, WEIGHTS)),
    ):
        with pytest.raises(
            UserError, match=r"no writes for [\d.]+ s.*\(MISCONF.*make room there.*start .*again"
        ):
            attempt()


def test_a_reader_gives_up_after_the_time_allowed_over_all_its_reads(durable_server: EmbeddedServer) -> None:
    reader = RedisEpisodeReader(connect(durable_server.url), "r", IMPATIENT)
    kill(durable_server)
    began = time.monotonic()
    with pytest.raises(ReplayUnavailable):
        repeat(lambda: reader.read(1, timeout_s=0.05))
    assert 0.3 < time.monotonic() - began < PATIENT.max_outage_s


def test_nobody_waits_for_the_weight_channel_in_an_outage(durable_server: EmbeddedServer) -> None:
    sink = RedisWeightChannel(connect(durable_server.url), "r", PATIENT)
    source = RedisWeightChannel(connect(durable_server.url), "r", PATIENT)
    assert sink.publish(1, WEIGHTS)
    kill(durable_server)
    began = time.monotonic()
    assert not sink.publish(2, WEIGHTS)
    assert source.fetch_newer(than=0) is None
    assert time.monotonic() - began < PATIENT.max_outage_s / 2
    durable_server.start()
    version, deadline = 2, time.monotonic() + 10
    while (newer := source.fetch_newer(than=1)) is None and time.monotonic() < deadline:
        version += 1
        sink.publish(version, WEIGHTS)
        time.sleep(0.01)
    assert newer is not None
    assert 2 < newer.version <= version


def test_the_weight_channel_gives_up_after_the_time_allowed(durable_server: EmbeddedServer) -> None:
    sink = RedisWeightChannel(connect(durable_server.url), "r", IMPATIENT)
    source = RedisWeightChannel(connect(durable_server.url), "r", IMPATIENT)
    kill(durable_server)
    for attempt in (lambda: sink.publish(1, WEIGHTS), lambda: source.fetch_newer(than=0)):
        began = time.monotonic()
        with pytest.raises(ReplayUnavailable):
            repeat(attempt)
        assert 0.3 < time.monotonic() - began < PATIENT.max_outage_s


def test_a_password_that_is_changed_during_the_run_is_not_retried(
    durable_server: EmbeddedServer, make_episode: MakeEpisode
) -> None:
    client = connect(durable_server.url)
    sink = RedisEpisodeLog(client, "r", PATIENT)
    owner = connect(durable_server.url)
    owner.config_set("requirepass", "another")
    client.connection_pool.disconnect()
    with pytest.raises(UserError, match=r"replay\.redis_url.*no longer accepts"):
        sink.append([make_episode()])
