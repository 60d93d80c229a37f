"""A comparison whose answers and scores are there: what is left are verdicts and the report, without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mara.deploy.cli import app
from mara.deploy.comparison.checks import check
from mara.deploy.comparison.config import RECORD
from mara.deploy.comparison.host import Work
from mara.deploy.comparison.results import Results
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_comparison, load_comparison
from mara.deploy.run_folder import LOGS, write_settings
from mara.deploy.run_lock import hold_run

SAYS = {"base": "plain", "mara": "guided"}


MORE = [f"more {number}" for number in range(12)]


@pytest.fixture
def folder(tmp_path: Path, tiny_run: tuple[Path, RunConfig], endpoint: Any) -> Path:
    """Answered and scored; nobody has judged."""
    return begun(tmp_path, tiny_run, endpoint)


@pytest.fixture
def larger(tmp_path: Path, tiny_run: tuple[Path, RunConfig], endpoint: Any) -> Path:
    """The same with sixteen prompts, and a system that has not answered."""
    with (tmp_path / "held_out.jsonl").open("a") as file:
        file.writelines("\n" + json.dumps({"prompt": prompt}) for prompt in MORE)
    return begun(tmp_path, tiny_run, endpoint, {"best": {"kind": "best_of_n", "n": 2, "judges": ["helpful"]}})


def begun(
    tmp_path: Path, tiny_run: tuple[Path, RunConfig], endpoint: Any, systems: dict[str, Any] | None = None
) -> Path:
    run, config = tiny_run
    content = {
        "llm": {"model": config.llm.model, "dtype": "float32", "device": "cpu"},
        "decoding": {"max_new_tokens": 4},
        "systems": {"base": {"kind": "llm"}, "mara": {"kind": "agent", "path": str(run)}, **(systems or {})},
        "datasets": {"held_out": {"path": "held_out.jsonl"}},
        "judges": {
            "helpful": {"path": "helpful", "weight": 1.0},
            "big": {
                "kind": "llm_judge",
                "url": endpoint.url,
                "model": "big",
                "concurrency": 2,
                "max_attempts": 1,
            },
        },
        "baseline": "base",
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    comparison = load_comparison(tmp_path / "mine.yaml")
    checked = check(comparison)
    folder = tmp_path / "out"
    (folder / LOGS).mkdir(parents=True)
    write_settings(folder, dump_comparison(comparison))
    (folder / RECORD).write_text(json.dumps(checked.identity))
    with Results(folder) as results:
        results.keep_prompts("held_out", checked.prompts["held_out"])
        for system, text in SAYS.items():
            for number, prompt in enumerate(checked.prompts["held_out"]):
                said = "same" if number == 3 else f"{text} {number}"
                row = {"id": prompt.id, "prompt": prompt.prompt, "response": said, "tokens": 2}
                row |= {"seconds": 1.0, "finish_reason": "eos"}
                results.add_answer("held_out", system, row)
                score = {"id": prompt.id, "score": float(system == "mara")}
                results.add_score("held_out", system, "helpful", score)
                likelihood = {"id": prompt.id, "num_tokens": 2, "logprob": -1.0, "logprob_elsewhere": -2.0}
                results.add_score("held_out", system, "likelihood", likelihood)
    return folder


def mara(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


def test_a_judge_is_asked_about_answers_that_differ_and_never_twice(folder: Path, endpoint: Any) -> None:
    def prefers_guided(question: str) -> tuple[int, str]:
        if "how so" in question:
            return 503, "busy"
        return 200, "[[A]]" if question.index("guided") < question.index("plain") else "[[B]]"

    endpoint.answer = prefers_guided
    output = mara("eval", "--resume", folder, status=1)
    assert "judges.big: " in output and "no verdict in 1 attempts (status 503)" in output
    assert f"`mara eval --resume {folder}` goes on" in output and not (folder / "report.json").exists()
    kept = (folder / "scores/held_out/mara/big.jsonl").read_text()

    endpoint.answer = lambda question: (200, "[[A]]")
    output = mara("eval", "--resume", folder)
    rows = [json.loads(line) for line in (folder / "scores/held_out/mara/big.jsonl").read_text().splitlines()]
    assert (folder / "scores/held_out/mara/big.jsonl").read_text().startswith(kept)
    assert len(rows) == len({row["id"] for row in rows}) == 4
    same = next(row for row in rows if row["texts"] == ["", ""])
    assert (same["difference"], same["verdicts"], same["against"]) == (0, ["tie", "tie"], "base")
    assert "same" not in "".join(request["messages"][0]["content"] for request in endpoint.requests)
    report = json.loads((folder / "report.json").read_text())
    (pair,), (verdicts,) = report["pairs"], report["verdicts"]
    wins = sum(row["difference"] == 1 for row in rows)
    assert (pair["big"]["wins"], pair["big"]["ties"], pair["big"]["losses"]) == (wins, 4 - wins, 0)
    assert verdicts["num_disagreeing"] == 3 - wins
    assert pair["joint"] == pair["helpful"] and pair["helpful"]["wins"] == 3
    assert "starting Ray" not in output and str(folder / "report.html") in output

    asked = len(endpoint.requests)
    for name in ("report.json", "report.md", "report.html"):
        shutil.move(folder / name, folder / f"before-{name}")
    mara("eval", "--resume", folder, "num_samples=6")
    assert len(endpoint.requests) == asked
    for name in ("report.json", "report.md", "report.html"):
        assert (folder / name).read_text() == (folder / f"before-{name}").read_text()


def test_a_question_that_is_refused_counts_for_nothing_and_is_told(folder: Path, endpoint: Any) -> None:
    endpoint.answer = lambda question: (400, "too long") if "how so" in question else (200, "[[A]]")
    output = mara("eval", "--resume", folder)
    assert "judges.big refused 1 of 3 questions, which count for nothing (status 400: 'too long')" in output
    report = json.loads((folder / "report.json").read_text())
    (pair,), (verdicts,) = report["pairs"], report["verdicts"]
    counted = [pair["big"][name] for name in ("wins", "ties", "losses")]
    assert (pair["num_prompts"], counted) == (4, [0, 3, 0])  # one of them with equal answers
    assert (verdicts["num_disagreeing"], verdicts["num_unclear"]) == (2, 0)
    where = {"dataset": "held_out", "judge": "big", "of": "mara against base"}
    assert report["refused"] == [{**where, "num": 1, "said": "status 400: 'too long'"}]
    for name in ("report.md", "report.html"):
        assert "Refused by the judge's server" in (folder / name).read_text().replace("&#39;", "'")
    asked = len(endpoint.requests)
    mara("eval", "--resume", folder)
    assert len(endpoint.requests) == asked


class Actors:
    """In the place of a crew: hands in ``refused`` for every prompt but those that are ``taken``."""

    num_started, num_loading, num_tokens, is_idle = 1, 0, 0, True

    def __init__(self, taken: Sequence[str]) -> None:
        self.taken = taken

    def join(self, comparison: Any, exits: object) -> Actors:
        self.take = comparison._take
        return self

    def add(self, works: Sequence[Work]) -> None:
        for work in works:
            for question in work.questions:
                row: dict[str, Any] = {"work": work.number, "system": question.system}
                is_taken = question.prompt in self.taken
                if work.judges:
                    score = {"score": 1.0} if is_taken else {"score": None, "refused": "no"}
                    likelihood = {"num_tokens": 2, "logprob": -1.0, "logprob_elsewhere": -2.0}
                    found = {"helpful": score, "likelihood": likelihood}
                    row["row"] = {
                        "id": question.id,
                        "scores": {judge: found[judge] for judge in work.judges},
                    }
                else:
                    row["row"] = {"id": question.id, "prompt": question.prompt, "response": "best"}
                    row["row"] |= {"tokens": 2, "seconds": 1.0, "finish_reason": "eos"}
                    row |= {} if is_taken else {"refused": "judges.helpful: no"}
                    row["row"] |= {"score": 1.0} if is_taken else {}
                self.take(work, row)


def acts(monkeypatch: pytest.MonkeyPatch, taken: Sequence[str]) -> None:
    actors = Actors(taken)
    monkeypatch.setattr(
        "mara.deploy.comparison.run._Comparison._crew", lambda one, exits: actors.join(one, exits)
    )


def test_many_refused_answers_are_kept_beside_one_that_was_scored_and_not_else(
    larger: Path, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = larger / "answers/held_out/best.jsonl"
    scores = [larger / "scores/held_out" / system / "helpful.jsonl" for system in ("base", "mara", "best")]
    for path in scores[:2]:
        path.unlink()
    endpoint.answer = lambda question: (200, "[[tie]]")
    acts(monkeypatch, [])
    output = mara("eval", "--resume", larger, status=2)
    assert "systems.best: no scores (judges.helpful: no); look at that, then resume" in output
    assert not chosen.exists()

    acts(monkeypatch, MORE[-1:])
    mara("eval", "--resume", larger)
    assert [path.read_text().count("refused") for path in scores] == [15] * 3
    assert len(chosen.read_text().splitlines()) == 16

    # What was kept before counts: here only what is refused is left.
    for path in (chosen, *scores):
        (line,) = (line for line in path.read_text().splitlines() if '"score": 1.0' in line)
        path.write_text(line + "\n")
    acts(monkeypatch, [])
    mara("eval", "--resume", larger)
    assert [path.read_text().count("refused") for path in scores] == [15] * 3

    for path in scores:
        path.unlink()
    output = mara("eval", "--resume", larger, status=2)
    assert "judges.helpful: no scores (no); look at that, then resume" in output
    assert not any(path.exists() for path in scores)


@pytest.fixture
def answered(larger: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The larger one, by all its systems, and scored."""
    acts(monkeypatch, ["why", "how so", "what", "never asked", *MORE])
    return larger


def test_a_judge_that_refuses_whatever_it_is_asked_ends_the_comparison(answered: Path, endpoint: Any) -> None:
    endpoint.answer = lambda question: (400, "max_tokens is not known")
    for _ in range(2):  # Equal answers, which tie without it, are nothing that it has answered.
        output = mara("eval", "--resume", answered, status=2)
        assert "refuses every question (status 400: 'max_tokens is not known'); check model and" in output
    endpoint.answer = lambda question: (200, "[[A]]")  # and nothing is kept of it
    assert "refused" not in mara("eval", "--resume", answered)


def test_a_judge_may_refuse_all_but_one_question(answered: Path, endpoint: Any) -> None:
    endpoint.answer = lambda question: (200, "[[A]]") if MORE[-1] in question else (400, "too long")
    output = mara("eval", "--resume", answered)
    assert "judges.big refused 29 of 31 questions" in output
    report = json.loads((answered / "report.json").read_text())
    assert [row["num"] for row in report["refused"]] == [15, 14]


def test_a_judge_that_answered_before_may_refuse_all_that_is_left(answered: Path, endpoint: Any) -> None:
    endpoint.answer = lambda question: (200, "[[A]]") if "why" in question else (503, "busy")
    mara("eval", "--resume", answered, "judges.big.concurrency=1", status=1)
    assert len((answered / "scores/held_out/best/big.jsonl").read_text().splitlines()) == 1
    endpoint.answer = lambda question: (400, "too long")
    output = mara("eval", "--resume", answered)
    assert "judges.big refused 30 of 30 questions" in output
    rows = (answered / "scores/held_out/best/big.jsonl").read_text()
    assert (len(rows.splitlines()), rows.count("refused")) == (16, 15)


def test_the_same_command_goes_on_and_a_changed_one_is_refused(folder: Path, endpoint: Any) -> None:
    config = folder.parent / "mine.yaml"
    changed = mara("eval", config, "seed=3", "--resume", folder, status=2)
    assert "belongs to another comparison (seed is another)" in changed
    assert endpoint.requests == []
    mara("eval", config, "--resume", folder)
    assert (folder / "report.md").is_file()
    assert f"`mara eval --resume {folder}` goes on" in mara("eval", folder, status=2)


def test_two_do_not_work_in_one_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mara.deploy.comparison.run.PREDECESSOR_S", 0.0)
    with hold_run(folder):
        assert f"{folder} is in use" in mara("eval", "--resume", folder, status=2)
