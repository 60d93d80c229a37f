"""What every replay log promises, held against the one in memory and those on Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.memory import MemoryEpisodeLog
from mara.buffer.shards import open_reader
from mara.buffer.writer import BufferedSink
from mara.common.contracts import EpisodeSink, ReadCounts
from mara.common.episode import Episode

MakeEpisode = Callable[..., Episode]
Same = Callable[[Episode, Episode], bool]


class Log(NamedTuple):
    make_sink: Callable[..., EpisodeSink]
    """Takes the optional number of an actor."""
    make_reader: Callable[..., Any]
    """Takes an optional cursor."""


class Stored:
    """A sink with a buffer that is looked at only when it is empty: when an append counts."""

    def __init__(self, sink: BufferedSink) -> None:
        self._sink = sink

    def append(self, episodes: Sequence[Episode]) -> None:
        self._sink.append(episodes)
        assert self._sink.flush(30)


@pytest.fixture(params=["memory", "redis", "three shards", "buffered"])
def make_log(request: pytest.FixtureRequest, run_id: str) -> Callable[..., Log]:
    def make(**settings: Any) -> Log:
        config = ReplayConfig(**settings)
        if request.param == "memory":
            log = MemoryEpisodeLog(config)
            return Log(lambda *actor: log, log.reader)
        url = request.getfixturevalue("server").url
        buffered = request.param == "buffered"
        num_shards = 3 if request.param == "three shards" else 1
        # What one actor may store is the same for all.
        total = {"redis_url": (url,) * num_shards, "log_max_bytes": num_shards * config.log_max_bytes}
        config = ReplayConfig(**settings | total)

        def make_sink(actor: int = 1) -> EpisodeSink:
            shard = actor % num_shards
            log = RedisEpisodeLog(connect(url), run_id, config, shard)
            return Stored(BufferedSink(log, config.writer_buffer_bytes)) if buffered else log

        return Log(
            make_sink,
            lambda *cursor: open_reader([connect(url) for _ in range(num_shards)], run_id, config, *cursor),
        )

    return make


def uids(episodes: list[Episode]) -> list[str]:
    return [episode.uid for episode in episodes]


def test_episodes_come_out_whole_and_in_order(
    make_log: Callable[..., Log], make_episode: MakeEpisode, same: Same
) -> None:
    log = make_log()
    sink, reader = log.make_sink(), log.make_reader()
    written = [make_episode(uid=str(n), seed=n) for n in range(5)]
    sink.append(written[:2])
    sink.append(written[2:])
    read = reader.read(10, timeout_s=0)
    assert uids(read) == uids(written)
    assert all(same(a, b) for a, b in zip(written, read, strict=True))
    assert reader.counts.num_malformed == 0


def test_a_read_takes_at_most_what_it_asked_for_and_goes_on_there(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log()
    log.make_sink().append([make_episode(uid=str(n)) for n in range(150)])
    reader = log.make_reader()
    assert uids(reader.read(3, 0)) == ["0", "1", "2"]
    assert uids(reader.read(100, 0)) == [str(n) for n in range(3, 103)]
    assert len(reader.read(100, 0)) == 47
    assert reader.read(100, 0) == []


def test_an_episode_appended_again_is_stored_once(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log()
    sink = log.make_sink()
    sink.append([make_episode(uid="a"), make_episode(uid="b"), make_episode(uid="a")])
    sink.append([make_episode(uid="b"), make_episode(uid="c")])
    log.make_sink().append([make_episode(uid="a")])
    assert uids(log.make_reader().read(10, 0)) == ["a", "b", "c"]


def test_every_reader_has_a_cursor_of_its_own_that_can_be_restored(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log()
    log.make_sink().append([make_episode(uid=str(n)) for n in range(6)])
    one, two = log.make_reader(), log.make_reader()
    assert uids(one.read(4, 0)) == ["0", "1", "2", "3"]
    assert uids(two.read(2, 0)) == ["0", "1"]
    assert isinstance(one.cursor, str)
    assert uids(log.make_reader(one.cursor).read(10, 0)) == ["4", "5"]
    assert uids(log.make_reader(two.cursor).read(10, 0)) == ["2", "3", "4", "5"]


def test_a_reader_is_at_the_end_once_it_has_read_all_that_is_there(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log()
    reader, sink = log.make_reader(), log.make_sink()
    assert reader.at_end()
    sink.append([make_episode(uid=str(n)) for n in range(3)])
    assert not reader.at_end()
    reader.read(2, 0)
    assert not reader.at_end()
    reader.read(2, 0)
    assert reader.at_end()
    assert log.make_reader(reader.cursor).at_end()
    sink.append([make_episode(uid="more")])
    assert not reader.at_end()


def test_what_came_before_the_cursor_is_read_back_newest_first(
    make_log: Callable[..., Log], make_episode: MakeEpisode, same: Same
) -> None:
    log = make_log()
    written = [make_episode(uid=str(n), seed=n) for n in range(150)]
    log.make_sink().append(written[:140])
    first = log.make_reader()
    assert first.read_back(10, 0) == []
    assert len(first.read(140, 0)) == 140
    assert first.read_back(10, 0) == []  # it began at the start
    log.make_sink().append(written[140:])
    reader, back = log.make_reader(first.cursor), list[Episode]()
    assert uids(reader.read(3, 0)) == ["140", "141", "142"]
    while episodes := reader.read_back(37, 0):
        assert len(episodes) <= 37
        back += episodes
    assert all(same(a, b) for a, b in zip(reversed(written[:140]), back, strict=True))
    assert uids(reader.read(100, 0)) == [str(n) for n in range(143, 150)]
    assert reader.counts == ReadCounts()


def test_reading_back_ends_at_what_was_trimmed(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log(log_max_bytes=1 << 14)
    sink = log.make_sink()
    sink.append([make_episode(uid=str(n), seed=n) for n in range(100)])
    reader = log.make_reader()
    kept = uids(reader.read(1000, 0))
    resumed = log.make_reader(reader.cursor)
    assert uids(resumed.read_back(1000, 0)) == kept[::-1]
    assert resumed.read_back(1000, 0) == []


def test_an_empty_read_waits_as_long_as_it_was_told(make_log: Callable[..., Log]) -> None:
    reader = make_log().make_reader()
    began = time.monotonic()
    assert reader.read(1, timeout_s=0) == []
    assert reader.read(1, timeout_s=0.3) == []
    assert time.monotonic() - began > 0.28


def test_a_waiting_read_returns_as_soon_as_something_comes(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log()
    reader = log.make_reader()
    threading.Timer(0.2, lambda: log.make_sink().append([make_episode(uid="late")])).start()
    began = time.monotonic()
    assert uids(reader.read(10, timeout_s=30)) == ["late"]
    assert time.monotonic() - began < 25


def test_the_oldest_episodes_make_room(make_log: Callable[..., Log], make_episode: MakeEpisode) -> None:
    log = make_log(log_max_bytes=1 << 14)
    sink, reader = log.make_sink(), log.make_reader()
    for n in range(100):
        sink.append([make_episode(uid=str(n), seed=n)])
    kept = uids(reader.read(1000, 0))
    assert kept == [str(n) for n in range(100 - len(kept), 100)]
    assert 5 < len(kept) < 100


def test_a_single_episode_larger_than_the_bound_is_kept_alone(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log(log_max_bytes=1 << 14)
    sink = log.make_sink()
    sink.append([make_episode(uid="small")])
    sink.append([make_episode(uid="large", num_tokens=30, hidden_size=2000)])
    assert uids(log.make_reader().read(10, 0)) == ["large"]
    sink.append([make_episode(uid="next")])
    assert uids(log.make_reader().read(10, 0)) == ["next"]


def test_an_episode_that_was_trimmed_may_come_again(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log(log_max_bytes=1 << 14)
    sink, reader = log.make_sink(), log.make_reader()
    for n in range(100):
        sink.append([make_episode(uid=str(n), seed=n)])
    reader.read(1000, 0)
    sink.append([make_episode(uid="0")])
    assert uids(reader.read(10, 0)) == ["0"]


def test_episodes_trimmed_before_they_were_read_are_counted(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log(log_max_bytes=1 << 14)
    sink, reader = log.make_sink(), log.make_reader()
    written, missed = 0, []
    for num_episodes in (5, 60, 1, 80):
        sink.append([make_episode(uid=str(n), seed=n) for n in range(written, written + num_episodes)])
        written += num_episodes
        reader.read(1000, 0)
        missed.append(reader.counts.num_trimmed_unread)
    assert missed[0] == 0 < missed[1] == missed[2] < missed[3]
    late = log.make_reader()
    assert len(late.read(1000, 0)) + late.counts.num_trimmed_unread == written


def test_a_restored_cursor_knows_what_was_trimmed_meanwhile(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log(log_max_bytes=1 << 14)
    sink, before = log.make_sink(), log.make_reader()
    sink.append([make_episode(uid=str(n), seed=n) for n in range(5)])
    assert len(before.read(10, 0)) == 5
    sink.append([make_episode(uid=str(n), seed=n) for n in range(5, 100)])
    after = log.make_reader(before.cursor)
    assert len(after.read(1000, 0)) + after.counts.num_trimmed_unread == 95
    assert after.counts.num_trimmed_unread > 0


def test_episodes_that_came_again_are_counted_over_all_writers(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log()
    reader = log.make_reader()
    log.make_sink().append([make_episode(uid="a"), make_episode(uid="b"), make_episode(uid="a")])
    log.make_sink().append([make_episode(uid="b"), make_episode(uid="c")])
    assert len(reader.read(10, 0)) == 3
    assert reader.counts.num_duplicates == 2


def test_only_waiting_counts_as_waiting(make_log: Callable[..., Log], make_episode: MakeEpisode) -> None:
    log = make_log()
    reader = log.make_reader()
    assert reader.read(1, timeout_s=0) == []
    assert reader.waited_s < 0.2
    assert reader.read(1, timeout_s=0.3) == []
    assert reader.waited_s > 0.1  # shards are waited for in turns, and looked at in between
    before_s = reader.waited_s
    sink = log.make_sink()
    sink.append([make_episode(uid=str(n), num_tokens=60, hidden_size=2000) for n in range(30)])
    began = time.monotonic()
    assert len(reader.read(30, timeout_s=30)) == 30
    assert reader.waited_s - before_s < max(0.01, 0.1 * (time.monotonic() - began))


def test_many_writers_lose_and_double_nothing(
    make_log: Callable[..., Log], make_episode: MakeEpisode
) -> None:
    log = make_log()

    def write(writer: int) -> None:
        sink = log.make_sink(writer)
        for n in range(25):
            sink.append([make_episode(uid=f"{writer}.{n}")])

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    reader, read = log.make_reader(), list[str]()
    while len(read) < 100 and (new := reader.read(7, timeout_s=10)):
        read += uids(new)
    for thread in threads:
        thread.join()
    assert reader.read(10, 0) == []
    for writer in range(4):
        assert [uid for uid in read if uid.startswith(f"{writer}.")] == [f"{writer}.{n}" for n in range(25)]
