"""Checkpoints: what comes back, what is kept, what is refused."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from mara.buffer.background import BackgroundReader
from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog, RedisEpisodeReader
from mara.buffer.memory import MemoryEpisodeLog, MemoryWeightChannel
from mara.buffer.server import EmbeddedServer
from mara.common.config import AgentConfig
from mara.common.episode import Episode
from mara.common.errors import UserError
from mara.learner.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    set_newer_aside,
)
from mara.learner.config import LearnerConfig, SACConfig
from mara.learner.loop import Learner

D = 12
FILES = ("tensors.safetensors", "state.json")
EpisodeMaker = Callable[..., Episode]


@pytest.fixture
def said() -> list[str]:
    return []


class Counter:
    """The smallest thing that can be saved."""

    def __init__(self, gradient_step: int = 0, num_episodes: int = 0) -> None:
        self.gradient_step = gradient_step
        self.num_episodes = num_episodes
        self.state: dict[str, Any] = {"value": torch.arange(gradient_step + 1)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def make_learner(log: MemoryEpisodeLog, num_episodes: int, seed: int, width: int = 8) -> Learner:
    config = LearnerConfig(
        sac=SACConfig(critic_widths=(width, 8), target_update_period=3),
        batch_size=8,
        num_episodes=num_episodes,
        gradient_steps_per_episode=1.5,
        start_batches=1,
        device="cpu",
    )
    shaping = ShapingConfig(score_weights={"good": 1.0}, normalise="running", baseline="prompt")
    return Learner(
        config,
        AgentConfig(widths=(8, 8)),
        ReplayConfig(capacity_transitions=500),
        shaping,
        hidden_size=D,
        source=log.reader(),
        weights=MemoryWeightChannel(),
        seed=seed,
    )


def test_a_loaded_learner_goes_on_bit_for_bit(make_episode: EpisodeMaker, tmp_path: Path) -> None:
    log = MemoryEpisodeLog()
    episodes = [make_episode([1, 0, 1, 1], scores={"good": float(i % 4)}) for i in range(23)]
    log.append(episodes)
    learner = make_learner(log, 23, seed=0)
    learner.run()
    saved = save_checkpoint(tmp_path, learner)

    fresh = make_learner(log, 23, seed=5)
    load_checkpoint(saved, fresh)
    assert all(fresh.mirror.prepend(episode) for episode in reversed(episodes))  # what it holds no copy of
    assert fresh.gradient_step == learner.gradient_step == 12
    assert fresh.num_episodes == 23
    late = make_episode([1, 1, 1], scores={"good": 3.0})
    for one in (learner, fresh):
        one.mirror.add([late])
    for _ in range(7):  # the same draws from the same ring, and the same steps on them
        batches = [one.mirror.sample(8, one._generator) for one in (learner, fresh)]
        assert torch.equal(batches[0].states_BD, batches[1].states_BD)
        assert learner.sac.update(batches[0]) == fresh.sac.update(batches[1])
    torch.testing.assert_close(learner.sac.state_dict(), fresh.sac.state_dict(), rtol=0, atol=0)
    assert learner.state_dict()["mirror"]["normaliser"] == fresh.state_dict()["mirror"]["normaliser"]
    assert learner.state_dict()["limiter"] == fresh.state_dict()["limiter"]


def test_nested_values_come_back_as_they_were(tmp_path: Path) -> None:
    counter = Counter()
    counter.state = {
        "a/b": {"c": torch.tensor(1.5), "d": 7, "empty": {}},
        "a": {"b/c": torch.arange(3), "flag": True, "name": "x", "nothing": None, "pair": [1, 0.25]},
    }
    state = read_checkpoint(save_checkpoint(tmp_path, counter))
    # A file that is mapped keeps its space when it is deleted, and on NFS its folder cannot be.
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert state["a/b"]["c"].item() == 1.5
    assert state["a"]["b/c"].tolist() == [0, 1, 2]
    assert state["a/b"] | {"c": 0} == {"c": 0, "d": 7, "empty": {}}
    assert state["a"] | {"b/c": 0} == {
        "b/c": 0,
        "flag": True,
        "name": "x",
        "nothing": None,
        "pair": [1, 0.25],
    }


def test_the_last_two_are_kept_and_latest_is_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, Counter(step, 2 * step))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000010-episode-00000020", "step-00000011-episode-00000022"]
    assert (tmp_path / "latest").resolve().name == names[-1]
    assert len(read_checkpoint((tmp_path / "latest").resolve())["value"]) == 12


def test_a_run_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Counter(1, 1))

    class Dies(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"value": torch.arange(3), "not json": object()}

    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, Dies(2, 2))
    assert len(read_checkpoint((tmp_path / "latest").resolve())["value"]) == 2
    save_checkpoint(tmp_path, Counter(2, 2))  # what lies about half-written is in nobody's way
    assert len(read_checkpoint((tmp_path / "latest").resolve())["value"]) == 3
    assert not list(tmp_path.glob(".*partial"))


def test_saving_the_same_step_twice_writes_once(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, Counter(3, 3))
    written = (first / "tensors.safetensors").stat().st_mtime_ns
    assert save_checkpoint(tmp_path, Counter(3, 3)) == first
    assert (first / "tensors.safetensors").stat().st_mtime_ns == written


def test_the_files_are_checked_by_the_usual_program(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, Counter(3, 3))
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)


def test_as_many_are_kept_as_are_asked_for(tmp_path: Path) -> None:
    for step in range(5):
        save_checkpoint(tmp_path, Counter(step, step), num_kept=3)
    assert [path.name[5:13] for path in sorted(tmp_path.glob("step-*"))] == [
        "00000002",
        "00000003",
        "00000004",
    ]


def test_a_folder_without_a_checkpoint_has_none(tmp_path: Path, said: list[str]) -> None:
    assert find_checkpoint(tmp_path / "checkpoints", said.append) is None
    assert said == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    tmp_path: Path, said: list[str], name: str, damage: Callable[[Path], None]
) -> None:
    before = save_checkpoint(tmp_path, Counter(3, 3))
    newest = save_checkpoint(tmp_path, Counter(4, 4))
    assert find_checkpoint(tmp_path, said.append) == newest
    damage(newest / name)
    assert find_checkpoint(tmp_path, said.append) == before
    (line,) = said
    assert str(newest) in line and f"{before.name}, the one before, is used" in line
    with pytest.raises(UserError, match="use another one"):
        read_checkpoint(newest)


def test_where_all_are_damaged_there_is_nothing_to_go_on_from(tmp_path: Path, said: list[str]) -> None:
    for step in (3, 4):
        cut(save_checkpoint(tmp_path, Counter(step, step)) / "state.json")
    with pytest.raises(UserError, match=r"step-00000004.*/state.json is damaged.*no other one is sound"):
        find_checkpoint(tmp_path, said.append)


def test_latest_may_be_pointed_to_an_older_one(tmp_path: Path, said: list[str]) -> None:
    older, newer = (save_checkpoint(tmp_path, Counter(step, step)) for step in (3, 4))
    (tmp_path / "latest").unlink()
    assert find_checkpoint(tmp_path, said.append) == newer
    (tmp_path / "latest").symlink_to(older.name)
    assert find_checkpoint(tmp_path, said.append) == older
    assert said == []


def test_a_run_that_goes_on_from_an_older_one_saves_the_same_step_again(tmp_path: Path) -> None:
    older, newer = (save_checkpoint(tmp_path, Counter(step, step)) for step in (3, 4))
    cut(newer / "state.json")
    set_newer_aside(older)
    assert (tmp_path / "latest").resolve() == older
    again = save_checkpoint(tmp_path, Counter(4, 4))
    assert again == newer
    assert len(read_checkpoint(again)["value"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        f"not-used-{newer.name}",
        older.name,
        newer.name,
    ]


def test_a_latest_that_points_to_none_of_them_is_told(tmp_path: Path, said: list[str]) -> None:
    saved = save_checkpoint(tmp_path, Counter(3, 3))
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("not-used-step-00000004-episode-00000004")
    with pytest.raises(UserError, match=rf"latest points to not-used-.*; point it to .* {saved.name}$"):
        find_checkpoint(tmp_path, said.append)


def test_of_those_set_aside_as_many_stay_as_of_the_others(tmp_path: Path) -> None:
    """The ones that were written last, whatever their steps."""
    for number, step in enumerate((9, 8, 7, 6)):
        base = save_checkpoint(tmp_path, Counter(5, 5))
        newer = save_checkpoint(tmp_path, Counter(step, step))
        os.utime(newer, (number, number))
        set_newer_aside(base, num_kept=2)
    assert sorted(path.name for path in tmp_path.glob("not-used-*")) == [
        f"not-used-step-{step:08d}-episode-{step:08d}" for step in (6, 7)
    ]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, Counter(3, 3))
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"schema": 3', '"schema": 99'))
    sums = "".join(f"{sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in FILES)
    (folder / "SHA256SUMS").write_text(sums)
    with pytest.raises(UserError, match="has schema 99, this version reads 3"):
        load_checkpoint(folder, Counter())
    with pytest.raises(UserError, match="has schema 99, this version reads 3"):
        find_checkpoint(tmp_path, pytest.fail)  # before a run that would go on from it is touched


def test_networks_of_another_size_are_refused(make_episode: EpisodeMaker, tmp_path: Path) -> None:
    log = MemoryEpisodeLog()
    saved = save_checkpoint(tmp_path, make_learner(log, 16, seed=0))
    with pytest.raises(UserError, match=r"does not fit .*learner.sac.critic_widths.*use the settings"):
        load_checkpoint(saved, make_learner(log, 16, seed=0, width=16))


def test_a_learner_that_was_killed_goes_on_with_its_ring_filled_from_the_server(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    """What came before the checkpoint, between it and the end, and after it, each episode once."""
    replay = ReplayConfig(capacity_transitions=500)
    episodes = [make_episode([1, 0, 1, 1], scores={"good": float(i % 4)}) for i in range(60)]

    def start(source: BackgroundReader, num_episodes: int) -> Learner:
        config = LearnerConfig(
            sac=SACConfig(critic_widths=(8, 8)),
            batch_size=8,
            num_episodes=num_episodes,
            gradient_steps_per_episode=1.5,
            start_batches=4,
            device="cpu",
        )
        shaping = ShapingConfig(score_weights={"good": 1.0}, normalise="running", baseline="prompt")
        return Learner(
            config,
            AgentConfig(widths=(8, 8)),
            replay,
            shaping,
            hidden_size=D,
            source=source,
            weights=MemoryWeightChannel(),
        )

    with EmbeddedServer(max_bytes=64 << 20) as server:
        sink = RedisEpisodeLog(connect(server.url), "run", replay)
        sink.append(episodes[:30])
        with BackgroundReader(RedisEpisodeReader(connect(server.url), "run", replay)) as source:
            first = start(source, 30)
            first.run()
            saved = save_checkpoint(tmp_path, first)
        sink.append(episodes[30:40])
        cursor = read_checkpoint(saved)["cursor"]
        with BackgroundReader(RedisEpisodeReader(connect(server.url), "run", replay, cursor)) as source:
            second = start(source, 60)
            load_checkpoint(saved, second)
            writer = threading.Timer(0.2, sink.append, [episodes[40:]])
            writer.start()
            summary = second.run()
            writer.join()
    assert (summary.num_episodes, summary.num_transitions) == (60, 240)
    assert second.mirror.num_episodes == 60
    held = second.mirror._states_CD
    assert held is not None
    order = (second.mirror._tail + torch.arange(240)) % 500
    assert torch.equal(held[order], torch.cat([episode.states_TD for episode in episodes]))
    (model,) = second.state_dict()["mirror"]["normaliser"]["models"].values()
    assert model[:2] == pytest.approx([60, 1.5])  # each episode counted once
    assert summary.gradient_steps > first.gradient_step


def test_copies_beside_the_checkpoints_are_neither_used_nor_deleted(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, Counter(1, 1))
    (tmp_path / f"{first.name}.tar").write_text("")
    shutil.copytree(first, tmp_path / f"{first.name}.bak")
    for step in (2, 3, 4):
        newest = save_checkpoint(tmp_path, Counter(step, step))
    assert {path.name for path in tmp_path.glob("step-*1*")} == {f"{first.name}.tar", f"{first.name}.bak"}
    assert find_checkpoint(tmp_path, pytest.fail) == newest


def test_all_files_of_a_checkpoint_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, Counter(1))
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1
