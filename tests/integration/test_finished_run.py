"""``mara train`` on the episodes of a finished run, with real Ray, a real server and a tiny LLM."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mara.buffer.server import EmbeddedServer
from mara.common.agent import load_agent

Start = Callable[..., Any]
OTHER_SETTINGS = (
    "rollout.num_actors=0",
    "learner.num_episodes=1000000",
    "rewards.harmless.weight=-2.0",
    "learner.gradient_steps_per_episode=1",
    "shaping.terminal=spread",
    "wandb.mode=disabled",
)

pytestmark = pytest.mark.timeout(600)


def run_folder(command: Any) -> Path:
    line = next(line for line in command.text.splitlines() if line.startswith("run folder: "))
    return Path(line.removeprefix("run folder: "))


def trained(command: Any) -> Path:
    """The run's folder, once it has ended well and left nothing running."""
    assert command.wait() == 0, command.text
    assert command.left_running() == []
    return run_folder(command)


def weights_of(folder: Path) -> str:
    """SHA-256 of the saved agent."""
    return hashlib.sha256((folder / "agent" / "agent.safetensors").read_bytes()).hexdigest()


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_episodes_of_a_finished_run_train_the_same_other_agent_every_time(
    mara: Start, tmp_path: Path
) -> None:
    """Once from the server that has them, once from the files of a server that is gone."""
    store = tmp_path / "store"
    with EmbeddedServer(512 << 20, store) as server:
        address = f"replay.redis_url={server.url}"
        first = trained(mara(address, "wandb.mode=disabled"))
        record = (first / "replay.json").read_text()
        assert json.loads(record)["hidden_size"] == 32
        assert "***" in record and server.url not in record

        again = trained(mara(f"replay.from={first}", address, *OTHER_SETTINGS))
    assert weights_of(again) != weights_of(first)
    _, card = load_agent(again / "agent", hidden_size=32)
    last = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["episodes/total"] == card["training"]["episodes"] >= 60
    assert last["learner/steps_dropped"] == 0
    assert last["replay/held_back_ratio"] > 0

    # As a run with a durable server of its own leaves it.
    shutil.copytree(store, first / "replay")
    before = content_of(first)
    from_files = mara(f"replay.from={first}", *OTHER_SETTINGS)
    assert weights_of(trained(from_files)) == weights_of(again)
    assert content_of(first) == before
    assert not list(run_folder(from_files).glob(".*"))
