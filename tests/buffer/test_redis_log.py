"""What only the log on Redis has: its accounts, and records that are no episodes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import redis

from mara.buffer.codec import encode_episode
from mara.buffer.config import QUARANTINE_ENTRIES, QUARANTINE_RECORD_BYTES, READ_BYTES, ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.keys import keys_of
from mara.buffer.log import Record, RedisEpisodeLog, RedisEpisodeReader, record_key
from mara.buffer.server import EmbeddedServer
from mara.common.episode import Episode
from mara.common.errors import UserError

MakeEpisode = Callable[..., Episode]
CONFIG = ReplayConfig()


def store(sink: RedisEpisodeLog, records: list[tuple[str, bytes]]) -> None:
    """Store records that no episode was encoded to."""
    assert sink.store([Record(uid, data, len(data)) for uid, data in records])


def test_the_accounts_agree_with_the_stream_while_it_is_trimmed(
    client: redis.Redis, run_id: str, make_episode: MakeEpisode
) -> None:
    config = ReplayConfig(log_max_bytes=1 << 14)
    sink, keys = RedisEpisodeLog(client, run_id, config), keys_of(run_id)
    trimmed = False
    for n in range(60):
        sink.append([make_episode(uid=f"{n}|x", seed=n, num_tokens=n % 20)])
        entries = [fields for _, fields in client.xrange(keys.episodes)]
        records = client.mget([record_key(keys, fields[b"u"].decode()) for fields in entries])
        assert [int(fields[b"s"]) for fields in entries] == list(map(len, records))
        assert int(client.get(keys.nbytes)) == sum(map(len, records)) <= 1 << 14
        assert len(client.keys(record_key(keys, "*"))) == len(records)
        trimmed |= len(records) < n + 1
    assert trimmed
    assert [fields[b"u"] for fields in entries] == [b"%d|x" % n for n in range(60 - len(records), 60)]
    assert {client.ttl(key) for key in client.keys(record_key(keys, "*"))} == {-1}, "one would expire"


def test_a_record_whose_writer_died_before_its_entry_came_is_not_in_the_log_and_does_not_stay(
    client: redis.Redis, run_id: str, make_episode: MakeEpisode
) -> None:
    sink, keys = RedisEpisodeLog(client, run_id, CONFIG), keys_of(run_id)
    key = record_key(keys, "a")
    client.set(key, encode_episode(make_episode(uid="a")), ex=3600)
    assert RedisEpisodeReader(client, run_id, CONFIG).read(1, timeout_s=0) == []
    sink.append([make_episode(uid="a")])
    assert client.ttl(key) == -1
    assert [e.uid for e in RedisEpisodeReader(client, run_id, CONFIG).read(5, timeout_s=0)] == ["a"]


def test_a_record_that_the_server_evicted_before_its_entry_came_is_sent_again(
    client: redis.Redis, run_id: str, make_episode: MakeEpisode
) -> None:
    sink = RedisEpisodeLog(client, run_id, CONFIG.model_copy(update={"retry_first_s": 0.01}))
    pipeline_of, keys = client.pipeline, keys_of(run_id)

    def evicting(**settings: Any) -> Any:
        pipeline = pipeline_of(**settings)
        set_record = pipeline.set

        def set_and_lose(key: str, *args: Any, **kwargs: Any) -> Any:
            set_record(key, *args, **kwargs)
            client.pipeline = pipeline_of  # the next attempt is left alone
            return pipeline.delete(key)

        pipeline.set = set_and_lose
        return pipeline

    client.pipeline = evicting
    sink.append([make_episode(uid="a")])
    assert client.ttl(record_key(keys, "a")) == -1
    assert [e.uid for e in RedisEpisodeReader(client, run_id, CONFIG).read(5, timeout_s=0)] == ["a"]


def test_records_that_are_no_episodes_are_counted_and_passed_over(
    client: redis.Redis, run_id: str, make_episode: MakeEpisode, caplog: pytest.LogCaptureFixture
) -> None:
    sink, reader = RedisEpisodeLog(client, run_id, CONFIG), RedisEpisodeReader(client, run_id, CONFIG)
    sink.append([make_episode(uid="a")])
    store(sink, [("c", b"garbage")])
    client.xadd(keys_of(run_id).episodes, {"other": b"field"})
    store(sink, [("d", encode_episode(make_episode())[:-5])])
    sink.append([make_episode(uid="b")])
    with caplog.at_level(logging.WARNING):
        assert [episode.uid for episode in reader.read(2, timeout_s=0)] == ["a", "b"]
    assert reader.counts.num_malformed == 3
    assert len(caplog.records) == 3
    store(sink, [(f"{n}", b"garbage") for n in range(100)])
    with caplog.at_level(logging.WARNING):
        assert reader.read(10, timeout_s=0) == []
    assert reader.counts.num_malformed == 103
    assert len(caplog.records) == 20
    assert caplog.records[-1].message.endswith("no more warnings")


def test_a_skipped_record_is_kept_with_the_reason_and_the_place_it_came_from(
    client: redis.Redis, run_id: str, make_episode: MakeEpisode
) -> None:
    reader, keys = RedisEpisodeReader(client, run_id, CONFIG), keys_of(run_id)
    future = msgpack.packb({"schema": 7, "uid": "u"})
    sink = RedisEpisodeLog(client, run_id, CONFIG)
    store(sink, [("u", future), ("v", encode_episode(make_episode())[:-1])])
    at = client.xrange(keys.episodes)[0][0]
    assert reader.read(5, timeout_s=0) == []
    first, second = (fields for _, fields in client.xrange(keys.quarantine))
    assert first == {
        b"e": future,
        b"why": b"unknown schema 7; this version reads schema 1",
        b"from": f"{keys.episodes} {at.decode()}".encode(),
        b"size": str(len(future)).encode(),
    }
    assert b"not a msgpack record" in second[b"why"]
    assert reader.counts.num_malformed == reader.counts.num_quarantined == 2
    reader.read(5, timeout_s=0)
    assert client.xlen(keys.quarantine) == 2


def test_the_quarantine_stays_small_whatever_comes(client: redis.Redis, run_id: str) -> None:
    reader, keys = RedisEpisodeReader(client, run_id, CONFIG), keys_of(run_id)
    sink = RedisEpisodeLog(client, run_id, CONFIG)
    for n in range(3 * QUARANTINE_ENTRIES):
        store(sink, [(str(n), b"%d " % n + bytes(2 * QUARANTINE_RECORD_BYTES))])
    while reader.counts.num_malformed < 3 * QUARANTINE_ENTRIES:
        assert reader.read(20, timeout_s=0) == []
    kept = [fields for _, fields in client.xrange(keys.quarantine)]
    assert [int(fields[b"e"].split()[0]) for fields in kept] == list(
        range(2 * QUARANTINE_ENTRIES, 3 * QUARANTINE_ENTRIES)
    )
    assert {len(fields[b"e"]) for fields in kept} == {QUARANTINE_RECORD_BYTES}
    assert int(kept[-1][b"size"]) > 2 * QUARANTINE_RECORD_BYTES
    whole_bytes = QUARANTINE_ENTRIES * QUARANTINE_RECORD_BYTES
    assert client.memory_usage(keys.quarantine, samples=0) < 1.25 * whole_bytes


def stopping_after_the_reply(read: Callable[..., Any], server: EmbeddedServer) -> Callable[..., Any]:
    """The store goes away between the reply with a bad record and the copy of it."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        reply = read(*args, **kwargs)
        server.stop()
        return reply

    return wrapped


@pytest.mark.parametrize("trouble", ["full", "another kind of key", "away"])
def test_reading_goes_on_where_no_copy_can_be_kept(
    make_episode: MakeEpisode, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    with EmbeddedServer(max_bytes=8 << 20) as server:
        owner, keys = connect(server.url), keys_of("r")
        store(RedisEpisodeLog(owner, "r", CONFIG), [("g", b"garbage")])
        RedisEpisodeLog(owner, "r", CONFIG).append([make_episode(uid="a")])
        client = connect(server.url)
        reader = RedisEpisodeReader(client, "r", CONFIG)
        if trouble == "full":
            owner.config_set("maxmemory", 1)
        elif trouble == "another kind of key":
            owner.set(keys.quarantine, "text")
        else:
            client.mget = stopping_after_the_reply(client.mget, server)
        with caplog.at_level(logging.WARNING):
            assert [episode.uid for episode in reader.read(2, timeout_s=0)] in (["a"], [])
        assert (reader.counts.num_malformed, reader.counts.num_quarantined) == (1, 0)
        assert sum("could not be copied" in record.message for record in caplog.records) == 1


def test_runs_do_not_see_each_other(client: redis.Redis, run_id: str, make_episode: MakeEpisode) -> None:
    RedisEpisodeLog(client, run_id, CONFIG).append([make_episode()])
    assert RedisEpisodeReader(client, f"{run_id}-other", CONFIG).read(10, 0) == []


def test_a_store_that_stays_full_is_given_up_after_a_while_and_names_the_setting(
    make_episode: MakeEpisode,
) -> None:
    impatient = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.1, max_outage_s=0.4)
    with EmbeddedServer(max_bytes=8 << 20) as small:
        sink = RedisEpisodeLog(connect(small.url), "r", impatient)
        episodes = [make_episode(uid=str(n), num_tokens=30, hidden_size=4000) for n in range(20)]
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"log_max_bytes is 1073741824, .* no memory left for [\d.]+ s; lower"
        ):
            sink.append(episodes)
        assert time.monotonic() - began > 0.35


def test_an_append_that_found_no_memory_goes_through_once_there_is_some(make_episode: MakeEpisode) -> None:
    patient = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.1, max_outage_s=30)
    with EmbeddedServer(max_bytes=8 << 20) as small:
        client = connect(small.url)
        sink = RedisEpisodeLog(connect(small.url), "r", patient)
        client.config_set("maxmemory", 1)
        began = time.monotonic()
        threading.Timer(0.3, lambda: client.config_set("maxmemory", 8 << 20)).start()
        sink.append([make_episode(uid="a"), make_episode(uid="b")])
        assert time.monotonic() - began > 0.25
        reader = RedisEpisodeReader(client, "r", patient)
        assert [episode.uid for episode in reader.read(10, 0)] == ["a", "b"]


def test_a_read_does_not_make_the_store_hold_the_whole_log_twice(make_episode: MakeEpisode) -> None:
    with EmbeddedServer(max_bytes=512 << 20) as server:
        client = connect(server.url)
        sink = RedisEpisodeLog(client, "r", CONFIG)
        episode = make_episode(num_tokens=120, hidden_size=4096)
        num_episodes = 4 * READ_BYTES // episode.nbytes
        for n in range(num_episodes):
            sink.append([replace(episode, uid=str(n))])
        before = client.info("memory")["used_memory_peak"]
        reader = RedisEpisodeReader(connect(server.url), "r", CONFIG)
        num_read = 0
        while read := reader.read(64, 0):
            num_read += len(read)
        assert num_read == num_episodes > 64
        assert client.info("memory")["used_memory_peak"] - before < 1.25 * READ_BYTES


def test_scripts_forgotten_by_the_server_are_loaded_again(
    client: redis.Redis, run_id: str, make_episode: MakeEpisode
) -> None:
    sink = RedisEpisodeLog(client, run_id, CONFIG)
    sink.append([make_episode(uid="a")])
    client.script_flush()
    sink.append([make_episode(uid="b"), make_episode(uid="c")])
    reader = RedisEpisodeReader(client, run_id, CONFIG)
    assert [episode.uid for episode in reader.read(10, 0)] == ["a", "b", "c"]


@pytest.mark.parametrize("run_id", ["", "a:b", "a b", "x" * 200, "a/b", "a\n"])
def test_a_run_id_that_cannot_name_keys_is_refused(run_id: str) -> None:
    with pytest.raises(UserError, match="cannot name keys"):
        keys_of(run_id)
