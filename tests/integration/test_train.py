"""``mara train`` through the real command line, with real Ray, a real server and a tiny LLM."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mara.buffer.connection import connect
from mara.buffer.keys import keys_of
from mara.buffer.server import EmbeddedServer
from mara.common.agent import load_agent
from mara.deploy.run_folder import load_run

Start = Callable[..., Any]
"""Starts ``mara train`` on the tiny world with overrides; see ``conftest.py``."""
FOR_EVER = "learner.num_episodes=1000000"
NO_WANDB = "wandb.mode=disabled"

pytestmark = pytest.mark.timeout(400)


def run_folder(text: str) -> Path:
    line = next(line for line in text.splitlines() if line.startswith("run folder: "))
    return Path(line.removeprefix("run folder: "))


def records(command: Any) -> list[dict[str, float]]:
    """What the run has recorded so far."""
    if "run folder: " not in command.text:
        return []
    path = run_folder(command.text) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_training(command: Any) -> bool:
    return any(record["learner/gradient_step"] >= 1 for record in records(command))


def addresses_beyond_loopback(processes: list[psutil.Process]) -> list[str]:
    """Where the processes accept connections from other machines."""
    own = {process.pid for process in processes}
    return [
        f"{connection.laddr.ip}:{connection.laddr.port}"
        for connection in psutil.net_connections("tcp")
        if connection.pid in own
        and connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    ]


def test_a_run_survives_the_death_of_an_actor_and_leaves_everything_it_promises(mara: Start) -> None:
    command = mara("learner.num_episodes=400", "learner.gradient_steps_per_episode=0.1")
    command.wait_until(lambda: is_training(command), "training")
    actors = [p for p in command.processes() if p.name().startswith("ray::RolloutHos")]
    assert len(actors) == 2
    assert addresses_beyond_loopback(command.processes()) == []
    actors[0].kill()

    assert command.wait() == 0, command.text
    assert command.left_running() == []
    folder = run_folder(command.text)
    assert "actor-0 died" in command.text or "actor-1 died" in command.text
    rows = records(command)
    assert rows[-1]["actors/restarted"] == 1
    assert rows[-1]["episodes/total"] == 400
    assert rows[-1]["rollout/episodes_total"] >= rows[-2]["rollout/episodes_total"]
    latest = {name: value for row in rows for name, value in row.items()}
    assert 0 <= latest["rollout/idle_ratio"] <= 1
    assert 0 <= latest["learner/idle_ratio"] <= 1
    assert 0 < latest["sac/entropy"] <= 0.694
    versions = [row["rollout/policy_version"] for row in rows if "rollout/policy_version" in row]
    assert max(versions) > max(versions[0], 0), "the actors never decided with what the learner learnt"
    assert {"policy/lag_max", "episode/reward", "episode/score/harmless", "rollout/tokens_per_s"} <= set(
        latest
    )
    agent, card = load_agent(folder / "agent", hidden_size=32)
    assert agent.config.widths == (16, 8)
    assert card["training"]["episodes"] == 400
    assert (folder / "checkpoints" / "latest" / "tensors.safetensors").is_file()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert load_run(folder).learner.num_episodes == 400
    assert (folder.parent / "latest").resolve() == folder
    for plot in ("reward.png", "accepted_positions.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    for place in ("agent", "metrics.jsonl", "reward.png"):
        assert str(folder / place) in command.text


@pytest.mark.parametrize("durable", [True, False])
def test_a_run_survives_the_death_of_its_server(mara: Start, durable: bool) -> None:
    steps = "learner.gradient_steps_per_episode=0.1"
    command = mara("learner.num_episodes=400", steps, NO_WANDB, f"replay.durable={durable}")
    command.wait_until(lambda: is_training(command), "training")
    (server,) = [p for p in command.processes() if "valkey" in p.name() or "redis" in p.name()]
    server.kill()

    assert command.wait() == 0, command.text
    assert command.left_running() == []
    told = "its data are kept" if durable else "episodes that were unread are lost"
    assert f"the server for episodes and weights died and was started again; {told}" in command.text
    rows = records(command)
    assert rows[-1]["episodes/total"] == 400
    assert rows[-1]["actors/restarted"] == rows[-1]["replay/malformed"] == rows[-1]["replay/dropped"] == 0
    assert (run_folder(command.text) / "replay" / "appendonlydir").is_dir() == durable


def test_a_run_spreads_its_log_over_two_servers_and_learns_from_both(mara: Start) -> None:
    with EmbeddedServer(1 << 29) as one, EmbeddedServer(1 << 29) as other:
        urls = f"replay.redis_url=[{one.url},{other.url}]"
        command = mara("learner.num_episodes=120", NO_WANDB, urls)
        assert command.wait() == 0, command.text
        written = [connect(server.url) for server in (one, other)]
        (weights,) = written[0].keys("mara:*:weights")
        run_id = weights.decode().split(":")[1]
        counts = [int(c.hget(keys_of(run_id, shard).counts, "appended")) for shard, c in enumerate(written)]
        assert written[1].keys("mara:*:weights") == []
    assert min(counts) > 0 and sum(counts) >= 120
    rows = records(command)
    assert rows[-1]["episodes/total"] == 120
    assert rows[-1]["weights/refused"] == rows[-1]["replay/dropped"] == rows[-1]["replay/malformed"] == 0
    assert load_run(run_folder(command.text)).replay.num_shards == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_the_agent_and_ends_everything(
    mara: Start, number: signal.Signals
) -> None:
    command = mara(FOR_EVER, NO_WANDB, "rollout.num_actors=1", "learner.sac.critic_only_steps=1000000")
    command.wait_until(lambda: is_training(command), "training")
    command.signal_group(number)

    assert command.wait() == 0, command.text
    assert command.left_running() == []
    folder = run_folder(command.text)
    _, card = load_agent(folder / "agent", hidden_size=32)
    assert card["training"]["gradient_steps"] >= 1
    assert records(command)[-1]["learner/gradient_step"] == card["training"]["gradient_steps"]
    assert card["training"]["policy_steps"] == 0
    assert "mara: warning: the saved agent is untrained: in the first 1000000 gradient steps" in command.text
    assert (folder.parent / "latest").resolve() == folder
    assert "Traceback" not in command.text


def test_a_signal_while_ray_starts_ends_the_run_without_waiting_for_it(mara: Start) -> None:
    command = mara(FOR_EVER, NO_WANDB)
    command.wait_until(lambda: "starting Ray" in command.text, "starting Ray")
    command.signal_group(signal.SIGINT)

    assert command.wait() == 0, command.text
    assert command.left_running() == []
    assert command.text.splitlines()[-1] == "stopped before training began; there is no agent to save"
    assert not (run_folder(command.text).parent / "latest").exists()
    assert "joining the Ray cluster" not in command.text


def test_a_run_whose_learner_dies_ends_with_a_message_and_nothing_running(mara: Start) -> None:
    command = mara(FOR_EVER, NO_WANDB, "rollout.num_actors=1")
    command.wait_until(lambda: is_training(command), "training")
    (learner,) = [p for p in command.processes() if p.name().startswith("ray::LearnerHos")]
    learner.kill()

    assert command.wait() == 1, command.text
    assert command.left_running() == []
    # Ray has something to say about it as well, at a time of its own.
    (error,) = [line for line in command.text.splitlines() if line.startswith("mara: error: ")]
    assert error.startswith("mara: error: learner died")
    assert "logs/learner.log" in error
    assert "Traceback" not in command.text
