"""``mara store`` on a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.lease import hold_lease
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.server import EmbeddedServer
from mara.buffer.weights import RedisWeightChannel
from mara.common.errors import UserError
from mara.deploy.bench.replay import synthetic_episodes
from mara.deploy.cli import app
from mara.deploy.run_folder import RunRecord


@pytest.fixture
def url() -> Iterator[str]:
    """A server with two runs: one of two shards, one of which only weights are left."""
    with EmbeddedServer(256 << 20) as server, connect(server.url) as client:
        for shard, count in ((0, 3), (1, 2)):
            log = RedisEpisodeLog(client, "first-1", ReplayConfig(), shard)
            log.append(synthetic_episodes(count, hidden_size=16, seed=shard))
        RedisWeightChannel(client, "second", None).publish(1, {"w": torch.zeros(250_000)})
        client.set("somebody:else", "s")
        yield server.url


def mara(*command: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["store", *command])
    return result.exit_code, result.stdout, result.stderr


def keys_at(url: str) -> set[bytes]:
    with connect(url) as client:
        return {key for key in client.scan_iter() if key != b"mara:probe"}


def test_the_runs_on_a_server_are_listed_with_what_they_take_and_who_uses_them(url: str) -> None:
    status, out, _ = mara("list", url)
    first, second = out.splitlines()
    assert status == 0
    assert first.startswith("first-1 | 5 episodes | 0.0 MB | newest of " + time.strftime("%Y-"))
    assert second == "second | 0 episodes | 1.0 MB"
    with hold_lease([url], "second", "writes", 5.0), hold_lease([url], "first-1", "reads", 5.0):
        first, second = mara("list", url)[1].splitlines()
    assert "a run trains on its episodes (process " in first
    assert "it goes on (process " in second


def test_an_address_that_is_none_is_called_what_the_command_calls_it() -> None:
    for command in (("list", "http://x"), ("delete", "http://x", "run")):
        assert mara(*command) == (
            2,
            "",
            "mara: error: URL: http://x is not a server address; "
            "write redis://, rediss:// or unix:// before it\n",
        )


def test_a_run_is_deleted_whole_and_alone_and_only_if_that_is_said(url: str) -> None:
    before = keys_at(url)
    status, out, _ = mara("delete", url, "first-1")
    assert (status, keys_at(url)) == (0, before)
    assert out.startswith("would be deleted: first-1 | 5 episodes") and "add --yes" in out
    status, out, _ = mara("delete", url, "first-1", "--yes")
    assert (status, out.startswith("deleted: first-1 | 5 episodes")) == (0, True)
    assert keys_at(url) == {key for key in before if not key.startswith(b"mara:first-1:")}
    assert b"somebody:else" in keys_at(url) and len(keys_at(url)) == 3
    assert mara("delete", url, "second", "--yes")[0] == 0
    assert "no runs have anything on unix://:***@" in mara("list", url)[1]


def test_a_full_server_is_listed_and_emptied() -> None:
    """That is when one wants to delete something."""
    with EmbeddedServer(256 << 20) as server, connect(server.url) as client:
        RedisEpisodeLog(client, "old", ReplayConfig()).append(synthetic_episodes(2, hidden_size=16))
        client.config_set("maxmemory", 1)
        with pytest.raises(UserError, match="is full"):
            connect(server.url)
        assert mara("list", server.url)[1].startswith("old | 2 episodes")
        assert mara("delete", server.url, "old", "--yes")[0] == 0
        assert not client.keys("mara:old:*")


def test_a_server_that_does_not_answer_what_it_is_asked_is_named_without_its_password(url: str) -> None:
    with connect(url) as owner:
        owner.acl_setuser(
            "guest", enabled=True, passwords=["+s3cret"], categories=["+@all"], commands=["-scan"], keys=["*"]
        )
    place = url.rpartition("@")[2]
    status, out, error = mara("list", f"unix://guest:s3cret@{place}")
    assert (status, out) == (2, "")
    assert error.startswith(f"mara: error: unix://guest:***@{place} cannot be asked (")
    assert "scan" in error and error.endswith("; look at the server\n") and len(error.splitlines()) == 1


def test_nothing_is_deleted_where_one_run_is_in_use_or_unknown(url: str) -> None:
    before = keys_at(url)
    password = url.partition("//:")[2].partition("@")[0]
    with hold_lease([url], "second", "writes", 5.0):
        status, out, error = mara("delete", url, "first-1", "second", "--yes")
    assert (status, out, keys_at(url)) == (2, "", before)
    assert error.startswith("mara: error: run second is in use: it goes on (process ")
    assert len(error.splitlines()) == 1
    status, out, error = mara("delete", url, "first-1", "other", "--yes")
    assert (status, out, keys_at(url)) == (2, "", before)
    assert "has nothing of a run 'other'; `mara store list` shows" in error and password not in error


def test_a_run_is_known_by_its_folder_too_and_a_near_name_is_asked_about(url: str, tmp_path: Path) -> None:
    with connect(url) as client:
        for run_id in ("tiny-20260101-120000-0123abcd", "tiny-20260202-120000-89abcdef"):
            RedisEpisodeLog(client, run_id, ReplayConfig()).append(synthetic_episodes(1, hidden_size=16))
    folder = tmp_path / "moved"
    folder.mkdir()
    RunRecord("tiny-20260101-120000-0123abcd", "abc", 1).write(folder)
    (tmp_path / "latest").symlink_to(folder)
    for given in (
        str(folder),
        f"{tmp_path / 'latest'}/",
        "tiny-20260101-120000",
        "runs/tiny-20260101-120000/",
    ):
        status, out, error = mara("delete", url, given, "tiny-20260101-120000-0123abcd")
        assert (status, error) == (0, "")
        assert out.startswith("would be deleted: tiny-20260101-120000-0123abcd | 1 episodes")
        assert len(out.splitlines()) == 2
    status, out, error = mara("delete", url, "tiny-20260201-120000", "--yes")
    assert (status, out) == (2, "")
    assert error.endswith(
        "has nothing of a run 'tiny-20260201-120000'; did you mean tiny-20260202-120000-89abcdef?\n"
    )
    RunRecord("tiny-20260101-120000-ffffffff", "abc", 1).write(folder)
    status, _, error = mara("delete", url, str(folder), "--yes")
    assert status == 2 and "has nothing of the run in" in error and "ffffffff" in error


def test_a_folder_name_that_two_runs_had_deletes_neither(url: str) -> None:
    ids = ["tiny-20260101-120000-0123abcd", "tiny-20260101-120000-89abcdef"]
    with connect(url) as client:
        for run_id in ids:
            RedisEpisodeLog(client, run_id, ReplayConfig()).append(synthetic_episodes(1, hidden_size=16))
    before = keys_at(url)
    status, out, error = mara("delete", url, "tiny-20260101-120000", "--yes")
    assert (status, out, keys_at(url)) == (2, "", before)
    assert f"may be any of {', '.join(ids)}; give one of them" in error
