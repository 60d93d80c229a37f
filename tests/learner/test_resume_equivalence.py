"""A learner that is killed and goes on is the learner that was not: the same parameters, bit for bit."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mara.buffer.background import BackgroundReader
from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.memory import MemoryWeightChannel
from mara.buffer.server import EmbeddedServer
from mara.buffer.shards import open_reader
from mara.common.agent import load_agent
from mara.common.config import AgentConfig
from mara.common.episode import Episode
from mara.learner.checkpoint import find_checkpoint, load_checkpoint, read_checkpoint
from mara.learner.config import LearnerConfig, SACConfig
from mara.learner.loop import Learner

D = 12
NUM_EPISODES = 80
STEPS_PER_EPISODE = 5
NUM_KILLS = 3
# As many as the ring holds at once are far fewer than the log has, and scores depend on what came before.
REPLAY = ReplayConfig(capacity_transitions=150, sampling="prioritised")
SHAPING = ShapingConfig(score_weights={"good": 1.0}, normalise="running", baseline="prompt")


def train(url: str, folder: Path, checkpoint_period_s: float, reached: Any, first: Any) -> None:
    """Go on from the last checkpoint in ``folder`` to the end; ``reached`` is the step it is at, ``first``
    the one it began with."""
    torch.set_num_threads(1)
    config = LearnerConfig(
        sac=SACConfig(critic_widths=(32, 16), target_update_period=3),
        batch_size=32,
        num_episodes=NUM_EPISODES,
        gradient_steps_per_episode=STEPS_PER_EPISODE,
        start_batches=2,
        checkpoint_period_s=checkpoint_period_s,
        device="cpu",
    )
    checkpoint = find_checkpoint(folder / "checkpoints", print)
    cursor = "" if checkpoint is None else read_checkpoint(checkpoint)["cursor"]
    reader = open_reader([connect(url)], "run", REPLAY, cursor)
    with BackgroundReader(reader, log_is_finished=True) as source:
        learner = Learner(
            config,
            AgentConfig(widths=(16, 8)),
            REPLAY,
            SHAPING,
            hidden_size=D,
            source=source,
            weights=MemoryWeightChannel(),
            log_is_finished=True,
            run_folder=folder,
        )
        if checkpoint is not None:
            load_checkpoint(checkpoint, learner)
        update = learner.sac.update

        def counted(batch: Any, *rest: Any) -> Any:
            metrics = update(batch, *rest)
            reached.value = learner.gradient_step
            first.value = first.value or learner.gradient_step
            return metrics

        learner.sac.update = counted  # type: ignore[method-assign]
        learner.run()


@pytest.fixture
def url(make_episode: Callable[..., Episode]) -> Iterator[str]:
    """A server with a finished log."""
    episodes = [
        make_episode([n % 2, 0, 1, 1], scores={"good": float(n * n % 7)}, prompt_id=f"prompt/{n % 5}")
        for n in range(NUM_EPISODES)
    ]
    with EmbeddedServer(max_bytes=64 << 20) as server:
        RedisEpisodeLog(connect(server.url), "run", REPLAY).append(episodes)
        yield server.url


def test_a_learner_killed_again_and_again_ends_with_the_parameters_of_one_that_was_not(
    url: str, same_state: Callable[[Any, Any], bool], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    processes = multiprocessing.get_context("forkserver")  # imports torch once for all of them
    processes.set_forkserver_preload(["mara.learner.loop", "mara.buffer.shards"])
    reached, first = processes.Value("q", 0), processes.Value("q", 0)

    def start(folder: Path, checkpoint_period_s: float) -> Any:
        reached.value = first.value = 0
        arguments = (url, folder, checkpoint_period_s, reached, first)
        process = processes.Process(target=train, args=arguments)
        process.start()
        return process

    uninterrupted = start(whole, 3600)
    uninterrupted.join(60)
    assert uninterrupted.exitcode == 0
    last_step = reached.value

    chance = random.Random()
    kills = sorted(chance.sample(range(20, last_step - 20), NUM_KILLS))
    died_at = []
    for step in kills:
        process = start(killed, 0.02)  # so often that many a kill comes while it saves
        while reached.value < step and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join(20)
        died_at.append(reached.value)
        assert process.exitcode == -9, f"it ended by itself before step {step}"
    last = find_checkpoint(killed / "checkpoints", pytest.fail)
    assert last is not None
    goes_on_after = read_checkpoint(last)["sac"]["step"]
    process = start(killed, 0.02)
    process.join(60)
    assert process.exitcode == 0
    assert first.value == goes_on_after + 1 > 1

    saved = []
    for folder in (whole, killed):
        checkpoint = find_checkpoint(folder / "checkpoints", pytest.fail)
        assert checkpoint is not None
        saved.append(read_checkpoint(checkpoint))
    assert saved[0]["sac"]["step"] == last_step
    assert same_state(*saved), f"killed at steps {died_at} (wanted {kills})"
    agents = [load_agent(folder / "agent")[0].state_dict() for folder in (whole, killed)]
    assert same_state(*agents)
