"""Checkpoints: what comes back, what is kept, what is refused."""

import json
import threading
from collections.abc import Callable
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
from mara.learner.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from mara.learner.config import LearnerConfig, SACConfig
from mara.learner.loop import Learner

D = 12
EpisodeMaker = Callable[..., Episode]


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
    save_checkpoint(tmp_path, learner)

    fresh = make_learner(log, 23, seed=5)
    fresh.mirror.add(episodes)  # a checkpoint holds no ring
    load_checkpoint(tmp_path, fresh)
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
    save_checkpoint(tmp_path, counter)
    state = read_checkpoint(tmp_path)
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
    assert len(read_checkpoint(tmp_path)["value"]) == 12


def test_a_run_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Counter(1, 1))

    class Dies(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"value": torch.arange(3), "not json": object()}

    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, Dies(2, 2))
    assert len(read_checkpoint(tmp_path)["value"]) == 2
    save_checkpoint(tmp_path, Counter(2, 2))  # what lies about half-written is in nobody's way
    assert len(read_checkpoint(tmp_path)["value"]) == 3
    assert not list(tmp_path.glob(".*partial"))


def test_saving_the_same_step_twice_writes_once(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, Counter(3, 3))
    written = (first / "tensors.safetensors").stat().st_mtime_ns
    assert save_checkpoint(tmp_path, Counter(3, 3)) == first
    assert (first / "tensors.safetensors").stat().st_mtime_ns == written


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} has none; give the folder"):
        load_checkpoint(tmp_path, Counter())


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, Counter(3, 3))
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{folder.name}/{name} is damaged"):
        load_checkpoint(tmp_path, Counter())


def test_another_schema_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, Counter(3, 3))
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(content | {"schema": 99}))
    with pytest.raises(UserError, match="has schema 99, this version reads 2"):
        load_checkpoint(tmp_path, Counter())


def test_networks_of_another_size_are_refused(make_episode: EpisodeMaker, tmp_path: Path) -> None:
    log = MemoryEpisodeLog()
    save_checkpoint(tmp_path, make_learner(log, 16, seed=0))
    with pytest.raises(UserError, match=r"does not fit .*learner.sac.critic_widths.*use the settings"):
        load_checkpoint(tmp_path, make_learner(log, 16, seed=0, width=16))


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
            save_checkpoint(tmp_path, first)
        sink.append(episodes[30:40])
        cursor = read_checkpoint(tmp_path)["cursor"]
        with BackgroundReader(RedisEpisodeReader(connect(server.url), "run", replay, cursor)) as source:
            second = start(source, 60)
            load_checkpoint(tmp_path, second)
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
