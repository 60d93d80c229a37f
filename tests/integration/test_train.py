"""``mara train`` through the real command line, with real Ray, a real server and a tiny LLM."""

from __future__ import annotations

import hashlib
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
ON_ITS_EPISODES = (
    "rollout.num_actors=0",
    "learner.num_episodes=1000000",
    "rewards.harmless.weight=-2.0",
    "learner.gradient_steps_per_episode=1",
    "shaping.terminal=spread",
    NO_WANDB,
)
"""Another agent from the episodes of a finished run."""

pytestmark = pytest.mark.timeout(400)


def ended_well(command: Any) -> Path:
    """The run's folder, once it has ended well and left nothing running."""
    assert command.wait() == 0, command.text
    assert command.left_running() == []
    assert "Traceback" not in command.text
    return command.run_folder


def is_training(command: Any) -> bool:
    return any(record["learner/gradient_step"] >= 1 for record in command.records())


def server_of(command: Any) -> psutil.Process:
    (server,) = [p for p in command.processes() if "valkey" in p.name() or "redis" in p.name()]
    return server


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


def test_a_run_survives_the_deaths_of_an_actor_and_its_server_and_leaves_everything_it_promises(
    mara: Start, tmp_path: Path
) -> None:
    command = mara(
        "learner.num_episodes=1200",
        "learner.gradient_steps_per_episode=0.1",
        "learner.log_period_s=0.5",  # it is over in seconds on a quick machine
        "replay.durable=true",
    )
    command.wait_until(lambda: is_training(command), "training")
    actors = [p for p in command.processes() if p.name().startswith("ray::RolloutHos")]
    assert len(actors) == 2
    assert addresses_beyond_loopback(command.processes()) == []
    actors[0].kill()
    server_of(command).kill()

    folder = ended_well(command)
    assert "actor-0 died" in command.text or "actor-1 died" in command.text
    assert "the server for episodes and weights died and was started again; its data are kept" in command.text
    check_metrics(command.records())
    check_what_is_saved(folder, command.text)
    assert (folder / "replay" / "appendonlydir").is_dir()
    check_that_its_episodes_train_the_same_other_agent_every_time(folder, mara, tmp_path)


def check_metrics(rows: list[dict[str, float]]) -> None:
    assert rows[-1]["actors/restarted"] == 1
    assert rows[-1]["replay/malformed"] == rows[-1]["replay/dropped"] == 0
    assert rows[-1]["episodes/total"] == 1200
    assert rows[-1]["rollout/episodes_total"] >= rows[-2]["rollout/episodes_total"]
    latest = {name: value for row in rows for name, value in row.items()}
    assert 0 <= latest["rollout/idle_ratio"] <= 1
    assert 0 <= latest["learner/idle_ratio"] <= 1
    assert 0 < latest["sac/entropy"] <= 0.694
    versions = [row["rollout/policy_version"] for row in rows if "rollout/policy_version" in row]
    assert max(versions) > max(versions[0], 0), "the actors never decided with what the learner learnt"
    assert {"policy/lag_max", "episode/reward", "episode/score/harmless", "rollout/tokens_total"} <= set(
        latest
    )


def check_what_is_saved(folder: Path, output: str) -> None:
    agent, card = load_agent(folder / "agent", hidden_size=32)
    assert agent.config.widths == (16, 8)
    assert card["training"]["episodes"] == 1200
    assert (folder / "checkpoints" / "latest" / "tensors.safetensors").is_file()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert load_run(folder).learner.num_episodes == 1200
    assert (folder.parent / "latest").resolve() == folder
    for plot in ("reward.png", "accepted_positions.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    for place in ("agent", "metrics.jsonl", "reward.png"):
        assert str(folder / place) in output


def check_that_its_episodes_train_the_same_other_agent_every_time(
    first: Path, mara: Start, tmp_path: Path
) -> None:
    """Once from a server that has them, once from the files that its own server has left."""
    store = tmp_path / "store"
    (first / "replay").rename(store)
    with EmbeddedServer(512 << 20, store) as server:
        again = ended_well(mara(f"replay.from={first}", f"replay.redis_url={server.url}", *ON_ITS_EPISODES))
    assert weights_of(again) != weights_of(first)
    _, card = load_agent(again / "agent", hidden_size=32)
    last = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["episodes/total"] == card["training"]["episodes"] >= 1200
    assert last["learner/steps_dropped"] == 0
    assert last["replay/held_back_ratio"] > 0

    store.rename(first / "replay")
    before = content_of(first)
    from_files = ended_well(mara(f"replay.from={first}", *ON_ITS_EPISODES))
    assert weights_of(from_files) == weights_of(again)
    assert content_of(first) == before
    assert not list(from_files.glob(".*"))


def weights_of(folder: Path) -> str:
    """SHA-256 of the saved agent."""
    return hashlib.sha256((folder / "agent" / "agent.safetensors").read_bytes()).hexdigest()


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_survives_the_death_of_a_server_that_keeps_nothing_and_saves_its_agent_at_sigterm(
    mara: Start,
) -> None:
    command = mara(FOR_EVER, NO_WANDB, "rollout.num_actors=1", "learner.sac.critic_only_steps=1000000")
    command.wait_until(lambda: is_training(command), "training")
    server_of(command).kill()
    lost = (
        "the server for episodes and weights died and was started again; episodes that were unread are lost"
    )
    command.wait_until(lambda: lost in command.text, "a new server")
    episodes = command.records()[-1]["episodes/total"]
    command.wait_until(lambda: command.records()[-1]["episodes/total"] > episodes + 20, "more episodes")
    command.signal_group(signal.SIGTERM)

    check_what_a_signal_leaves(command)
    last = command.records()[-1]
    assert last["actors/restarted"] == last["replay/malformed"] == last["replay/dropped"] == 0
    assert not (command.run_folder / "replay").exists()
    assert "mara: warning: the saved agent is untrained: in the first 1000000 gradient steps" in command.text


def check_what_a_signal_leaves(command: Any) -> None:
    folder = ended_well(command)
    _, card = load_agent(folder / "agent", hidden_size=32)
    assert card["training"]["gradient_steps"] >= 1
    assert command.records()[-1]["learner/gradient_step"] == card["training"]["gradient_steps"]
    latest = folder.parent / "latest"
    assert latest.exists() == (card["training"]["policy_steps"] > 0)
    assert not latest.exists() or latest.resolve() == folder
    assert f"`mara train --resume {folder}` goes on with the training" in command.text.splitlines()[-1]
    assert not list(folder.rglob("running.lock"))


def test_a_run_spreads_its_log_over_two_servers_and_saves_its_agent_at_ctrl_c(mara: Start) -> None:
    with EmbeddedServer(1 << 29) as one, EmbeddedServer(1 << 29) as other:
        command = mara(FOR_EVER, NO_WANDB, f"replay.redis_url=[{one.url},{other.url}]")
        command.wait_until(lambda: is_training(command), "training")
        written = [connect(server.url) for server in (one, other)]
        (weights,) = written[0].keys("mara:*:weights")
        run_id = weights.decode().split(":")[1]

        def counts() -> list[int]:
            found = [
                client.hget(keys_of(run_id, shard).counts, "appended") for shard, client in enumerate(written)
            ]
            return [int(count or 0) for count in found]

        command.wait_until(lambda: min(counts()) > 0, "episodes on both servers")
        command.wait_until(lambda: command.records()[-1]["episodes/total"] >= 100, "100 episodes")
        command.signal_group(signal.SIGINT)
        check_what_a_signal_leaves(command)
        assert written[1].keys("mara:*:weights") == []
        record = (command.run_folder / "replay.json").read_text()
        assert record.count("***") == 2 and one.url not in record and other.url not in record
    last = command.records()[-1]
    assert last["weights/refused"] == last["replay/dropped"] == last["replay/malformed"] == 0
    assert load_run(command.run_folder).replay.num_shards == 2


def test_a_signal_while_ray_starts_ends_the_run_without_waiting_for_it(mara: Start) -> None:
    command = mara(FOR_EVER, NO_WANDB)
    command.wait_until(lambda: "starting Ray" in command.text, "starting Ray")
    command.signal_group(signal.SIGINT)

    assert command.wait() == 0, command.text
    assert command.left_running() == []
    assert command.text.splitlines()[-1] == "stopped before training began; there is no agent to save"
    assert not (command.run_folder.parent / "latest").exists()
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
