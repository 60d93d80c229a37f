"""A store with an append-only file that is killed again and again, and what that file does not hold."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.keys import keys_of
from mara.buffer.log import Record, RedisEpisodeLog, RedisEpisodeReader, record_key
from mara.buffer.server import EmbeddedServer
from mara.buffer.weights import RedisWeightChannel
from mara.buffer.writer import BufferedSink
from mara.common.episode import Episode

MakeEpisode = Callable[..., Episode]
PATIENT = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.1, max_outage_s=60)
NUM_KILLS = 20
ROUND_S = 0.4
MAY_BE_LOST_S = 2.0
"""The file is synced once a second, and a sync that takes long is waited for a second more."""
GOES_ON_WITHIN_S = 10.0


class TimedLog(RedisEpisodeLog):
    """Notes when each episode was acknowledged."""

    def __init__(self, url: str) -> None:
        super().__init__(connect(url), "r", PATIENT)
        self.acknowledged_at: dict[str, float] = {}

    def store(self, batch: Sequence[Record]) -> bool:
        stored = super().store(batch)
        if stored:
            now = time.monotonic()
            self.acknowledged_at.update((record.uid, now) for record in batch)
        return stored


def kill(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.pid is not None:
        time.sleep(0.002)


def uids_in_the_log(server: EmbeddedServer) -> set[str]:
    """Of the entries, each of which has to have its record."""
    client, keys = connect(server.url), keys_of("r")
    uids = [fields[b"u"].decode() for _, fields in client.xrange(keys.episodes)]
    assert client.exists(*(record_key(keys, uid) for uid in uids)) == len(uids), "an entry has no record"
    return set(uids)


def test_a_store_killed_twenty_times_loses_only_the_last_moments_and_doubles_nothing(
    durable_server: EmbeddedServer, make_episode: MakeEpisode
) -> None:
    log = TimedLog(durable_server.url)
    sink = BufferedSink(log, max_bytes=8 << 20)
    reader = RedisEpisodeReader(connect(durable_server.url), "r", PATIENT)
    read, lost = list[str](), set[str]()
    stop = threading.Event()

    def act() -> None:
        number = 0
        while not stop.wait(0.002):
            sink.append([make_episode(uid=str(number), seed=number % 20)])
            number += 1

    def read_for(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            read.extend(episode.uid for episode in reader.read(50, timeout_s=0.05))

    actor = threading.Thread(target=act)
    actor.start()
    try:
        for _ in range(NUM_KILLS):
            read_for(ROUND_S)
            killed_at = time.monotonic()
            kill(durable_server)
            before = dict(log.acknowledged_at)
            num_read = len(read)
            durable_server.start()
            returned_at = time.monotonic()
            stored = uids_in_the_log(durable_server)
            lost_now = before.keys() - stored - lost
            assert all(before[uid] > killed_at - MAY_BE_LOST_S for uid in lost_now)
            lost |= lost_now
            while len(log.acknowledged_at) <= len(before) or len(read) <= num_read:
                assert time.monotonic() < returned_at + GOES_ON_WITHIN_S
                read_for(0.01)
    finally:
        stop.set()
        actor.join()
    assert sink.close(GOES_ON_WITHIN_S)
    assert sink.metrics["replay/dropped"] == 0
    while new := reader.read(100, timeout_s=0.5):
        read += [episode.uid for episode in new]

    whole = RedisEpisodeReader(connect(durable_server.url), "r", PATIENT)
    kept = [episode.uid for episode in whole.read(1_000_000, 0)]
    assert len(log.acknowledged_at) > NUM_KILLS * 50
    for uids in (kept, read):
        numbers = [int(uid) for uid in uids]
        assert numbers == sorted(set(numbers)), "twice, or out of order"
    assert set(kept) <= log.acknowledged_at.keys()
    assert len(set(read) | set(kept)) > 0.9 * len(log.acknowledged_at)
    assert whole.counts.num_malformed == reader.counts.num_malformed == 0


def test_an_episode_that_was_read_and_then_lost_by_the_store_is_not_read_again(
    server: EmbeddedServer, run_id: str, make_episode: MakeEpisode
) -> None:
    client = connect(server.url)
    log, reader = RedisEpisodeLog(client, run_id, PATIENT), RedisEpisodeReader(client, run_id, PATIENT)
    log.append([make_episode(uid="a"), make_episode(uid="b")])
    assert len(reader.read(5, 0)) == 2
    client.delete(*client.keys(f"mara:{run_id}:*"))  # a crash of a store that keeps nothing
    log.append([make_episode(uid="b"), make_episode(uid="c")])
    assert [episode.uid for episode in reader.read(5, timeout_s=1)] == ["c"]
    assert reader.counts.num_duplicates == 1


def test_publishing_does_not_make_the_append_only_file_grow(
    durable_server: EmbeddedServer, tmp_path: Path, make_episode: MakeEpisode
) -> None:
    def file_bytes() -> int:
        connect(durable_server.url).execute_command("WAITAOF", 1, 0, 10_000)
        return sum(path.stat().st_size for path in (tmp_path / "store" / "appendonlydir").iterdir())

    channel = RedisWeightChannel(connect(durable_server.url), "r", PATIENT)
    log = RedisEpisodeLog(connect(durable_server.url), "r", PATIENT)
    log.append([make_episode(uid="first")])
    before = file_bytes()
    for version in range(20):
        assert channel.publish(version, {"w": torch.ones(1 << 16)})
    assert file_bytes() - before < 4096
    log.append([make_episode(uid="second", num_tokens=30, hidden_size=500)])
    assert file_bytes() - before > 30_000
    assert channel.latest_version() == 19


def test_a_restarted_store_has_lost_its_weights_and_takes_the_same_version_again(
    durable_server: EmbeddedServer,
) -> None:
    channel = RedisWeightChannel(connect(durable_server.url), "r", PATIENT)
    source = RedisWeightChannel(connect(durable_server.url), "r", PATIENT)
    weights = {"w": torch.ones(3)}
    assert not channel.holds(7)
    assert channel.publish(7, weights)
    assert channel.holds(7) and channel.holds(6) and not channel.holds(8)
    kill(durable_server)
    assert channel.holds(7)  # nobody knows
    durable_server.start()
    deadline = time.monotonic() + 10
    while channel.holds(7):
        assert time.monotonic() < deadline
    assert source.fetch_newer(than=-1) is None
    assert channel.publish(7, weights)
    while (newer := source.fetch_newer(than=6)) is None:
        assert time.monotonic() < deadline
    assert newer.version == 7


def test_weights_in_a_rewritten_file_are_old_ones_and_do_not_stand_in_the_way(
    durable_server: EmbeddedServer,
) -> None:
    channel = RedisWeightChannel(connect(durable_server.url), "r", PATIENT)
    owner = connect(durable_server.url)
    assert channel.publish(3, {"w": torch.ones(3)})
    owner.bgrewriteaof()
    while not (done := owner.info("persistence"))["aof_rewrites"] or done["aof_rewrite_in_progress"]:
        time.sleep(0.01)
    assert channel.publish(9, {"w": torch.ones(3)})
    kill(durable_server)
    durable_server.start()
    fresh = RedisWeightChannel(connect(durable_server.url), "r", PATIENT)
    assert fresh.latest_version() == 3
    assert not fresh.holds(9)
    assert fresh.publish(9, {"w": torch.ones(3)})


def test_a_durable_store_is_for_the_server_of_the_run_alone() -> None:
    with pytest.raises(ValueError, match=r"replay\.durable is for .* 'appendonly yes' on the server at"):
        ReplayConfig(durable=True, redis_url="redis://host")
