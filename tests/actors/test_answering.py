"""Systems that answer side by side, against each of them alone."""

from __future__ import annotations

import pytest
import torch

from mara.actors.answering import Answerer, Question, System, _Draft
from mara.actors.config import DecodingConfig, LLMConfig, TruncationConfig
from mara.actors.decoding.generation import Generation, Request
from mara.actors.decoding.policies import AgentPolicy
from mara.actors.evaluation import answer_prompts
from mara.actors.llm import LLM, load_llm
from mara.actors.prompts import Prompt
from mara.common.agent import Agent
from mara.common.config import AgentConfig
from mara.common.contracts import Conversation
from mara.common.errors import UserError

DECODING = DecodingConfig(max_new_tokens=6, truncation=TruncationConfig(top_k=4), threshold=0.4)
TEXTS = ["why", "how so", "what", "when is it", "who", "a", "b c", "dd", "e e e", "no"]


@pytest.fixture(scope="module")
def llm(llm_folder) -> LLM:
    return load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))


def make_agent(seed: int = 5) -> Agent:
    """Rejects now and then, depending on the state."""
    torch.manual_seed(seed)
    agent = Agent(32, AgentConfig(widths=(16, 8), accept_bias=-0.2)).eval().requires_grad_(False)
    torch.nn.init.normal_(agent.output_linear.weight, std=1.5)
    return agent


class CountsLetters:
    """Likes one letter and dislikes another."""

    def __init__(self) -> None:
        self.seen: list[Conversation] = []

    def score(self, conversations):
        self.seen += conversations
        return torch.tensor([self.worth(said.response) for said in conversations])

    def worth(self, text: str) -> float:
        return 2.0 * text.count("a") - text.count("b")


def answerer(llm: LLM, systems: dict[str, System], rows: int = 3, **settings) -> Answerer:
    return Answerer(llm, systems, DECODING, rows, settings.pop("max_prompt_tokens", 60), seed=3)


def asked(system: str, texts=TEXTS) -> list[Question]:
    return [Question(system, f"p{n}", text) for n, text in enumerate(texts)]


def test_systems_that_share_an_engine_answer_as_a_comparison_of_a_run_does(llm):
    systems = {
        "base": System("greedy"),
        "agent": System(AgentPolicy(make_agent(), threshold=0.4)),
        "base_sampled": System("sample"),
    }
    machine = answerer(llm, systems)
    # In two chunks, of which the second has the longer prompts: the engine is made anew.
    questions = [question for name in systems for question in asked(name)]
    short = [question for question in questions if len(question.prompt) < 5]
    found = [*machine.answer(short), *machine.answer([q for q in questions if q not in short])]
    prompts = [Prompt(f"p{n}", text) for n, text in enumerate(TEXTS)]
    policies = {name: system.policy for name, system in systems.items()}
    wanted = answer_prompts(llm, prompts, DECODING, policies, 5, 60, seed=3)
    assert len(found) == len(questions)
    for answer in found:
        number = int(answer.question.id[1:])
        one = wanted[answer.question.system][number]
        assert answer.response == llm.decode(one.response_ids)
        assert (answer.num_tokens, answer.finish_reason) == (len(one.response_ids), one.finish_reason)
        assert answer.num_changed == sum(rank > 0 for rank in one.accepted_ranks)
        assert answer.seconds > 0 and answer.score is None
    changed = {answer.question.system: answer.num_changed for answer in found}
    assert changed["base"] == changed["base_sampled"] == 0 < sum(answer.num_changed for answer in found)


def test_an_answer_is_handed_over_when_it_is_finished(llm):
    machine = answerer(llm, {"base": System("greedy")}, rows=1)
    counted: list[int] = []
    answers = machine.answer(asked("base"), counted.append)
    first = next(answers)
    assert counted == [first.num_tokens]
    assert len(list(answers)) == len(TEXTS) - 1


def test_the_best_of_several_has_the_highest_score_of_all_that_were_drawn(llm):
    judge = CountsLetters()
    system = System("sample", num_candidates=5, judge=judge)
    machine = answerer(llm, {"best": system, "base": System("greedy")})
    found = list(machine.answer(asked("best") + asked("base")))
    best = [answer for answer in found if answer.question.system == "best"]
    assert len(best) == len(TEXTS) and len(found) == 2 * len(TEXTS)
    several = 0
    for answer in best:
        drawn = [said.response for said in judge.seen if said.prompt == answer.question.prompt]
        assert len(drawn) == 5 and answer.response in drawn
        assert answer.score == max(map(judge.worth, drawn)) == judge.worth(answer.response)
        several += len(set(drawn)) > 1
    assert several > len(TEXTS) / 2  # its draws differ
    assert all(answer.score is None for answer in found if answer.question.system == "base")


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_of_equally_good_answers_the_first_drawn_is_taken_whichever_ends_first(llm, rows):
    class Indifferent:
        def score(self, conversations):
            return torch.zeros(len(conversations))

    def best(num: int, rows: int) -> list[str]:
        system = System("sample", num_candidates=num, judge=Indifferent())
        found = answerer(llm, {"best": system}, rows).answer(asked("best"))
        return [answer.response for answer in sorted(found, key=lambda answer: answer.question.id)]

    assert best(4, rows) == best(2, 1)


def test_a_corrector_is_asked_its_own_text_and_counts_the_time_before(llm):
    raw = System("greedy", uses_chat_template=False)
    machine = answerer(llm, {"fix": raw, "plain": System("greedy")})
    question = Question("fix", "p", "why", asked="how so", seconds_before=100.0)
    (answer,) = machine.answer([question])
    (alone,) = answer_prompts(llm, [Prompt("p", "how so")], DECODING, {"x": "greedy"}, 1, 60)["x"]
    templated = llm.render("how so")
    assert templated != list(llm.tokenizer("how so")["input_ids"])
    (in_template,) = machine.answer([Question("plain", "p", "why", asked="how so")])
    assert in_template.response == llm.decode(alone.response_ids)
    assert in_template.response != answer.response
    assert answer.question.prompt == "why" and answer.seconds > 100


def test_a_prompt_that_is_too_long_is_named_with_its_system(llm):
    machine = answerer(llm, {"base": System("greedy")}, max_prompt_tokens=16)
    with pytest.raises(
        UserError, match=r"prompt 'p3' has 17 tokens .* systems\.base, max_prompt_tokens is 16"
    ):
        list(machine.answer(asked("base")))


def test_a_best_answer_needs_a_finite_score(llm):
    class Broken:
        def score(self, conversations):
            return torch.full((len(conversations),), torch.nan)

    machine = answerer(llm, {"best": System("sample", 2, Broken())})
    with pytest.raises(UserError, match=r"systems\.best\.judges: a score is not finite"):
        list(machine.answer(asked("best")))


def test_an_answer_that_could_not_be_scored_is_best_only_where_none_could(llm):
    class Refuses:
        """All answers to one prompt, and the first to each other."""

        def score(self, conversations):
            seen: set[str] = set()
            scores = []
            for said in conversations:
                is_refused = said.prompt == TEXTS[0] or said.prompt not in seen
                scores.append(-torch.inf if is_refused else -5.0)
                seen.add(said.prompt)
            return torch.tensor(scores)

    found = answerer(llm, {"best": System("sample", 2, Refuses())}).answer(asked("best"))
    scores = {answer.question.prompt: answer.score for answer in found}
    assert scores == {TEXTS[0]: None, **dict.fromkeys(TEXTS[1:], -5.0)}


def test_the_best_of_several_took_the_time_of_all_and_of_the_scoring(llm, monkeypatch):
    clock = iter([100.0, 106.0])
    monkeypatch.setattr("mara.actors.answering.time.monotonic", lambda: next(clock))
    machine = answerer(llm, {"best": System("sample", 2, CountsLetters())})
    questions = asked("best", ["why", "how so"])
    times = [(1.0, 3.0), (2.0, 6.0)]
    drafts = {
        question: [
            _Draft("a" * number, Generation(Request([1], 0), began, response_ids=[1], finished_at_s=ended), 0)
            for number, (began, ended) in enumerate(times)
        ]
        for question in questions
    }
    # Two and four seconds in a row of the batch each, and half of the six that it took to score both.
    assert [answer.seconds for answer in machine._best(drafts)] == [9.0, 9.0]
