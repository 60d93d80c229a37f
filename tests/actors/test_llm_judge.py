"""A judge that compares, against a real HTTP server that plays an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mara.actors.llm_judge import EndpointUnavailable, LLMJudge, QuestionRefused, read_verdict
from mara.common.errors import UserError

Answer = Callable[[str], tuple[int, str]]


def judge(endpoint, **settings) -> LLMJudge:
    return LLMJudge(endpoint.url, "big", field="judges.big", **settings)


def prefers(good: str) -> Answer:
    """Says which place has ``good`` in it."""

    def answer(question: str) -> tuple[int, str]:
        return 200, "Because.\n[[A]]" if question.index(good) < question.index("[Answer B]") else "[[B]]"

    return answer


@pytest.mark.parametrize(
    ("good", "difference", "verdicts"), [("one", 1, ("A", "B")), ("two", -1, ("B", "A"))]
)
def test_a_win_is_one_in_both_orders(endpoint, good, difference, verdicts):
    endpoint.answer = prefers(f"answer {good}")
    found = judge(endpoint, api_key="key").compare("{first} why?", "answer one", "answer two {prompt}")
    assert (found.difference, found.verdicts) == (difference, verdicts)
    assert found.texts[verdicts.index("A")] == "Because.\n[[A]]"
    first, second = (request["messages"][-1]["content"] for request in endpoint.requests)
    # What stands in braces is text like any other.
    assert "{first} why?" in first and "answer two {prompt}" in first
    assert first.index("answer one") < first.index("answer two")
    assert second.index("answer two") < second.index("answer one")
    assert {request["path"] for request in endpoint.requests} == {"/v1/chat/completions"}
    assert {request["model"] for request in endpoint.requests} == {"big"}
    assert {request["temperature"] for request in endpoint.requests} == {0}
    assert endpoint.keys == ["Bearer key"] * 2


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [("[[A]]", ("A", "A")), ("I cannot say", ("unclear", "unclear")), ("[[TIE]]", ("tie", "tie"))],
)
def test_what_the_orders_disagree_on_or_leave_open_is_a_tie(endpoint, text, verdicts):
    endpoint.answer = lambda question: (200, text)
    found = judge(endpoint).compare("why?", "one", "two")
    assert (found.difference, found.verdicts, found.texts) == (0, verdicts, (text, text))


def test_half_a_character_at_the_end_of_a_verdict_can_be_written_down(endpoint):
    endpoint.answer = lambda question: (200, "[[A]] \ud83d")
    (text, _) = judge(endpoint).compare("why?", "one", "two").texts
    assert text.encode() == b"[[A]] ?"


def test_the_last_verdict_counts():
    assert read_verdict("[[A]] would be hasty: [[b]]") == "B"
    assert read_verdict("") == "unclear"


def test_a_busy_endpoint_is_asked_again_and_one_that_stays_away_is_told(endpoint):
    left = [503, 429]
    endpoint.answer = lambda question: (left.pop(), "busy") if left else (200, "[[A]]")
    waits: list[float] = []
    found = judge(endpoint).compare("why?", "one", "two", wait=waits.append)
    assert found.verdicts == ("A", "A") and waits == [1.0, 2.0]
    endpoint.answer = lambda question: (500, "broken")
    with pytest.raises(EndpointUnavailable, match=r"no verdict in 3 attempts \(status 500\)"):
        judge(endpoint, max_attempts=3).compare("why?", "one", "two", wait=waits.append)
    assert len(endpoint.requests) == 4 + 3


def test_an_endpoint_that_refuses_to_be_asked_is_not_asked_again(endpoint):
    endpoint.answer = lambda question: (404, "no model big")
    with pytest.raises(
        UserError, match=r"judges\.big: .* refuses to be asked \(status 404: 'no model big'\)"
    ):
        judge(endpoint).compare("why?", "one", "two")
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_is_not_asked_again_and_others_may_be(endpoint, status):
    endpoint.answer = lambda question: (status, "too\nlong") if "why" in question else (200, "[[A]]")
    with pytest.raises(QuestionRefused, match=rf"^status {status}: 'too\\nlong'$"):
        judge(endpoint).compare("why?", "one", "two")
    assert len(endpoint.requests) == 1
    assert judge(endpoint).compare("how?", "one", "two").verdicts == ("A", "A")


def test_what_is_no_such_endpoint_is_told(endpoint):
    endpoint.raw = b'{"error": 1}'
    with pytest.raises(UserError, match=r"judges\.big\.url: .* does not answer like an OpenAI-compatible"):
        judge(endpoint).compare("why?", "one", "two")


def test_the_check_finds_nobody_and_a_wrong_key(endpoint):
    judge(endpoint).check()
    endpoint.needs_key = True
    judge(endpoint, api_key="key").check()
    with pytest.raises(UserError, match=r"judges\.big: .* refuses the key \(401\).*judges\.big\.api_key_env"):
        judge(endpoint, api_key="other").check()
    endpoint.server.server_close()
    with pytest.raises(UserError, match=r"judges\.big\.url: nothing answers at http://127.*refused or lost"):
        LLMJudge("http://127.0.0.1:9/v1", "big", field="judges.big").check()
