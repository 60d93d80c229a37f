"""The process of a comparison, run in a thread: which LLM answers for a system."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mara.actors.answering import Question
from mara.actors.reward_models.http import HttpRefused
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.comparison.host import ComparisonHost, HostSpec, Model, Work
from mara.deploy.comparison.judges import Judges
from mara.deploy.config import RunConfig
from mara.deploy.config_file import load_comparison

PROMPTS = ("why", "how so", "what")


@pytest.fixture
def path(tmp_path: Path, tiny_run: tuple[Path, RunConfig]) -> Path:
    run, config = tiny_run
    content = {
        "llm": {"model": config.llm.model, "dtype": "float32", "device": "cpu"},
        "decoding": {"max_new_tokens": 8, "truncation": {"top_k": 4}},
        "systems": {"base": {"kind": "llm"}, "mara": {"kind": "agent", "path": str(run)}},
        "datasets": {"held_out": {"path": "held_out.jsonl"}},
        "baseline": "base",
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def handed_in(config: ComparisonConfig, system: str) -> list[dict[str, Any]]:
    """What a process of the comparison hands in for ``system`` and :data:`PROMPTS`."""
    host = ComparisonHost(HostSpec("actor-0", config, Path("nowhere"), Path.cwd()))
    questions = tuple(Question(system, prompt, prompt) for prompt in PROMPTS)
    host.give(Work(0, Model(*config.llm_of(system)), "held_out", questions))
    thread = threading.Thread(target=host.run)
    thread.start()
    rows: list[dict[str, Any]] = []
    while thread.is_alive() and not (rows and rows[-1].get("is_done")):
        rows += host.report().rows
        thread.join(0.01)
    host.stop()
    thread.join()
    return rows[:-1]


def answers(config: ComparisonConfig, system: str) -> list[str]:
    said = {row["row"]["id"]: row["row"]["response"] for row in handed_in(config, system)}
    return [said[prompt] for prompt in PROMPTS]


def test_an_agent_steers_the_llm_that_its_system_names(
    path: Path, make_llm_folder: Callable[..., Path]
) -> None:
    other = make_llm_folder(seed=1)
    elsewhere = ["kind=agent", f"path={path.parent / 'run'}", f"model={other}"]
    both = load_comparison(path, [f"systems.elsewhere.{setting}" for setting in elsewhere])
    alone = load_comparison(path, [f"llm.model={other}"])
    assert answers(both, "elsewhere") == answers(alone, "mara")
    assert answers(both, "mara") not in (answers(both, "elsewhere"), answers(both, "base"))


def test_an_agent_steers_as_its_system_says(path: Path) -> None:
    settings = ["kind=agent", f"path={path.parent / 'run'}", "steering=value", "min_advantage=0"]
    config = load_comparison(path, [f"systems.by_value.{setting}" for setting in settings])
    never = load_comparison(path, ["systems.mara.steering=value", "systems.mara.min_advantage=1e6"])
    assert answers(config, "by_value") not in (answers(config, "mara"), answers(config, "base"))
    assert answers(never, "mara") == answers(config, "base")


def test_an_answer_of_several_that_were_all_refused_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky:
        def score(self, conversations):
            if any(one.prompt == "why" for one in conversations):
                raise HttpRefused("too long")
            return torch.ones(len(conversations))

    monkeypatch.setattr(Judges, "_open", lambda judges, name: Picky())
    settings = [f"judges.picky.{setting}" for setting in ("path=helpful", "weight=1")]
    settings += [f"systems.best.{setting}" for setting in ("kind=best_of_n", "n=2", "judges=[picky]")]
    settings += [f"systems.one.{setting}" for setting in ("kind=best_of_n", "n=1", "judges=[picky]")]
    config = load_comparison(path, settings)
    rows = {row["row"]["id"]: row for row in handed_in(config, "best")}
    assert rows["why"]["refused"] == "judges.picky: too long" and "score" not in rows["why"]["row"]
    assert rows["what"]["row"]["score"] == 1.0 and "refused" not in rows["what"]
    # Of one answer nothing is chosen, so nothing was refused.
    assert not any("refused" in row for row in handed_in(config, "one"))
