"""Judges that score: heads share a reading, others are asked for a score."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from mara.actors.heads import HeadRewardModel, RewardHead
from mara.actors.llm import load_llm
from mara.actors.llm_judge import Comparison, EndpointUnavailable, QuestionRefused
from mara.actors.reward_models.http import HttpRefused
from mara.common.contracts import Conversation
from mara.common.errors import UserError
from mara.deploy.comparison import judges as module
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.comparison.judges import Judges
from mara.deploy.comparison.verdicts import MANY_REFUSED, Pair, Refusals, Refused, Verdicts
from mara.deploy.config import RunConfig

SAID = [Conversation("why", "so it is"), Conversation("why", ""), Conversation("how so", "abc")]


@pytest.fixture
def made(tiny_run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch) -> tuple[Judges, list[int]]:
    """Two heads, and how many texts were read."""
    _, config = tiny_run
    llm = load_llm(config.llm)
    read: list[int] = []
    really = module.read_responses

    def counted(llm, said):
        read.append(len(said))
        return really(llm, said)

    monkeypatch.setattr(module, "read_responses", counted)
    return Judges(config.rewards, lambda: llm, Path.cwd()), read


def test_heads_and_likelihood_come_from_one_reading(made, tiny_run) -> None:
    judges, read = made
    found = judges.judge(["likelihood", "helpful", "cost"], SAID, ["how so", "how so", None])
    assert read == [3, 2]
    assert [row["likelihood"]["num_tokens"] for row in found] == [8, 0, 3]
    elsewhere = judges.judge(["likelihood"], [Conversation("how so", "so it is")], [None])[0]["likelihood"]
    assert found[0]["likelihood"]["logprob_elsewhere"] == pytest.approx(elsewhere["logprob"], abs=1e-3)
    assert found[0]["likelihood"]["logprob"] != pytest.approx(elsewhere["logprob"], abs=1e-2)
    assert found[1]["likelihood"]["logprob_elsewhere"] == 0.0
    assert found[2]["likelihood"]["logprob_elsewhere"] is None
    for name, config in tiny_run[1].rewards.items():
        llm = load_llm(tiny_run[1].llm)
        head = module.load_head(config.path)
        wanted = HeadRewardModel(llm, head).score(SAID).tolist()
        assert [row[name]["score"] for row in found] == pytest.approx(wanted, abs=1e-4)


def test_weighted_judges_are_one_reward_model(made) -> None:
    judges, _ = made
    rows = judges.judge(["helpful", "cost"], SAID)
    total_B = judges.weighted(["helpful", "cost"]).score(SAID)
    wanted = [row["helpful"]["score"] - 0.5 * row["cost"]["score"] for row in rows]
    assert total_B.tolist() == pytest.approx(wanted, abs=1e-5) and total_B.dtype == torch.float32


def test_a_judge_that_is_no_head_is_given_the_text_and_no_llm_is_loaded_for_it(tmp_path: Path) -> None:
    """With the settings that ``rewards`` of a training would have."""
    (tmp_path / "judge_of_lengths.py").write_text(
        "def length(prompts, responses): return [len(response) for response in responses]\n"
        "def broken(prompts, responses): raise OSError('away\\nfor good')\n"
    )
    content = {
        "llm": {"model": "m"},
        "systems": {"base": {"kind": "llm"}, "sampled": {"kind": "llm", "sampling": True}},
        "datasets": {"d": {"path": "p.jsonl"}},
        "baseline": "base",
        "judges": {
            name: {"kind": "function", "function": f"judge_of_lengths:{name}", "weight": 1}
            for name in ("length", "broken")
        },
    }
    config = ComparisonConfig.model_validate(content)

    def no_llm():
        raise AssertionError("nothing reads the text")

    judges = Judges(config.scoring_judges, no_llm, tmp_path)
    assert judges.judge(["length"], SAID) == [{"length": {"score": float(n)}} for n in (8, 0, 3)]
    with pytest.raises(UserError, match=r"judges\.broken: no scores \(.*away\); look") as caught:
        judges.judge(["broken"], SAID)
    assert "\n" not in str(caught.value)


def test_a_score_that_is_no_number_is_told(made, monkeypatch) -> None:
    judges, _ = made
    monkeypatch.setattr(
        RewardHead, "score_states", lambda self, states: torch.full((len(states),), torch.nan)
    )
    with pytest.raises(UserError, match=r"judges\.cost: a score is not finite"):
        judges.judge(["cost"], SAID)


class Picky:
    """A server that takes no answer with an "a" in it."""

    def __init__(self) -> None:
        self.num_asked = 0

    def score(self, conversations):
        self.num_asked += 1
        if any("a" in one.response for one in conversations):
            raise HttpRefused("http://x: status 400: 'no'")
        return torch.tensor([float(len(one.response)) for one in conversations])


def test_an_answer_that_a_server_refuses_has_no_score_and_the_others_have(made, monkeypatch) -> None:
    judges, _ = made
    picky = Picky()
    monkeypatch.setattr(judges, "_open", lambda name: picky)
    said = [Conversation("p", text) for text in ("x", "yy", "a", "zzz", "ab")]
    rows = [row["helpful"] for row in judges.judge(["helpful"], said)]
    assert [row["score"] for row in rows] == [1.0, 2.0, None, 3.0, None]
    assert rows[2]["refused"] == "http://x: status 400: 'no'" and "refused" not in rows[0]
    assert picky.num_asked < 2 * len(said)
    total_B = judges.weighted(["helpful", "cost"]).score(said)
    assert total_B.isfinite().tolist() == [True, True, False, True, False]
    assert (total_B[2], total_B[4]) == (-torch.inf, -torch.inf)


def test_many_refusals_before_others_are_taken_are_no_error(made, monkeypatch) -> None:
    """What they mean is decided where all that was found comes together."""
    judges, _ = made
    monkeypatch.setattr(judges, "_open", lambda name: Picky())
    said = [Conversation("p", "a")] * 10 + [Conversation("p", "x")] * 30
    scores = [row["helpful"]["score"] for row in judges.judge(["helpful"], said)]
    assert scores == [None] * 10 + [1.0] * 30
    assert judges.refusal == "judges.helpful: http://x: status 400: 'no'"


def test_refusals_are_held_back_until_something_is_taken() -> None:
    kept: list[int] = []
    refusals = Refusals(has_taken=False)
    for n in range(MANY_REFUSED):
        refusals.add(f"no {n}", partial(kept.append, n))
    with pytest.raises(UserError, match="a setting is wrong"):
        refusals.settle("a setting is wrong")
    assert kept == []
    refusals.take()
    assert kept == list(range(MANY_REFUSED))
    refusals.add("no", partial(kept.append, MANY_REFUSED))
    refusals.settle("a setting is wrong")
    assert kept == list(range(MANY_REFUSED + 1))
    assert (refusals.num, refusals.said) == (MANY_REFUSED + 1, "no 0")


def test_a_few_refusals_alone_are_kept() -> None:
    kept: list[int] = []
    refusals = Refusals(has_taken=False)
    for n in range(MANY_REFUSED - 1):
        refusals.add("no", partial(kept.append, n))
    assert kept == []
    refusals.settle("a setting is wrong")
    assert len(kept) == MANY_REFUSED - 1


def test_a_thread_asks_nothing_more_after_an_error_and_goes_on_after_a_refusal() -> None:
    class Judge:
        def __init__(self, *errors: Exception) -> None:
            self.errors, self.num_asked = list(errors), 0

        def compare(self, prompt, first, second, wait):
            self.num_asked += 1
            if self.errors:
                raise self.errors.pop(0)
            return Comparison(0, ("tie", "tie"), ("", ""))

    def asked(judge: Judge) -> list[object]:
        before = set(threading.enumerate())
        verdicts = Verdicts(judge, [Pair("d", "a", "b", str(n), "p", "x", "y") for n in range(4)], 1)
        for thread in set(threading.enumerate()) - before:
            thread.join()
        found: list[object] = []
        try:
            for _, what in verdicts.take():
                found.append(what)
        except EndpointUnavailable as error:
            found.append(error)
        return found

    tie = Comparison(0, ("tie", "tie"), ("", ""))
    away = EndpointUnavailable("away")
    assert asked(broken := Judge(QuestionRefused("no"), away)) == [Refused("no"), away]
    assert broken.num_asked == 2
    assert asked(picky := Judge(QuestionRefused("no"))) == [Refused("no"), tie, tie, tie]
    assert picky.num_asked == 4
