"""Scores fetched beside the decoding, and several callers of one model."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mara.actors.reward_models.function import FunctionFailed
from mara.actors.reward_models.merging import MergedCalls
from mara.actors.scoring import MOST_AT_ONCE, Judge, Scorer, Unscored
from mara.common.contracts import Conversation
from mara.common.episode import Episode
from mara.common.errors import UserError


class Lengths:
    """Scores an answer by its length, once it may; fails for some of them."""

    def __init__(self, fails=lambda response: False, unsure=lambda response: False) -> None:
        self.fails, self.unsure = fails, unsure
        self.asked: list[list[str]] = []
        self.may = threading.Event()
        self.may.set()
        self.began = threading.Event()

    def score(self, conversations):
        responses = [conversation.response for conversation in conversations]
        self.asked.append(responses)
        self.began.set()
        self.may.wait()
        if any(map(self.fails, responses)):
            raise RuntimeError("no\nmore")
        return torch.tensor([math.nan if self.unsure(r) else float(len(r)) for r in responses])


class Kept:
    """Episodes that were handed over; can be waited for."""

    def __init__(self) -> None:
        self.episodes: list = []
        self.changed = threading.Condition()

    def __call__(self, episodes) -> None:
        with self.changed:
            self.episodes += episodes
            self.changed.notify_all()

    def wait_for(self, count: int) -> list:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.episodes) >= count, 30)
        return self.episodes


def make_episode(uid: str) -> Episode:
    """An answer without decisions and scores."""
    dtypes = {"actions_T": np.uint8, "ranks_T": np.int16, "num_candidates_T": np.int16}
    dtypes |= {"positions_T": np.int32, "forced_T": np.bool_, "policy_versions_T": np.int64}
    kinds = ("reference", "accept", "reject")
    columns = {name: np.empty(0, dtype) for name, dtype in dtypes.items()}
    columns |= {f"{kind}_logprobs_T": np.empty(0, np.float32) for kind in kinds}
    return Episode(
        uid=uid,
        prompt_id="p",
        actor_id="actor-0",
        prompt_ids_P=np.array([1], np.int32),
        response_ids_N=np.array([2], np.int32),
        states_TD=torch.empty(0, 4, dtype=torch.bfloat16),
        finish_reason="eos",
        started_at_s=1.0,
        finished_at_s=2.0,
        **columns,
    )


@pytest.fixture
def answers():
    return [Unscored(make_episode(f"e{number}"), Conversation("why", "x" * number)) for number in range(200)]


@pytest.fixture
def kept():
    return Kept()


@pytest.fixture
def make_scorer(kept):
    made = []

    def make(capacity=500, max_outage_s=1e9, hand_over=kept, **models):
        judges = {name: Judge(model, max_outage_s) for name, model in models.items()}
        made.append(Scorer(judges, hand_over, capacity))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close(5)


def wait_until(condition) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("it did not come about")


def test_every_answer_gets_the_score_of_every_judge_beside_those_it_has(make_scorer, kept, answers):
    scorer = make_scorer(length=Lengths(), same=Lengths())
    for answer in answers[:10]:
        answer.episode.scores["head"] = 0.25
    scorer.submit(answers[:10])
    for number, episode in enumerate(kept.wait_for(10)):
        assert episode.uid == f"e{number}"
        assert episode.scores == {"head": 0.25, "length": number, "same": number}
    assert scorer.num_failed == 0
    assert scorer.metrics == {"rewards/dropped": 0, "rewards/waiting": 0}


def test_the_caller_does_not_wait_and_beyond_the_capacity_the_oldest_answers_go(make_scorer, kept, answers):
    slow = Lengths()
    slow.may.clear()
    scorer = make_scorer(capacity=5, slow=slow)
    scorer.submit(answers[:1])
    assert slow.began.wait(30)
    for answer in answers[1:20]:
        scorer.submit([answer])
    assert scorer.metrics == {"rewards/dropped": 14, "rewards/waiting": 5}
    slow.may.set()
    assert [episode.uid for episode in kept.wait_for(6)] == ["e0", *(f"e{n}" for n in range(15, 20))]


def test_no_more_answers_than_fit_a_timeout_are_sent_at_once(make_scorer, kept, answers):
    model = Lengths()
    make_scorer(length=model).submit(answers)
    kept.wait_for(200)
    assert max(map(len, model.asked)) == MOST_AT_ONCE


def test_an_answer_that_lacks_a_score_is_dropped_and_counted_and_told_of_once(
    make_scorer, kept, answers, caplog
):
    scorer = make_scorer(length=Lengths(), picky=Lengths(unsure=lambda response: len(response) % 2 == 1))
    for start in (0, 10):
        scorer.submit(answers[start : start + 10])
        kept.wait_for(5 + start // 2)
    assert [episode.uid for episode in kept.episodes] == [f"e{n}" for n in range(0, 20, 2)]
    wait_until(lambda: scorer.num_failed == 10)
    (told,) = caplog.messages
    assert "rewards.picky" in told and "not finite" in told and "rollout/scores_failed" in told


def test_a_model_that_fails_costs_the_answers_it_was_asked_for_and_may_recover(
    make_scorer, kept, answers, caplog
):
    scorer = make_scorer(max_outage_s=1e9, length=Lengths(fails=lambda response: len(response) < 5))
    scorer.submit(answers[:3])
    wait_until(lambda: scorer.num_failed == 3)
    scorer.submit(answers[3:4])
    wait_until(lambda: scorer.num_failed == 4)
    scorer.submit(answers[10:12])
    assert [episode.uid for episode in kept.wait_for(2)] == ["e10", "e11"]
    (told,) = caplog.messages
    assert "rewards.length" in told and "(RuntimeError: no)" in told


def test_a_model_that_gives_nothing_for_too_long_ends_the_actor_with_the_reason(make_scorer, answers):
    scorer = make_scorer(max_outage_s=0.0, length=Lengths(fails=lambda response: True))
    scorer.submit(answers[:1])
    wait_until(lambda: not scorer._thread.is_alive())
    with pytest.raises(UserError, match=r"^rewards\.length: no score for 0 s \(RuntimeError: no\); .*outage"):
        scorer.submit([])


class Fails:
    """A function that fails as it is told, else gives zeros."""

    def __init__(self, *failures: str | None) -> None:
        self.failures = list(failures)

    def score(self, conversations):
        if (why := self.failures.pop(0)) is not None:
            raise FunctionFailed(why)
        return torch.zeros(len(conversations))


@pytest.mark.parametrize(
    ("failures", "ends"),
    [
        (["KeyError: 'a'", "KeyError: 'b'", "KeyError: 'c'"], True),
        ([None, "KeyError: 'a'", "KeyError: 'b'", "KeyError: 'c'"], False),  # it has worked: an outage
        (["KeyError: 'a'", "OSError: no", "KeyError: 'b'", "KeyError: 'c'"], False),
    ],
)
def test_a_function_that_never_worked_and_fails_in_one_way_is_not_waited_for(
    make_scorer, answers, failures, ends
):
    function = Fails(*failures)
    scorer = make_scorer(max_outage_s=1e9, mine=function)
    for number in range(len(failures)):
        scorer.submit(answers[number : number + 1])
        wait_until(lambda: len(function.failures) < len(failures) - number)  # noqa: B023
    if ends:
        wait_until(lambda: not scorer._thread.is_alive())
        with pytest.raises(UserError, match=r"^rewards\.mine: .* fails each time \(KeyError: 'c'\)"):
            scorer.submit([])
    else:
        wait_until(lambda: scorer.num_failed == sum(why is not None for why in failures))
        scorer.submit([])


def test_a_model_that_gives_some_scores_is_not_away(make_scorer, kept, answers):
    picky = Lengths(unsure=lambda response: len(response) % 2 == 1)
    scorer = make_scorer(max_outage_s=0.0, picky=picky)
    for start in range(0, 30, 10):
        scorer.submit(answers[start : start + 10])
        kept.wait_for(5 + start // 2)
    assert [episode.uid for episode in kept.episodes] == [f"e{n}" for n in range(0, 30, 2)]


def test_a_model_whose_scores_are_all_not_finite_is_away(make_scorer, answers):
    scorer = make_scorer(max_outage_s=0.0, lost=Lengths(unsure=lambda response: True))
    scorer.submit(answers[:3])
    wait_until(lambda: not scorer._thread.is_alive())
    with pytest.raises(UserError, match=r"^rewards\.lost: no score for 0 s \(some scores are not finite\)"):
        scorer.submit([])


def test_what_the_sink_raises_reaches_the_rollout_loop(make_scorer, answers):
    def full(episodes):
        raise OSError("gone")

    scorer = make_scorer(hand_over=full, length=Lengths())
    scorer.submit(answers[:1])
    wait_until(lambda: not scorer._thread.is_alive())
    with pytest.raises(OSError, match="gone"):
        scorer.submit([])


def test_a_closed_scorer_hands_nothing_over_any_more(make_scorer, kept, answers):
    slow = Lengths()
    slow.may.clear()
    scorer = make_scorer(slow=slow)
    scorer.submit(answers[:3])
    assert slow.began.wait(30)
    scorer.close(0.05)
    slow.may.set()
    scorer.close(30)
    assert not scorer._thread.is_alive()
    assert kept.episodes == []


def conversations(*lengths):
    return [Conversation("why", "x" * length) for length in lengths]


def test_callers_get_their_own_scores_and_are_scored_together():
    model = Lengths()
    model.may.clear()
    merged = MergedCalls(model, timeout_s=60)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(merged.score, conversations(1))
        assert model.began.wait(30)
        others = [threads.submit(merged.score, conversations(n, n + 1)) for n in range(10, 18)]
        wait_until(lambda: len(merged._waiting) == 8)
        model.may.set()
        assert first.result().tolist() == [1]
        assert [other.result().tolist() for other in others] == [[n, n + 1] for n in range(10, 18)]
    assert len(model.asked) == 2 and len(model.asked[1]) == 16


def test_what_one_caller_spoils_is_not_spoilt_for_the_others():
    model = Lengths(fails=lambda response: len(response) == 11)
    model.may.clear()
    merged = MergedCalls(model, timeout_s=60)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(merged.score, conversations(1))]
        assert model.began.wait(30)
        asked += [threads.submit(merged.score, conversations(n)) for n in (10, 11, 12)]
        wait_until(lambda: len(merged._waiting) == 3)
        model.may.set()
        assert [asked[n].result().tolist() for n in (0, 1, 3)] == [[1], [10], [12]]
        with pytest.raises(RuntimeError, match="no"):
            asked[2].result()


def test_a_caller_that_has_left_is_not_worked_for():
    model = Lengths()
    model.may.clear()
    merged = MergedCalls(model, timeout_s=0.2)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(merged.score, conversations(1))
        assert model.began.wait(30)
        second = threads.submit(merged.score, conversations(2))
        for call in (first, second):
            with pytest.raises(TimeoutError, match=r"no scores within 0\.2 s"):
                call.result()
    model.may.set()
    patient = MergedCalls(model, timeout_s=60)
    assert patient.score(conversations(3)).tolist() == [3]
    assert merged.score(conversations(4)).tolist() == [4]
    assert [len(each[0]) for each in model.asked if len(each) == 1] == [1, 3, 4]
