"""What a death means for a comparison, with processes that die on command; and what is left to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mara.actors.answering import Question
from mara.actors.prompts import Prompt
from mara.common.errors import UserError
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.comparison.crew import SILENT_AFTER_S, Crew
from mara.deploy.comparison.host import ComparisonHost, HostSpec, Model, Work
from mara.deploy.comparison.plan import Planner
from mara.deploy.comparison.results import Results
from mara.deploy.config_file import make_settings
from mara.deploy.exit import RunFailed
from mara.deploy.process import LOADING, RUNNING, Report
from mara.deploy.topology import Ended

SETTINGS = {
    "llm": {"model": "m"},
    "systems": {
        "base": {"kind": "llm"},
        "mara": {"kind": "agent", "path": "a"},
        "other": {"kind": "llm", "model": "n"},
        "fixed": {"kind": "corrector", "of": "mara", "template": "{prompt}: {response}"},
        "theirs": {"kind": "responses", "path": "t"},
    },
    "datasets": {"d": {"path": "p"}, "e": {"path": "q"}},
    "judges": {"helpful": {"path": "h", "weight": 1.0}},
    "baseline": "base",
    "num_actors": 2,
    "prompts_per_chunk": 3,
}


@pytest.fixture
def config(tmp_path: Path) -> ComparisonConfig:
    return make_settings(ComparisonConfig, json.loads(json.dumps(SETTINGS)), [], tmp_path)


class FakeHandle:
    """Stands for a process: takes chunks, hands in what it is told, ends when it is told."""

    def __init__(self) -> None:
        self.report: Report | None = None
        self.heard = True
        self.ended: Ended | None = None
        self.killed = False
        self.given: list[Work] = []
        self.rows: list[dict[str, Any]] = []

    def runs(self, phase: str = RUNNING, tokens: float = 0.0) -> None:
        self.report = Report(phase, 1, {"rollout/tokens_total": tokens}, [])

    def tell(self, method: str, work: Work) -> None:
        assert method == "give"
        self.given.append(work)

    def hands_in(self, *ids: str, is_done: bool = False) -> None:
        work = self.given[-1]
        self.rows += [{"work": work.number, "system": "base", "row": {"id": name}} for name in ids]
        if is_done:
            self.rows.append({"work": work.number, "is_done": True})

    def poll(self) -> Ended | None:
        return self.ended

    def take_rows(self) -> list[dict[str, Any]]:
        rows, self.rows = self.rows, []
        return rows

    def kill(self) -> None:
        self.killed = True


class FakePlaces:
    def __init__(self) -> None:
        self.handles: dict[str, FakeHandle] = {}

    def place_comparison(self, spec: HostSpec) -> Any:
        assert spec.name not in self.handles
        return self.handles.setdefault(spec.name, FakeHandle())

    def resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


class Team:
    """A crew on fakes, with what it said and took."""

    def __init__(self, config: ComparisonConfig, folder: Path, num: int = 2) -> None:
        (folder / "logs").mkdir(exist_ok=True)
        self.places = FakePlaces()
        self.said: list[str] = []
        self.taken: list[tuple[int, str]] = []
        specs = [HostSpec(f"actor-{n}", config, folder, folder) for n in range(num)]
        self.crew = Crew(self.places, config, specs, self.take, self.said.append)

    def take(self, work: Work, row: dict[str, Any]) -> None:
        self.taken.append((work.number, row["row"]["id"]))

    def __getitem__(self, name: str) -> FakeHandle:
        return self.places.handles[name]


def chunk(number: int, config: ComparisonConfig, ids: str, model: str = "m") -> Work:
    llm = config.llm.model_copy(update={"model": model})
    return Work(number, Model(llm), "d", tuple(Question("base", name, name) for name in ids))


def ids_of(work: Work) -> str:
    return "".join(question.id for question in work.questions)


def test_chunks_go_to_whoever_is_free_and_knows_their_model(config, tmp_path) -> None:
    team = Team(config, tmp_path)
    team.crew.add(
        [chunk(0, config, "a"), chunk(1, config, "b", "n"), chunk(2, config, "c"), chunk(3, config, "d")]
    )
    team.crew.poll()
    assert team["actor-0"].given == [] and team.crew.num_started == 0
    team["actor-0"].runs()
    team["actor-1"].runs(LOADING, tokens=5)
    team.crew.poll()
    assert [ids_of(team[f"actor-{n}"].given[-1]) for n in range(2)] == ["a", "b"]
    assert (team.crew.num_loading, team.crew.num_tokens) == (1, 5)
    team["actor-0"].hands_in("a", is_done=True)
    team.crew.poll()
    assert ids_of(team["actor-0"].given[-1]) == "c"
    team["actor-1"].hands_in("b", is_done=True)
    team.crew.poll()
    assert ids_of(team["actor-1"].given[-1]) == "d"  # nothing else is left
    for name, found in (("actor-0", "c"), ("actor-1", "d")):
        assert not team.crew.is_idle
        team[name].hands_in(found, is_done=True)
        team.crew.poll()
    assert team.crew.is_idle
    assert team.taken == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    team.crew.kill()
    assert team["actor-0"].killed and team["actor-1"].killed


def test_an_actor_goes_on_with_the_model_it_has_while_there_is_work_for_it(config, tmp_path) -> None:
    team = Team(config, tmp_path)
    team.crew.add(chunk(n, config, name, model) for n, (name, model) in enumerate(["am", "bn", "cn", "dm"]))
    for name in ("actor-0", "actor-1"):
        team[name].runs()
    team.crew.poll()
    assert [ids_of(team[f"actor-{n}"].given[-1]) for n in range(2)] == ["a", "b"]
    team["actor-0"].hands_in("a", is_done=True)
    team.crew.poll()
    assert ids_of(team["actor-0"].given[-1]) == "d"
    team["actor-0"].hands_in("d", is_done=True)
    team.crew.poll()
    assert ids_of(team["actor-0"].given[-1]) == "c"


def test_a_process_answers_each_chunk_with_its_own_llm(tmp_path, llm_folder, make_llm_folder) -> None:
    content = SETTINGS | {
        "llm": {"model": str(llm_folder), "dtype": "float32", "device": "cpu"},
        "decoding": {"max_new_tokens": 6},
        "systems": {"base": {"kind": "llm"}, "other": {"kind": "llm", "model": str(make_llm_folder(seed=1))}},
    }
    config = make_settings(ComparisonConfig, content, [], tmp_path)
    host = ComparisonHost(HostSpec("actor-0", config, tmp_path, tmp_path))

    def said(system: str) -> str:
        work = Work(0, Model(*config.llm_of(system)), "d", (Question(system, "p", "why"),))
        (row,) = host._do(work)
        return str(row["row"]["response"])

    first, other = said("base"), said("other")
    assert first != other
    assert (said("other"), said("base")) == (other, first)


def test_what_a_dead_actor_had_not_handed_in_goes_to_another(config, tmp_path) -> None:
    team = Team(config, tmp_path)
    team.crew.add([chunk(0, config, "abc"), chunk(1, config, "de"), chunk(2, config, "f")])
    for name in ("actor-0", "actor-1"):
        team[name].runs()
    team.crew.poll()
    team["actor-0"].hands_in("b")
    team["actor-0"].ended = Ended(died=True)
    team["actor-1"].hands_in("d", "e", is_done=True)
    team.crew.poll()
    assert ids_of(team["actor-1"].given[-1]) == "ac"
    assert team.said == ["actor-0 died; actor-0-1 takes its place"]
    assert team["actor-0"].killed and team.crew.num_restarts == 1
    team["actor-0-1"].runs()
    team.crew.poll()
    assert ids_of(team["actor-0-1"].given[-1]) == "f"
    # One that died when all was handed in leaves nothing behind.
    team["actor-0-1"].hands_in("f")
    team["actor-0-1"].ended = Ended(died=True)
    team["actor-1"].hands_in("a", "c", is_done=True)
    team.crew.poll()
    assert team.crew.is_idle and "actor-0-2 takes its place" in team.said[-1]
    assert sorted(name for _, name in team.taken) == list("abcdef")


def test_prompts_that_end_one_actor_after_another_end_the_comparison(config, tmp_path) -> None:
    team = Team(config, tmp_path, num=1)
    team.crew.add([chunk(0, config, "ab")])
    for name in ("actor-0", "actor-0-1"):
        team[name].runs()
        team.crew.poll()
        team[name].ended = Ended(died=True)
        team.crew.poll()
    team["actor-0-2"].runs()
    team.crew.poll()
    team["actor-0-2"].ended = Ended(died=True)
    with pytest.raises(
        RunFailed, match=r"actor-0-2 died, as did 2 others with the same 2 prompts of datasets\.d"
    ):
        team.crew.poll()


def test_too_many_deaths_end_the_comparison(config, tmp_path) -> None:
    few = config.model_copy(update={"ray": config.ray.model_copy(update={"max_actor_restarts": 1})})
    team = Team(few, tmp_path)
    team["actor-0"].ended = Ended(died=True)
    team.crew.poll()
    team["actor-1"].ended = Ended(died=True)
    with pytest.raises(RunFailed, match=r"actor-1 died; 1 actors were replaced already"):
        team.crew.poll()


def test_a_mistake_of_the_user_ends_the_comparison_as_what_it_is(config, tmp_path) -> None:
    team = Team(config, tmp_path)
    team["actor-0"].ended = Ended(error=UserError("llm.model: no"), trace="…")
    with pytest.raises(UserError, match=r"^llm\.model: no$"):
        team.crew.poll()


def test_an_error_before_any_work_is_not_tried_again_one_after_work_is(config, tmp_path) -> None:
    team = Team(config, tmp_path)
    team.crew.add([chunk(0, config, "ab")])
    team["actor-0"].runs()
    team.crew.poll()
    team["actor-0"].hands_in("a")
    team["actor-0"].ended = Ended(error=RuntimeError("out of memory\nmore"), trace="Traceback: deep")
    team.crew.poll()
    assert team.said == ["actor-0 failed: RuntimeError: out of memory; actor-0-1 takes its place"]
    assert "Traceback: deep" in (tmp_path / "logs" / "actor-0.log").read_text()
    team["actor-1"].ended = Ended(error=RuntimeError("broken"), trace="")
    with pytest.raises(
        RunFailed, match=r"actor-1 failed: RuntimeError: broken; it never worked; see .*actor-1\.log"
    ):
        team.crew.poll()


def test_no_room_is_told_and_silence_is_warned_of_once(config, tmp_path, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mara.deploy.comparison.crew.time.monotonic", lambda: now[0])
    team = Team(config, tmp_path)
    team["actor-0"].runs()
    team.crew.poll()
    for handle in team.places.handles.values():
        handle.heard = False
    now[0] += SILENT_AFTER_S + 1
    for _ in range(2):
        team.crew.poll()
    assert [line for line in team.said if "actor-0" in line] == [
        f"actor-0 has not answered for {SILENT_AFTER_S:g} s; see {tmp_path / 'logs' / 'actor-0.log'}"
    ]
    now[0] += config.ray.start_timeout_s
    with pytest.raises(RunFailed, match=r"actor-1 found no place in 120 s .*; the cluster has 2 CPU, 0 GPU"):
        team.crew.poll()


PROMPTS = {
    "d": [Prompt(f"d{n}", "x" * n) for n in range(1, 6)],
    "e": [Prompt("e1", "why?")],
}


def planned(works: list[Work]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    return [
        (work.model.llm.model, work.dataset, [(question.system, question.id) for question in work.questions])
        for work in works
    ]


def answer(results: Results, dataset: str, system: str, name: str, response: str = "r") -> None:
    results.add_answer(dataset, system, {"id": name, "response": response, "seconds": 2.0})


def test_systems_of_an_llm_are_answered_together_and_what_is_there_is_left_out(config, tmp_path) -> None:
    with Results(tmp_path) as results:
        planner = Planner(config, PROMPTS, results)
        answer(results, "d", "base", "d4")
        answer(results, "e", "other", "e1")
        found = planned(planner.answers(config.waves[0]))
    both = [("base", "mara")] * 2
    assert found == [
        ("m", "d", [(s, "d5") for s in both[0]] + [("mara", "d4")] + [(s, "d3") for s in both[0]]),
        ("m", "d", [(s, name) for name in ("d2", "d1") for s in both[0]]),
        ("m", "e", [("base", "e1"), ("mara", "e1")]),
        ("n", "d", [("other", name) for name in ("d5", "d4", "d3")]),
        ("n", "d", [("other", name) for name in ("d2", "d1")]),
    ]
    assert planner.count_answers() == 2 and planner.num_answers == 5 * 6


def test_a_corrector_is_asked_with_the_answer_that_it_corrects(config, tmp_path) -> None:
    with Results(tmp_path) as results:
        for dataset, prompts in PROMPTS.items():
            for prompt in prompts:
                answer(results, dataset, "mara", prompt.id, f"of {prompt.id}")
        works = Planner(config, PROMPTS, results).answers(config.waves[1])
    question = works[0].questions[0]
    assert (question.asked, question.prompt, question.seconds_before) == ("xxxxx: of d5", "xxxxx", 2.0)


def test_every_answer_is_scored_by_every_judge_once(config, tmp_path) -> None:
    with Results(tmp_path) as results:
        for dataset, prompts in PROMPTS.items():
            for prompt in prompts:
                for system in config.systems:
                    answer(results, dataset, system, prompt.id, f"{system} {prompt.id}")
        results.add_score("e", "mara", "helpful", {"id": "e1", "score": 1.0})
        works = Planner(config, PROMPTS, results).scores()
    assert len({work.number for work in works}) == len(works)
    scored = [
        (judge, work.dataset, question.system, question.id)
        for work in works
        for judge in work.judges
        for question, response in zip(work.questions, work.responses, strict=True)
        if response == f"{question.system} {question.id}"
    ]
    wanted = {
        (judge, dataset, system, prompt.id)
        for judge in ("likelihood", "helpful")
        for dataset, prompts in PROMPTS.items()
        for system in config.systems
        for prompt in prompts
    }
    assert len(scored) == len(set(scored)) and set(scored) == wanted - {("helpful", "e", "mara", "e1")}
    others = {(work.dataset, q.prompt, q.another) for work in works for q in work.questions}
    assert others == {
        (dataset, prompt.prompt, following.prompt if len(prompts) > 1 else None)
        for dataset, prompts in PROMPTS.items()
        for prompt, following in zip(prompts, [*prompts[1:], prompts[0]], strict=True)
    }


def test_a_chunk_without_what_is_done_keeps_answers_beside_their_questions(config) -> None:
    questions = tuple(Question("base", name, name) for name in "abc")
    work = Work(7, Model(config.llm), "d", questions, ("1", "2", "3"), ("helpful",))
    left = work.without({("base", "b"), ("mara", "a")})
    assert left is not None and (ids_of(left), left.responses, left.number) == ("ac", ("1", "3"), 7)
    assert work.without({("base", name) for name in "abc"}) is None
