"""Reading in the background: nothing is lost, doubled, or promised too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mara.buffer.background import BackgroundReader
from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog, RedisEpisodeReader
from mara.buffer.memory import MemoryEpisodeLog, MemoryEpisodeReader
from mara.common.contracts import EpisodeSink, LogReader
from mara.common.episode import Episode
from mara.common.errors import ReplayUnavailable

MakeEpisode = Callable[..., Episode]
Same = Callable[[Episode, Episode], bool]


@pytest.fixture(params=["memory", "redis"])
def log(request: pytest.FixtureRequest, run_id: str) -> tuple[EpisodeSink, Callable[..., LogReader]]:
    """A sink, and what makes a plain reader, from a cursor if given."""
    config = ReplayConfig()
    if request.param == "memory":
        memory = MemoryEpisodeLog(config)
        return memory, memory.reader
    url = request.getfixturevalue("server").url
    sink = RedisEpisodeLog(connect(url), run_id, config)
    return sink, lambda *cursor: RedisEpisodeReader(connect(url), run_id, config, *cursor)


@pytest.fixture
def read_ahead() -> Iterator[Callable[..., BackgroundReader]]:
    """``BackgroundReader``; the threads of the test are ended after it."""
    readers: list[BackgroundReader] = []

    def make(source: LogReader, *max_bytes: int) -> BackgroundReader:
        readers.append(BackgroundReader(source, *max_bytes))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def read_all(reader: BackgroundReader, num: int, at_once: int = 7) -> list[Episode]:
    episodes: list[Episode] = []
    while len(episodes) < num and (new := reader.read(min(at_once, num - len(episodes)), timeout_s=20)):
        assert len(new) <= at_once
        episodes += new
    return episodes


def test_episodes_come_out_whole_and_in_order(
    log: tuple[EpisodeSink, Callable[..., LogReader]],
    read_ahead: Callable[..., BackgroundReader],
    make_episode: MakeEpisode,
    same: Same,
) -> None:
    sink, make_reader = log
    reader = read_ahead(make_reader())
    written = [make_episode(uid=str(n), seed=n) for n in range(50)]
    writer = threading.Thread(target=lambda: [sink.append([episode]) for episode in written])
    writer.start()
    read = read_all(reader, 50)
    writer.join()
    assert all(same(a, b) for a, b in zip(written, read, strict=True))
    assert reader.read(1, timeout_s=0) == []


def test_the_cursor_is_that_of_what_was_handed_out(
    log: tuple[EpisodeSink, Callable[..., LogReader]],
    read_ahead: Callable[..., BackgroundReader],
    make_episode: MakeEpisode,
) -> None:
    sink, make_reader = log
    source = make_reader()
    at_first, reader = source.cursor, read_ahead(source)
    assert reader.cursor == at_first
    sink.append([make_episode(uid=str(n)) for n in range(20)])
    wait_until(lambda: len(reader._queue) == 20)
    num_read = 0
    for num_more in (3, 7, 10):
        num_read += num_more
        assert read_all(reader, num_more)[-1].uid == str(num_read - 1)
        rest = [episode.uid for episode in make_reader(reader.cursor).read(100, 0)]
        assert rest == [str(n) for n in range(num_read, 20)]


def test_it_reads_ahead_no_further_than_the_bytes_it_may_hold(
    read_ahead: Callable[..., BackgroundReader], make_episode: MakeEpisode
) -> None:
    log = MemoryEpisodeLog()
    episodes = [make_episode(uid=str(n), seed=1) for n in range(40)]
    log.append(episodes)
    source = log.reader()
    reader = read_ahead(source, 10 * episodes[0].nbytes)
    wait_until(lambda: source.cursor == "10")
    time.sleep(0.3)
    assert source.cursor == "10"
    assert [episode.uid for episode in reader.read(4, 0)] == ["0", "1", "2", "3"]
    wait_until(lambda: source.cursor == "14")
    assert [episode.uid for episode in read_all(reader, 36)] == [str(n) for n in range(4, 40)]


def test_an_episode_larger_than_the_bound_comes_through(
    read_ahead: Callable[..., BackgroundReader], make_episode: MakeEpisode
) -> None:
    log = MemoryEpisodeLog()
    log.append([make_episode(uid=str(n), hidden_size=100) for n in range(5)])
    assert len(read_all(read_ahead(log.reader(), 1), 5)) == 5


class Failing(MemoryEpisodeReader):
    """Fails where the log ends."""

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        episodes = super().read(max_episodes, 0)
        if not episodes:
            raise ReplayUnavailable("the replay store has not answered for 60 s")
        return episodes


def test_what_reading_raises_comes_after_what_was_read_before_and_again_and_again(
    read_ahead: Callable[..., BackgroundReader], make_episode: MakeEpisode
) -> None:
    log = MemoryEpisodeLog()
    log.append([make_episode(uid=str(n)) for n in range(3)])
    reader = read_ahead(Failing(log))
    wait_until(lambda: reader._error is not None)
    assert [len(reader.read(2, 0)), len(reader.read(2, 0))] == [2, 1]
    for _ in range(2):
        with pytest.raises(ReplayUnavailable, match="60 s"):
            reader.read(2, timeout_s=20)


class Hanging(MemoryEpisodeReader):
    """A store that answers only when it is let."""

    def __init__(self, log: MemoryEpisodeLog) -> None:
        super().__init__(log)
        self.let = threading.Event()

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        self.let.wait(20)
        return super().read(max_episodes, timeout_s)


def test_nobody_waits_for_a_store_that_hangs(
    read_ahead: Callable[..., BackgroundReader], make_episode: MakeEpisode
) -> None:
    log = MemoryEpisodeLog()
    log.append([make_episode()])
    source = Hanging(log)
    reader = read_ahead(source)
    began = time.monotonic()
    assert reader.read(1, timeout_s=0) == []
    assert reader.read(1, timeout_s=0.2) == []
    assert time.monotonic() - began < 15
    assert 0.15 < reader.waited_s < 15
    source.let.set()
    assert len(read_all(reader, 1)) == 1


def test_reading_what_is_there_already_is_not_waiting(
    read_ahead: Callable[..., BackgroundReader], make_episode: MakeEpisode
) -> None:
    log = MemoryEpisodeLog()
    log.append([make_episode(uid=str(n)) for n in range(5)])
    source = log.reader()
    reader = read_ahead(source)
    wait_until(lambda: source.cursor == "5")
    assert len(reader.read(5, timeout_s=20)) == 5
    assert reader.waited_s < 10


def test_closing_ends_the_thread_whether_it_waits_for_episodes_or_for_room(
    log: tuple[EpisodeSink, Callable[..., LogReader]],
    make_episode: MakeEpisode,
) -> None:
    sink, make_reader = log
    for max_bytes in (1 << 30, 1):
        with BackgroundReader(make_reader(), max_bytes) as reader:
            sink.append([make_episode(uid=str(n)) for n in range(3)])
            wait_until(lambda: bool(reader._queue))
        assert not reader._thread.is_alive()
        reader.close()


def test_older_episodes_come_newest_first_while_new_ones_arrive(
    log: tuple[EpisodeSink, Callable[..., LogReader]],
    read_ahead: Callable[..., BackgroundReader],
    make_episode: MakeEpisode,
) -> None:
    sink, make_reader = log
    sink.append([make_episode(uid=str(n)) for n in range(30)])
    before = make_reader()
    assert len(before.read(20, 0)) == 20
    reader = read_ahead(make_reader(before.cursor))
    new, older, has_all = list[str](), list[str](), False
    while not has_all or len(new) < 15:
        new += [episode.uid for episode in reader.read(2, 0)]
        if len(new) == 10:
            sink.append([make_episode(uid=str(n)) for n in range(30, 35)])
        if (episodes := reader.read_back(3, timeout_s=0.05)) is not None and not has_all:
            has_all = not episodes
            older += [episode.uid for episode in episodes]
    assert new == [str(n) for n in range(20, 35)]
    assert older == [str(n) for n in range(19, -1, -1)]
    assert make_reader(reader.cursor).at_end()


def test_older_episodes_that_are_no_longer_wanted_are_let_go(
    read_ahead: Callable[..., BackgroundReader], make_episode: MakeEpisode
) -> None:
    log = MemoryEpisodeLog()
    episodes = [make_episode(uid=str(n), seed=1) for n in range(30)]
    log.append(episodes)
    reader = read_ahead(log.reader("20"), 4 * episodes[0].nbytes)
    assert reader.read_back(1, timeout_s=20) is not None
    wait_until(lambda: len(reader._older) == 4)
    time.sleep(0.1)
    assert len(reader._older) == 4  # no more than the bytes it may hold
    assert reader.read_back(0, 0) == []
    assert not reader._older
    assert len(read_all(reader, 10)) == 10
    assert not reader._older


def test_a_store_that_fails_is_told_of_by_reading_back_too(
    read_ahead: Callable[..., BackgroundReader],
) -> None:
    reader = read_ahead(Failing(MemoryEpisodeLog()))
    wait_until(lambda: reader._error is not None)
    with pytest.raises(ReplayUnavailable, match="60 s"):
        reader.read_back(2, timeout_s=20)


def test_a_finished_log_is_read_to_its_end(
    log: tuple[EpisodeSink, Callable[..., LogReader]],
    make_episode: MakeEpisode,
) -> None:
    sink, make_reader = log
    sink.append([make_episode(uid=str(n)) for n in range(5)])
    with BackgroundReader(make_reader(), log_is_finished=True) as reader:
        assert len(read_all(reader, 4)) == 4
        wait_until(lambda: reader._at_end)
        assert not reader.at_end()
        assert len(read_all(reader, 1)) == 1
        assert reader.at_end()
        assert reader.read(1, timeout_s=20) == []
    with BackgroundReader(make_reader()) as reader:
        assert len(read_all(reader, 5)) == 5
        assert not reader.at_end()


def test_the_counters_are_those_of_the_source(
    read_ahead: Callable[..., BackgroundReader], make_episode: MakeEpisode
) -> None:
    log = MemoryEpisodeLog(ReplayConfig(log_max_bytes=1 << 14))
    log.append([make_episode(uid=str(n), seed=n) for n in range(100)])
    log.append([make_episode(uid="99")])
    reader, plain = read_ahead(log.reader()), log.reader()
    num_kept = len(plain.read(1000, 0))
    assert len(read_all(reader, num_kept)) == num_kept
    assert reader.counts.num_trimmed_unread == plain.counts.num_trimmed_unread == 100 - num_kept > 0
    assert (reader.counts.num_duplicates, reader.counts.num_malformed) == (1, 0)
