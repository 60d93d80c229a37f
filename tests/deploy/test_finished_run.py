"""Which finished runs can be trained on, and what is said of those that cannot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead, head_digests, save_head
from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.lease import hold_lease
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.server import EmbeddedServer
from mara.common.addresses import hide_password
from mara.common.episode import Episode
from mara.common.errors import UserError
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config, load_config
from mara.deploy.console import PlainDisplay, View
from mara.deploy.finished_run import find_log, warn_of_forced
from mara.deploy.model_shape import LLMIdentity, find_digest
from mara.deploy.preflight import Checked, preflight
from mara.deploy.progress import Progress
from mara.deploy.run_folder import LogRecord, make_run_folder, read_log_record
from mara.deploy.run_lock import hold_run
from mara.deploy.signals import StopSignal
from mara.deploy.store import open_store

HIDDEN_SIZE = 32
LLM = "1234"
"""Digest of its files."""
COLUMNS = {
    "actions_T": np.uint8,
    "ranks_T": np.int16,
    "num_candidates_T": np.int16,
    "positions_T": np.int32,
    "forced_T": np.bool_,
    "reference_logprobs_T": np.float32,
    "accept_logprobs_T": np.float32,
    "reject_logprobs_T": np.float32,
    "policy_versions_T": np.int64,
}
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(1 << 26) as running:
        yield running


@pytest.fixture
def make_run(config_path: Path) -> MakeRun:
    """The folder of a run with overrides, and the record of a log that is at ``redis_url``."""

    def make(*overrides: str, redis_url: str | None = None, scores: tuple[str, ...] = ("helpful",)) -> Path:
        folder = make_run_folder(load_config(config_path, overrides))
        record = LogRecord(
            "run-1",
            None if redis_url is None else [redis_url],
            HIDDEN_SIZE,
            LLM,
            {name: {} for name in scores},
            "p",
        )
        record.write(folder)
        return folder

    return make


def offline(config_path: Path, run: Path, *overrides: str) -> RunConfig:
    return load_config(config_path, [f"replay.from={run}", "rollout.num_actors=0", *overrides])


def append(url: str, run_id: str, uids: Sequence[str] = ("e",), config: ReplayConfig | None = None) -> None:
    """Store answers in which nothing was decided."""
    columns = {name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}
    tokens = {"prompt_ids_P": np.ones(1, np.int32), "response_ids_N": np.ones(2, np.int32)}
    episode = Episode(
        uid="",
        prompt_id="p",
        actor_id="a",
        states_TD=torch.zeros((0, HIDDEN_SIZE), dtype=torch.bfloat16),
        finish_reason="eos",
        started_at_s=0.0,
        finished_at_s=1.0,
        scores={"helpful": 0.5},
        **tokens,
        **columns,
    )
    with connect(url) as client:
        log = RedisEpisodeLog(client, run_id, config or ReplayConfig())
        log.append([replace(episode, uid=uid) for uid in uids])


def test_a_run_has_actors_or_a_log_to_read(config_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout.num_actors=0 leaves nobody .* or replay.from=RUN"):
        load_config(config_path, ["rollout.num_actors=0"])
    with pytest.raises(UserError, match=r"replay.from=.*; set rollout.num_actors=0"):
        load_config(config_path, [f"replay.from={tmp_path}"])


def test_the_run_to_read_is_kept_by_its_own_name(
    config_path: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run()
    (tmp_path / "latest").symlink_to(folder)
    config = offline(config_path, tmp_path / "latest")
    assert config.replay.from_run == folder
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config))
    assert load_config(saved).replay == config.replay


def test_an_unknown_name_for_it_is_told_the_right_one(config_path: Path) -> None:
    with pytest.raises(UserError, match=r"replay.from_run is not a setting; did you mean replay.from\?"):
        load_config(config_path, ["replay.from_run=x"])


def test_a_folder_that_is_no_run_is_named(config_path: Path, tmp_path: Path) -> None:
    config = offline(config_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"replay.from=.*nowhere: .* does not exist; give"):
        find_log(config, HIDDEN_SIZE, LLM)


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ("decoding.truncation.top_k=7", r"decoding.truncation.top_k=7, this is 40"),
        ("decoding.fallback=first", r"decoding.fallback=first, this is last"),
        ("llm.quantization=8bit", r"llm.quantization=8bit, this is none"),
        ("llm.system_prompt=be good", r"llm.system_prompt=be good, this is null"),
        ("llm.chat_template={{ messages }}", r"llm.chat_template={{ messages }}, this is null"),
        ("llm.model=another/model", r"llm.model=another/model, this is .*llm"),
    ],
)
def test_episodes_made_with_other_settings_are_refused_by_name(
    config_path: Path, make_run: MakeRun, theirs: str, named: str
) -> None:
    config = offline(config_path, make_run(theirs))
    with pytest.raises(UserError, match=rf"its episodes were made with {named}; use the same"):
        find_log(config, HIDDEN_SIZE, LLM)


def test_episodes_of_another_hidden_size_are_refused(config_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"hidden size 32, llm.model=.* has 64"):
        find_log(offline(config_path, make_run()), 64, LLM)
    with pytest.raises(
        UserError, match=r"with other files of llm\.model=.* \(1234…, now 5678…\); put those back, or make"
    ):
        find_log(offline(config_path, make_run()), HIDDEN_SIZE, "5678")


def test_a_reward_without_scores_is_refused_and_the_ones_there_are_listed(
    config_path: Path, make_run: MakeRun
) -> None:
    config = offline(config_path, make_run(scores=("cost", "polite")))
    with pytest.raises(
        UserError, match=r"rewards.helpful: .* no score of that name \(they have cost, polite\)"
    ):
        find_log(config, HIDDEN_SIZE, LLM)


def test_episodes_that_went_with_their_server_are_told_of(config_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"its episodes are gone.*replay.durable=true"):
        find_log(offline(config_path, make_run()), HIDDEN_SIZE, LLM)
    folder = make_run()
    (folder / "replay").mkdir()
    with pytest.raises(UserError, match="its episodes are gone"):
        find_log(offline(config_path, folder), HIDDEN_SIZE, LLM)


def test_a_run_without_a_record_is_told_of(config_path: Path, make_run: MakeRun) -> None:
    folder = make_run()
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(folder / "replay.json")
        with pytest.raises(UserError, match=r"no replay.json"):
            find_log(offline(config_path, folder), HIDDEN_SIZE, LLM)


def test_a_run_that_read_anothers_episodes_stands_for_the_other(config_path: Path, make_run: MakeRun) -> None:
    first = make_run()
    (first / "replay" / "appendonlydir").mkdir(parents=True)
    second = make_run_folder(offline(config_path, first))
    assert find_log(offline(config_path, second), HIDDEN_SIZE, LLM).data_dir == first / "replay"
    shutil.rmtree(first)
    with pytest.raises(UserError, match=rf"replay.from={second} \(episodes of {first}\): .*{first}"):
        find_log(offline(config_path, second), HIDDEN_SIZE, LLM)


def test_a_server_with_the_episodes_is_found_and_one_without_is_not(
    config_path: Path, make_run: MakeRun, server: EmbeddedServer
) -> None:
    shown = hide_password(server.url)
    folder = make_run(redis_url=shown)
    with pytest.raises(UserError, match=r"password .*; add replay.redis_url") as caught:
        find_log(offline(config_path, folder), HIDDEN_SIZE, LLM)
    assert shown in str(caught.value)
    config = offline(config_path, folder, f"replay.redis_url={server.url}")
    with pytest.raises(UserError, match=r"no episodes of it any more \(keys mara:run-1:"):
        find_log(config, HIDDEN_SIZE, LLM)
    append(server.url, "run-1")
    log = find_log(config, HIDDEN_SIZE, LLM)
    assert (log.run_id, log.redis_urls, log.data_dir) == ("run-1", [server.url], None)


def test_episodes_that_made_room_before_anybody_read_are_told_of_at_the_start(
    config_path: Path, make_run: MakeRun, server: EmbeddedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(redis_url=hide_password(server.url))
    config = offline(config_path, folder, f"replay.redis_url={server.url}")
    append(server.url, "run-1", ["e"])
    find_log(config, HIDDEN_SIZE, LLM)
    assert capsys.readouterr().err == ""
    with connect(server.url) as client:
        record_bytes = client.strlen("mara:run-1:0:record:e")
        small = ReplayConfig(log_max_bytes=1 << 14)
        num_kept = small.log_max_bytes // (record_bytes + 2)  # their uids are three letters
        append(server.url, "run-1", [f"{number:03}" for number in range(100)], small)
        assert client.xlen("mara:run-1:0:episodes") == num_kept < 101
    find_log(config, HIDDEN_SIZE, LLM)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{101 - num_kept} of its 101 episodes are gone" in line
    assert f"training goes by the {num_kept} that are left" in line
    assert "larger replay.log_max_bytes" in line


def test_a_run_that_goes_on_is_refused_with_who_and_what_to_do(
    config_path: Path, make_run: MakeRun, server: EmbeddedServer
) -> None:
    folder = make_run()
    (folder / "replay" / "appendonlydir").mkdir(parents=True)
    told = rf"replay.from=.*: its run goes on .*\(process {os.getpid()} on .*\); wait for its end, or stop it"
    with hold_run(folder), pytest.raises(UserError, match=told):
        find_log(offline(config_path, folder), HIDDEN_SIZE, LLM)
    assert find_log(offline(config_path, folder), HIDDEN_SIZE, LLM).data_dir == folder / "replay"
    # Its folder may be that of another machine: then the server tells.
    folder = make_run(redis_url=server.url)
    append(server.url, "run-1")
    with hold_lease([server.url], "run-1", "writes", 5.0), pytest.raises(UserError, match=told):
        find_log(offline(config_path, folder, f"replay.redis_url={server.url}"), HIDDEN_SIZE, LLM)
    with hold_lease([server.url], "run-1", "reads", 5.0), connect(server.url) as client:
        log = find_log(offline(config_path, folder, f"replay.redis_url={server.url}"), HIDDEN_SIZE, LLM)
        assert log.num_episodes == client.xlen("mara:run-1:0:episodes")  # what the progress goes by


def test_episodes_in_the_run_folder_are_for_this_machine_only(config_path: Path, make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "replay" / "appendonlydir").mkdir(parents=True)
    assert find_log(offline(config_path, folder), HIDDEN_SIZE, LLM).data_dir == folder / "replay"
    with pytest.raises(UserError, match=r"leave out ray.address"):
        find_log(
            offline(config_path, folder, "ray.address=auto", "replay.redis_url=redis://h"), HIDDEN_SIZE, LLM
        )


def test_a_record_holds_no_password(make_run: MakeRun) -> None:
    folder = make_run(redis_url=hide_password("redis://me:secret@host:1"))
    assert "secret" not in (folder / "replay.json").read_text()
    assert json.loads((folder / "replay.json").read_text())["run_id"] == "run-1"
    record = read_log_record(folder)
    assert record is not None and record.redis_urls == ["redis://me:***@host:1"]


def test_another_head_of_the_same_name_is_warned_of(
    config_path: Path, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = RewardHead(HeadShape(hidden_size=HIDDEN_SIZE)).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_head(tmp_path / "helpful", head, {})
    folder = make_run()
    (folder / "replay" / "appendonlydir").mkdir(parents=True)
    llm_digest = find_digest(load_config(config_path).llm)
    for heads, warned in (
        ({"helpful": head_digests(tmp_path / "helpful")}, False),
        ({"helpful": {"x": "0"}}, True),
    ):
        LogRecord("run-1", None, HIDDEN_SIZE, llm_digest, heads, "p").write(folder)
        checked = preflight(offline(config_path, folder))
        assert checked.log is not None and checked.llm_digest == llm_digest
        assert checked.prompts_digest == sha256((tmp_path / "prompts.jsonl").read_bytes()).hexdigest()
        captured = capsys.readouterr()
        assert ("is another head than the one that scored" in captured.out + captured.err) == warned


def test_a_log_with_fewer_episodes_than_are_asked_for_is_told_of(
    config_path: Path, make_run: MakeRun, server: EmbeddedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(redis_url=hide_password(server.url))
    append(server.url, "run-1")
    at = ("learner.num_episodes=1000", f"replay.redis_url={server.url}")
    config = offline(config_path, folder, *at)
    log = find_log(config, HIDDEN_SIZE, LLM)
    assert log.num_episodes is not None
    identity = LLMIdentity(None, None)
    checked = Checked((), "p", HIDDEN_SIZE, identity, LLM, {}, {}, unpacks_llm=False, log=log)
    for wanted, is_told in ((1000, True), (log.num_episodes, False)):
        learner = config.learner.model_copy(update={"num_episodes": wanted})
        view = View("t", num_episodes=wanted)
        with (
            StopSignal() as stop,
            open_store(
                config.model_copy(update={"learner": learner}),
                checked,
                folder,
                "run-1",
                Progress(view, PlainDisplay(view), stop),
            ),
        ):
            assert view.num_episodes == log.num_episodes
        told = f"has {log.num_episodes} episodes of the {wanted} that learner.num_episodes asks for"
        assert (told in capsys.readouterr().out) == is_told


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([(10, 0.9), (1000, 0.1)], ""),  # the mean over episodes, not over rows
        ([(100, 0.1), (1000, 0.5)], "46% of the tokens that its agent decided were forced"),
        ([(50, None), (100, 0.6)], "60% of the tokens"),
        ([(10, None)], ""),
        ([], ""),
    ],
)
def test_episodes_in_which_nearly_all_was_rejected_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rates: list[tuple[int, float | None]], told: str
) -> None:
    warn_of_forced(tmp_path)  # without a record nothing is known
    assert capsys.readouterr().err == ""
    rows = [
        {"episodes/total": total} | ({} if r is None else {"episode/forced_rate": r}) for total, r in rates
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warn_of_forced(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told) and all(told in line for line in lines)
