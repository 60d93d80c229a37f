"""``mara train --resume`` after everything was killed, with real Ray, a real server and a tiny LLM."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mara.common.agent import load_agent

Start = Callable[..., Any]

pytestmark = pytest.mark.timeout(240)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_was_killed_goes_on_where_it_was(mara: Start, command: Start, tmp_path: Path) -> None:
    first = mara(
        "learner.num_episodes=1000000",
        "learner.checkpoint_period_s=0.2",
        "rollout.num_actors=1",
        "replay.durable=true",
        "replay.capacity_transitions=200000",
        "wandb.mode=disabled",
    )
    runs = tmp_path / "runs"
    first.wait_until(
        lambda: bool(list(runs.glob("*/checkpoints/step-0*-episode-0*[1-9][0-9]"))), "checkpoints"
    )
    (folder,) = (path for path in runs.iterdir() if not path.is_symlink())
    first.signal_group(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert first.left_running() == []
    saved = (folder / "checkpoints" / "latest").resolve().name
    wanted = int(saved.rpartition("-")[2]) + 40

    second = command("train", "--resume", str(folder), f"learner.num_episodes={wanted}")
    assert second.wait() == 0, second.text
    assert second.left_running() == []
    assert f"the run goes on from {saved}: " in second.text
    assert "of its episodes are in the replay log still" in second.text
    rows = rows_of(folder)
    places = [(row["learner/gradient_step"], row["episodes/total"]) for row in rows]
    assert places == sorted(places)  # nothing that was done again stands there twice
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)
    assert rows[-1]["episodes/total"] == wanted
    assert rows[-1]["replay/duplicates"] == rows[-1]["replay/malformed"] == 0
    # The ring was filled again: it has room for all that ever came.
    written = round(rows[-1]["replay/transitions"])
    state = json.loads((folder / "checkpoints" / "latest" / "state.json").read_text())["state"]
    assert state["mirror"]["total_transitions"] == written
    _, card = load_agent(folder / "agent", hidden_size=32)
    assert (card["training"]["episodes"], card["training"]["complete"]) == (wanted, True)
    assert {path.name for path in (folder / "logs").glob("actor-*.log")} == {
        "actor-0.log",
        "actor-0-start-2.log",
    }
