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

from mara.buffer.server import EmbeddedServer
from mara.common.agent import load_agent
from mara.common.critic import load_critic
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

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


def ended_well(command: Any, within_s: float = 180) -> Path:
    """The run's folder, once it has ended well and left nothing running."""
    assert command.wait(within_s) == 0, command.text
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


def test_a_run_that_was_killed_goes_on_survives_two_deaths_more_and_leaves_everything_it_promises(
    mara: Start, command: Start, tmp_path: Path
) -> None:
    first = mara(
        FOR_EVER,
        NO_WANDB,
        "learner.gradient_steps_per_episode=0.1",
        "learner.checkpoint_period_s=0.2",
        "replay.durable=true",
        "replay.capacity_transitions=200000",
    )
    runs = tmp_path / "runs"
    checkpoints = "*/checkpoints/step-0*-episode-0*[1-9][0-9]"
    first.wait_until(lambda: bool(list(runs.glob(checkpoints))), "checkpoints")
    # One actor is enough for a checkpoint; the other may still be starting.
    first.wait_until(lambda: bool(list(runs.glob("*/logs/actor-1.log"))), "the second actor")
    first.wait_until(lambda: bool(list(runs.glob("*/logs/actor-0.log"))), "the first actor")
    (folder,) = (path for path in runs.iterdir() if not path.is_symlink())
    first.signal_group(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert first.left_running() == []
    saved = (folder / "checkpoints" / "latest").resolve().name
    num_saved = int(saved.rpartition("-")[2])
    wanted = num_saved + 1200

    second = command(
        "train",
        *("--resume", str(folder), f"learner.num_episodes={wanted}", "wandb.mode=offline"),
        "learner.log_period_s=0.5",  # it is over in seconds on a quick machine
    )
    second.wait_until(lambda: episodes_of(second) > num_saved + 20, "more episodes")
    assert second.records()[-1]["replay/duplicates"] == 0
    actors = [p for p in second.processes() if p.name().startswith("ray::RolloutHos")]
    assert len(actors) == 2
    assert addresses_beyond_loopback(second.processes()) == []
    actors[0].kill()
    server_of(second).kill()

    assert ended_well(second, within_s=300) == folder
    assert f"the run goes on from {saved}: " in second.text
    assert "of its episodes are in the replay log still" in second.text
    assert "actor-0-start-2 died" in second.text or "actor-1-start-2 died" in second.text
    assert "the server for episodes and weights died and was started again; its data are kept" in second.text
    check_metrics(second.records(), wanted)
    check_that_nothing_is_there_twice(folder, second.records())
    check_what_is_saved(folder, second.text, wanted)
    assert (folder / "replay" / "appendonlydir").is_dir()
    check_that_its_episodes_train_the_same_other_agent_every_time(folder, wanted, mara, tmp_path)


def episodes_of(command: Any) -> float:
    """That the learner has read."""
    return max((record["episodes/total"] for record in command.records()), default=0)


def check_that_nothing_is_there_twice(folder: Path, rows: list[dict[str, float]]) -> None:
    """Of what a resumed run did again; and its ring, which was filled again, has all that ever came."""
    places = [(row["learner/gradient_step"], row["episodes/total"]) for row in rows]
    assert places == sorted(places)
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)
    state = json.loads((folder / "checkpoints" / "latest" / "state.json").read_text())["state"]
    assert state["mirror"]["total_transitions"] == round(rows[-1]["replay/transitions"])
    begun = {f"actor-{number}{start}.log" for number in (0, 1) for start in ("", "-start-2")}
    logs = {path.name for path in (folder / "logs").glob("actor-*.log")}
    assert begun <= logs
    assert logs - begun in ({"actor-0-start-2-1.log"}, {"actor-1-start-2-1.log"})


def check_metrics(rows: list[dict[str, float]], wanted: int) -> None:
    assert rows[-1]["actors/restarted"] == 1
    assert rows[-1]["replay/malformed"] == rows[-1]["replay/dropped"] == 0
    assert rows[-1]["episodes/total"] == wanted
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


def check_what_is_saved(folder: Path, output: str, wanted: int) -> None:
    agent, card = load_agent(folder / "agent", hidden_size=32)
    assert agent.config.widths == (16, 8)
    load_critic(folder / "agent", hidden_size=32)
    assert (card["training"]["episodes"], card["training"]["complete"]) == (wanted, True)
    assert (folder / "checkpoints" / "latest" / "tensors.safetensors").is_file()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert load_run(folder).learner.num_episodes == wanted
    assert (folder.parent / "latest").resolve() == folder
    for plot in ("reward.png", "accepted_positions.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    for place in ("agent", "metrics.jsonl", "reward.png"):
        assert str(folder / place) in output


def check_that_its_episodes_train_the_same_other_agent_every_time(
    first: Path, num_episodes: int, mara: Start, tmp_path: Path
) -> None:
    """Once from a server that has them, once from the files that its own server has left."""
    store = tmp_path / "store"
    (first / "replay").rename(store)
    with EmbeddedServer(512 << 20, store) as server:
        command = mara(f"replay.from={first}", f"replay.redis_url={server.url}", *ON_ITS_EPISODES)
        again = ended_well(command)
    assert f"(which was {first.name} until now)" in command.text
    assert weights_of(again) != weights_of(first)
    _, card = load_agent(again / "agent", hidden_size=32)
    last = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["episodes/total"] == card["training"]["episodes"] >= num_episodes
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


def test_a_signal_while_ray_starts_ends_the_run_without_waiting_for_it(mara: Start) -> None:
    command = mara(FOR_EVER, NO_WANDB)
    command.wait_until(lambda: "starting Ray" in command.text, "starting Ray")
    command.signal_group(signal.SIGINT)

    assert command.wait() == 130, command.text
    assert command.left_running() == []
    assert command.text.splitlines()[-1] == "stopped before training began; there is no agent to save"
    assert not (command.run_folder.parent / "latest").exists()
    assert "joining the Ray cluster" not in command.text


def test_a_run_survives_the_death_of_a_server_that_keeps_nothing_and_ends_with_a_message_if_its_learner_dies(
    mara: Start,
) -> None:
    command = mara(FOR_EVER, NO_WANDB, "rollout.num_actors=1")
    command.wait_until(lambda: is_training(command), "training")
    server_of(command).kill()
    lost = (
        "the server for episodes and weights died and was started again; episodes that were unread are lost"
    )
    command.wait_until(lambda: lost in command.text, "a new server")
    before = episodes_of(command)
    command.wait_until(lambda: episodes_of(command) > before + 20, "more episodes")
    last = command.records()[-1]
    assert last["actors/restarted"] == last["replay/malformed"] == last["replay/dropped"] == 0
    (learner,) = [p for p in command.processes() if p.name().startswith("ray::LearnerHos")]
    learner.kill()

    assert command.wait() == 1, command.text
    assert command.left_running() == []
    # Ray has something to say about it as well, at a time of its own.
    (error,) = [line for line in command.text.splitlines() if line.startswith("mara: error: ")]
    assert error.startswith("mara: error: learner died")
    assert "logs/learner.log" in error
    assert "Traceback" not in command.text
    assert not (command.run_folder / "replay").exists()
