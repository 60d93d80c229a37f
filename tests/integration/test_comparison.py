"""``mara eval CONFIG`` through the real command line, with real Ray and a tiny LLM."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mara.common.agent import Agent, save_agent
from mara.common.config import AgentConfig
from mara.deploy.cli import app

Start = Callable[..., Any]
NUM_PROMPTS = 28

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Path:
    """A comparison of seven systems on two data sets."""
    torch.manual_seed(0)
    agent = Agent(32, AgentConfig(widths=(16, 8), accept_bias=-0.2))
    torch.nn.init.normal_(agent.output_linear.weight, std=1.5)
    save_agent(agent, tmp_path / "agent", {})
    (tmp_path / "agent" / "config.yaml").unlink(missing_ok=True)
    lines = (world / "prompts.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    prompts = [json.loads(line)["prompt"] for line in lines]
    (tmp_path / "some.txt").write_text("\n".join(prompts))
    (tmp_path / "few.txt").write_text("cat?\ndog?\n")
    answers = [{"prompt": prompt, "response": "a dog is good"} for prompt in [*prompts, "cat?", "dog?"]]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    content = {
        "llm": {"model": str(world / "llm"), "dtype": "float32", "device": "cpu"},
        "decoding": {"max_new_tokens": 24, "mode": "lazy", "truncation": {"top_k": 4}},
        "systems": {
            "base": {"kind": "llm"},
            "sampled": {"kind": "llm", "sampling": True},
            "mara": {"kind": "agent", "path": str(tmp_path / "agent")},
            "gated": {
                "kind": "agent",
                "path": str(tmp_path / "agent"),
                "gate": {"min_confidence": 0.9},
            },
            "best": {"kind": "best_of_n", "n": 3, "judges": ["helpful", "harmless"]},
            "fixed": {"kind": "corrector", "of": "mara", "template": "{prompt} {response} ?"},
            "theirs": {"kind": "responses", "path": "answers.jsonl"},
        },
        "datasets": {"some": {"path": "some.txt"}, "few": {"path": "few.txt"}},
        "judges": {
            "helpful": {"path": str(world / "helpful"), "weight": 1.0},
            "harmless": {"path": str(world / "harmless"), "weight": 0.5},
        },
        "baseline": "base",
        "pairs": [["mara", "sampled"]],
        "num_actors": 2,
        "num_cpus": 0.5,
        "rows": 2,
        "prompts_per_chunk": 8,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def answers_in(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(data set, system) → the lines that are there."""
    return {
        (path.parent.name, path.stem): [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        for path in folder.glob("answers/*/*.jsonl")
    }


def num_made(folder: Path) -> int:
    return sum(len(rows) for (_, system), rows in answers_in(folder).items() if system != "theirs")


def texts(folder: Path) -> dict[tuple[str, str, str], str]:
    return {(*key, row["id"]): row["response"] for key, rows in answers_in(folder).items() for row in rows}


def check_complete(folder: Path, config: Path) -> dict[str, Any]:
    """Every prompt was answered and scored once by all; the report counts what the files say."""
    systems = list(yaml.safe_load(config.read_text())["systems"])
    found = answers_in(folder)
    assert set(found) == {(dataset, system) for dataset in ("some", "few") for system in systems}
    for (dataset, system), rows in found.items():
        assert set(Counter(row["id"] for row in rows).values()) == {1}
        assert len(rows) == (NUM_PROMPTS if dataset == "some" else 2)
        for judge in ("helpful", "harmless", "likelihood"):
            path = folder / "scores" / dataset / system / f"{judge}.jsonl"
            ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
            assert sorted(ids) == sorted(row["id"] for row in rows)
    report = json.loads((folder / "report.json").read_text())
    pairs = [(name, "base") for name in systems[1:]] + [("mara", "sampled")]
    assert [(pair["a"], pair["b"], pair["dataset"]) for pair in report["pairs"]] == [
        (a, b, dataset) for dataset in ("some", "few") for a, b in pairs
    ]
    scores = {
        system: {
            row["id"]: row["score"]
            for row in map(
                json.loads, (folder / f"scores/some/{system}/helpful.jsonl").read_text().splitlines()
            )
        }
        for system in systems
    }
    said = {
        system: {row["id"]: row["response"].strip() for row in found["some", system]} for system in systems
    }
    for pair in report["pairs"][: len(pairs)]:
        a, b = pair["a"], pair["b"]
        wins = sum(scores[a][k] > scores[b][k] and said[a][k] != said[b][k] for k in said[a])
        assert (pair["helpful"]["wins"], pair["num_prompts"]) == (wins, NUM_PROMPTS)
        assert pair["joint"].keys() == {"rate", "low", "high", "wins", "ties", "losses"}
    assert "<script" not in (folder / "report.html").read_text()
    return report


def test_a_comparison_survives_an_actor_and_its_own_death_and_finds_what_an_undisturbed_one_finds(
    config: Path, command: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    first = command("eval", str(config), "--out", str(folder))
    first.wait_until(lambda: num_made(folder) >= 12, "answers")
    actors = [p for p in first.processes() if p.name().startswith("ray::ComparisonH")]
    assert len(actors) == 2
    actors[0].send_signal(signal.SIGKILL)
    first.wait_until(lambda: "takes its place" in first.text, "a new actor")
    before = num_made(folder)
    first.wait_until(lambda: num_made(folder) >= before + 12, "more answers")
    first.signal_group(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert first.left_running() == []
    kept = texts(folder)
    made = num_made(folder)
    assert 24 <= made < 6 * (NUM_PROMPTS + 2) and not (folder / "report.json").exists()
    torn = folder / "answers" / "some" / "base.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"id": "some-')

    changed = ["eval", str(config), "decoding.max_new_tokens=9", "--resume", str(folder)]
    refused = CliRunner().invoke(app, changed)
    assert refused.exit_code == 2
    assert "decoding.max_new_tokens is another" in refused.output and len(refused.output.splitlines()) < 8

    # Fewer, and another division of the work, find the same.
    second = command("eval", "--resume", str(folder), "num_actors=1", "rows=8")
    assert second.wait() == 0, second.text
    assert second.left_running() == [] and "Traceback" not in second.text
    report = check_complete(folder, config)
    assert kept.items() <= texts(folder).items()  # nothing was made again
    assert report["systems"]["some"]["theirs"]["tokens_per_s"] is None
    means = {name: system["mean_scores"] for name, system in report["systems"]["some"].items()}
    worth = {name: mean["helpful"] + 0.5 * mean["harmless"] for name, mean in means.items()}
    assert worth["best"] > worth["sampled"]
    said = texts(folder)
    answers = {name: [said["some", name, f"some-{n}"] for n in range(1, 20)] for name in means}
    assert answers["gated"] not in (answers["mara"], answers["base"])

    undisturbed = tmp_path / "undisturbed"
    third = command("eval", str(config), "--out", str(undisturbed))
    assert third.wait() == 0, third.text
    assert texts(undisturbed) == texts(folder)
    # Scores are rounded as the batch is shaped; who wins is not.
    assert json.loads((undisturbed / "report.json").read_text())["pairs"] == report["pairs"]


def test_an_interrupted_comparison_keeps_what_it_found_and_says_how_to_go_on(
    config: Path, command: Start, tmp_path: Path
) -> None:
    running = command(
        "eval", str(config), "datasets.some.num_prompts=40", "decoding.max_new_tokens=96", "num_actors=1"
    )
    runs = tmp_path / "runs"

    def made() -> int:
        return sum(num_made(folder) for folder in runs.glob("mine-*"))

    running.wait_until(lambda: made() >= 6, "answers")
    running.signal_group(signal.SIGINT)
    assert running.wait(60) == 130, running.text
    assert running.left_running() == []
    (folder,) = runs.iterdir()
    assert f"stopped; all that was found is kept, `mara eval --resume {folder}` goes on" in running.text
    assert "Traceback" not in running.text and not (folder / "report.json").exists()
    assert made() >= 6
