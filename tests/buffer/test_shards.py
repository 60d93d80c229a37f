"""A log in several parts, on several real servers and twice on one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import check_stores, connect
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.server import EmbeddedServer, find_server
from mara.buffer.shards import ShardedEpisodeReader, open_reader
from mara.common.contracts import ReadCounts
from mara.common.episode import Episode
from mara.common.errors import ReplayUnavailable, UserError

MakeEpisode = Callable[..., Episode]
PATIENT = {"retry_first_s": 0.01, "retry_longest_s": 0.1, "max_outage_s": 30.0}


@pytest.fixture
def servers() -> Iterator[list[EmbeddedServer]]:
    running = [EmbeddedServer(max_bytes=64 << 20) for _ in range(3)]
    for server in running:
        server.start()
    yield running
    for server in running:
        if server.pid is not None:
            os.kill(server.pid, signal.SIGCONT)
        server.stop()


def settings(servers: list[EmbeddedServer], **others: float) -> ReplayConfig:
    return ReplayConfig(redis_url=tuple(server.url for server in servers), **PATIENT | others)


def sinks(config: ReplayConfig) -> list[RedisEpisodeLog]:
    return [RedisEpisodeLog(connect(url), "r", config, shard) for shard, url in enumerate(config.redis_urls)]


def reader_of(config: ReplayConfig, cursor: str = "") -> ShardedEpisodeReader:
    clients = [connect(url, config.connect_timeout_s) for url in config.redis_urls]
    reader = open_reader(clients, "r", config, cursor)
    assert isinstance(reader, ShardedEpisodeReader)
    return reader


def shards_of(episodes: list[Episode]) -> Counter[str]:
    return Counter(episode.uid.split(".")[0] for episode in episodes)


def uids(episodes: list[Episode], shard: int) -> list[str]:
    return [episode.uid for episode in episodes if episode.uid.startswith(f"{shard}.")]


def test_every_read_takes_equal_parts_of_shards_that_have_enough(
    servers: list[EmbeddedServer], make_episode: MakeEpisode
) -> None:
    config = settings(servers)
    for shard, sink in enumerate(sinks(config)):
        sink.append([make_episode(uid=f"{shard}.{n}") for n in range(60)])
    reader = reader_of(config)
    for _ in range(5):
        assert shards_of(reader.read(9, 0)) == {"0": 3, "1": 3, "2": 3}
    of_two = [shards_of(reader.read(2, 0)) for _ in range(12)]
    assert sum(of_two, Counter()) == {"0": 8, "1": 8, "2": 8}
    rest = reader.read(1000, 0)
    assert shards_of(rest) == {"0": 37, "1": 37, "2": 37}
    assert [uids(rest, shard) for shard in range(3)] == [
        [f"{shard}.{n}" for n in range(23, 60)] for shard in range(3)
    ]


def test_what_one_shard_has_not_the_others_give(
    servers: list[EmbeddedServer], make_episode: MakeEpisode
) -> None:
    config = settings(servers)
    written = sinks(config)
    written[0].append([make_episode(uid="0.0")])
    written[2].append([make_episode(uid=f"2.{n}") for n in range(50)])
    reader = reader_of(config)
    assert shards_of(reader.read(20, 0)) == {"0": 1, "2": 19}
    assert reader.read(7, timeout_s=10) != []


def test_a_waiting_read_sees_an_episode_in_any_shard_soon(
    servers: list[EmbeddedServer], make_episode: MakeEpisode
) -> None:
    config = settings(servers)
    reader = reader_of(config)
    for shard, sink in enumerate(sinks(config)):
        episode = make_episode(uid=f"{shard}.late")
        threading.Timer(0.2, sink.append, [[episode]]).start()
        assert uids(reader.read(5, timeout_s=30), shard) == [episode.uid]


def test_the_cursor_of_all_shards_leads_on_in_each(
    servers: list[EmbeddedServer], make_episode: MakeEpisode
) -> None:
    config = settings(servers)
    for shard, sink in enumerate(sinks(config)):
        sink.append([make_episode(uid=f"{shard}.{n}") for n in range(4 + shard)])
    before = reader_of(config)
    assert len(before.read(6, 0)) == 6
    assert shards_of(reader_of(config, before.cursor).read(100, 0)) == {"0": 2, "1": 3, "2": 4}
    fewer = settings(servers[:2])
    with pytest.raises(UserError, match=r"replay\.redis_url has 2 addresses, the log was read from 3 before"):
        reader_of(fewer, before.cursor)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_shard_that_is_away_or_hangs_does_not_keep_the_others_waiting(
    servers: list[EmbeddedServer], make_episode: MakeEpisode, number: signal.Signals
) -> None:
    config = settings(servers, connect_timeout_s=0.8)
    written = sinks(config)
    reader = reader_of(config)
    assert servers[1].pid is not None
    os.kill(servers[1].pid, number)
    while number == signal.SIGKILL and servers[1].pid is not None:
        time.sleep(0.005)
    read: list[Episode] = []
    for n in range(30):
        for shard in (0, 2):
            written[shard].append([make_episode(uid=f"{shard}.{n}")])
        deadline = time.monotonic() + 10
        while len(read) < 2 * n + 2:
            assert time.monotonic() < deadline
            read += reader.read(5, timeout_s=0.5)
    for shard in (0, 2):
        assert uids(read, shard) == [f"{shard}.{n}" for n in range(30)]
    if number == signal.SIGKILL:
        servers[1].start()
    else:
        os.kill(servers[1].pid, signal.SIGCONT)
    written[1].append([make_episode(uid="1.back")])
    deadline = time.monotonic() + 10
    while not (new := reader.read(5, timeout_s=0.5)):
        assert time.monotonic() < deadline
    assert uids(new, 1) == ["1.back"]


def test_a_shard_that_stays_away_ends_the_reading_and_loses_nothing_of_the_others(
    servers: list[EmbeddedServer], make_episode: MakeEpisode
) -> None:
    config = settings(servers, max_outage_s=0.4)
    written = sinks(config)
    reader = reader_of(config)
    servers[1].stop()
    read, written_so_far = list[str](), 0

    def read_on() -> None:
        nonlocal written_so_far
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            written[0].append([make_episode(uid=f"0.{written_so_far}")])
            written_so_far += 1
            read.extend(episode.uid for episode in reader.read(5, timeout_s=0.05))

    with pytest.raises(ReplayUnavailable):
        read_on()
    cursor = reader.cursor.split(",")[0]
    alone = open_reader([connect(servers[0].url)], "r", config, cursor)
    read += [episode.uid for episode in alone.read(100, 0)]
    assert read == [f"0.{n}" for n in range(written_so_far)]


def test_counts_are_those_of_all_shards(servers: list[EmbeddedServer], make_episode: MakeEpisode) -> None:
    config = settings(servers)
    for shard, sink in enumerate(sinks(config)):
        sink.append([make_episode(uid=f"{shard}.a")] * (shard + 2))
        connect(servers[shard].url).xadd(f"mara:r:{shard}:episodes", {"e": b"garbage"})
        sink.append([make_episode(uid=f"{shard}.b")])
    reader = reader_of(config)
    while len(reader.read(10, 0)) > 0:
        pass
    assert reader.counts == ReadCounts(num_malformed=3, num_quarantined=3, num_duplicates=1 + 2 + 3)


def test_each_shard_keeps_its_part_of_the_bound(
    servers: list[EmbeddedServer], make_episode: MakeEpisode
) -> None:
    config = settings(servers, log_max_bytes=3 << 14)
    for shard, sink in enumerate(sinks(config)):
        sink.append([make_episode(uid=f"{shard}.{n}", seed=n) for n in range(100)])
        stored_bytes = int(connect(servers[shard].url).get(f"mara:r:{shard}:nbytes"))
        assert (1 << 14) - 4000 < stored_bytes <= 1 << 14


def test_a_bound_too_small_for_its_shards_names_both_settings() -> None:
    with pytest.raises(ValidationError, match=r"log_max_bytes is 32768, 10922 for each of the 3 .* 49152"):
        ReplayConfig(redis_url=("redis://a", "redis://b", "redis://c"), log_max_bytes=1 << 15)


def test_shards_on_one_server_add_up_under_whatever_name(servers: list[EmbeddedServer]) -> None:
    one, other = servers[0], servers[1]
    twice = (one.url, f"{one.url}?db=0", other.url)
    config = ReplayConfig(redis_url=twice, log_max_bytes=3 << 20)
    needed = {"both": config.store_max_bytes(4, (0, 1)), "last": config.store_max_bytes(4, (2,))}
    # Actors 0 and 3, and for the weights all of them; the third shard has actor 2 alone.
    assert needed["both"] - needed["last"] > 2 * (1 << 20) + 3 * 8 * (4 << 20)
    owner = connect(one.url)
    owner.config_set("maxmemory", needed["both"])
    connect(other.url).config_set("maxmemory", needed["last"])
    check_stores(config, num_actors=4)
    owner.config_set("maxmemory", needed["both"] - 1)
    with pytest.raises(UserError) as refused:
        check_stores(config, num_actors=4)
    path = one.url.rpartition("@")[2]
    assert str(refused.value).startswith(f"replay.redis_url: unix://:***@{path} has maxmemory")
    assert str(needed["both"]) in str(refused.value)


def test_what_a_run_has_in_several_databases_of_one_server_is_its_own(
    tmp_path: Path, make_episode: MakeEpisode
) -> None:
    socket = tmp_path / "s"
    options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--databases", "2"]
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen([find_server(), *options], cwd=tmp_path, stdout=log) as process:
        try:
            while not socket.exists():
                assert process.poll() is None
                time.sleep(0.01)
            urls = (f"unix://{socket}?db=0", f"unix://{socket}?db=1")
            config = ReplayConfig(redis_url=urls, log_max_bytes=8 << 20)
            needed_bytes = config.store_max_bytes(2, (0, 1))
            for sink in sinks(config):
                sink.append([make_episode(uid=str(n), num_tokens=50, hidden_size=4096) for n in range(16)])
            with connect(urls[0]) as client:
                client.config_set("maxmemory", needed_bytes + (2 << 20))
            check_stores(config, 2, "r")
            with pytest.raises(UserError, match="of which other data take"):
                check_stores(config, 2, "another")
        finally:
            process.kill()


def test_every_address_is_tried_before_a_run_begins(servers: list[EmbeddedServer]) -> None:
    servers[2].stop()
    config = ReplayConfig(redis_url=(servers[0].url, "unix://:s3cret@/none.sock"))
    with pytest.raises(UserError, match=r"unix://:\*\*\*@/none\.sock cannot be used"):
        check_stores(config, num_actors=1)
