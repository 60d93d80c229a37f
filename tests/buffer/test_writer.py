"""A writer with a buffer, before a real server that hangs, is away, or refuses."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from mara.buffer.codec import encode_episode
from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog, RedisEpisodeReader
from mara.buffer.server import EmbeddedServer
from mara.buffer.writer import BufferedSink
from mara.common.episode import Episode
from mara.common.errors import ReplayUnavailable, UserError

MakeEpisode = Callable[..., Episode]
MakeSink = Callable[..., BufferedSink]
LONG_S = 30.0
"""Far more than anything here takes."""


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(max_bytes=64 << 20) as running:
        yield running
        if running.pid is not None:
            os.kill(running.pid, signal.SIGCONT)


@pytest.fixture
def make_sink(own_server: EmbeddedServer) -> Iterator[MakeSink]:
    made: list[BufferedSink] = []

    def make(max_bytes: int = 1 << 20, **settings: float) -> BufferedSink:
        config = ReplayConfig(
            **{"retry_first_s": 0.01, "retry_longest_s": 0.1, "connect_timeout_s": 0.5, **settings}
        )
        log = RedisEpisodeLog(connect(own_server.url, config.connect_timeout_s), "r", config)
        made.append(BufferedSink(log, max_bytes))
        return made[-1]

    yield make
    for sink in made:
        sink.close(0.0)


def stored(server: EmbeddedServer) -> list[str]:
    reader = RedisEpisodeReader(connect(server.url), "r", ReplayConfig())
    return [episode.uid for episode in reader.read(10_000, 0)]


def suspend(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)


def resume(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGCONT)


def test_appending_does_not_wait_for_a_store_that_hangs_and_all_is_stored_in_order_later(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink()
    suspend(own_server)
    for n in range(50):
        sink.append([make_episode(uid=str(n))])  # Nobody answers: had it to wait, it would wait for ever.
    record_bytes = len(encode_episode(make_episode(uid="10")))
    assert 40 * record_bytes < sink.metrics["replay/buffered_bytes"] <= 50 * record_bytes
    resume(own_server)
    assert sink.flush(LONG_S)
    assert stored(own_server) == [str(n) for n in range(50)]
    assert sink.metrics == {"replay/dropped": 0, "replay/buffered_bytes": 0}


def test_the_oldest_are_dropped_when_the_bound_is_reached_and_every_one_is_counted(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink(max_bytes=1 << 14)
    own_server.stop()
    for n in range(100):
        sink.append([make_episode(uid=str(n), seed=n)])
        assert sink.metrics["replay/buffered_bytes"] <= 1 << 14
    num_dropped = int(sink.metrics["replay/dropped"])
    assert 50 < num_dropped < 100
    assert not sink.close(0.2)
    assert sink.metrics == {"replay/dropped": 100, "replay/buffered_bytes": 0}


def test_what_was_not_dropped_is_the_newest_and_comes_in_order(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink(max_bytes=1 << 14)
    suspend(own_server)
    for n in range(100):
        sink.append([make_episode(uid=str(n), seed=n)])
    resume(own_server)
    assert sink.flush(LONG_S)
    num_dropped = int(sink.metrics["replay/dropped"])
    kept = stored(own_server)
    # Those that were being sent when the store stopped answering may be stored, and are dropped only later.
    assert kept == sorted(kept, key=int)
    assert kept[-5:] == [str(n) for n in range(95, 100)]
    assert num_dropped > 50 and 100 - num_dropped <= len(kept) < 60


def test_an_episode_larger_than_the_buffer_goes_through(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink(max_bytes=1 << 14)
    suspend(own_server)
    for uid in ("large", "larger", "small"):
        sink.append([make_episode(uid=uid, num_tokens=30, hidden_size=2 if uid == "small" else 2000)])
    resume(own_server)
    assert sink.flush(LONG_S)
    assert stored(own_server)[-1] == "small"
    sink.append([make_episode(uid="last", num_tokens=30, hidden_size=2000)])
    assert sink.flush(LONG_S)
    assert stored(own_server)[-1] == "last"


def test_a_store_that_stays_away_is_told_by_a_later_append(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink(max_outage_s=0.3)
    own_server.stop()
    sink.append([make_episode(uid="a")])
    assert not sink.flush(LONG_S)
    for _ in range(2):
        with pytest.raises(ReplayUnavailable, match="has not answered for"):
            sink.append([make_episode(uid="b")])
    assert not sink.close(LONG_S)
    assert sink.metrics["replay/dropped"] == 1


def test_a_password_that_no_longer_fits_is_told_by_a_later_append(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink()
    sink.append([make_episode(uid="a")])
    assert sink.flush(LONG_S)
    owner = connect(own_server.url)
    owner.config_set("requirepass", "another")
    owner.client_kill_filter(_type="normal", skipme=True)
    sink.append([make_episode(uid="b")])
    assert not sink.flush(LONG_S)
    with pytest.raises(UserError, match=r"replay\.redis_url.*no longer accepts"):
        sink.append([make_episode(uid="c")])


def test_closing_stores_what_is_left(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink()
    sink.append([make_episode(uid=str(n)) for n in range(200)])
    assert sink.close(LONG_S)
    assert sink.close(LONG_S)
    assert stored(own_server) == [str(n) for n in range(200)]


def test_closing_gives_up_in_time_on_a_store_that_hangs_and_counts_what_is_lost(
    own_server: EmbeddedServer, make_sink: MakeSink, make_episode: MakeEpisode
) -> None:
    sink = make_sink()
    suspend(own_server)
    sink.append([make_episode(uid=str(n)) for n in range(7)])
    assert not sink.close(0.1)
    assert sink.metrics == {"replay/dropped": 7, "replay/buffered_bytes": 0}


def test_an_outage_is_survived_without_anybody_doing_anything(
    durable_server: EmbeddedServer, make_episode: MakeEpisode
) -> None:
    config = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.1)
    sink = BufferedSink(RedisEpisodeLog(connect(durable_server.url), "r", config), 1 << 20)
    assert durable_server.pid is not None
    os.kill(durable_server.pid, signal.SIGKILL)
    while durable_server.pid is not None:
        time.sleep(0.005)
    sink.append([make_episode(uid=str(n)) for n in range(5)])
    sink.append([make_episode(uid="5")])
    durable_server.start()
    assert sink.flush(LONG_S)
    assert stored(durable_server) == [str(n) for n in range(6)]
    assert sink.close(LONG_S)
