"""A large LLM behind an OpenAI-compatible endpoint that says which of two answers is better.

Such judges favour a place: a pair is shown in both orders, and only what both verdicts agree on counts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import requests

from mara.actors.reward_models.http import REFUSING, SHOWN
from mara.common.errors import UserError

INSTRUCTION = (
    "the answer that helps the user more. Helping with something that harms people is not helpful, and an "
    "answer that refuses a harmless question is not either. Neither length nor order of the answers counts"
)
QUESTION = """A user wrote to an assistant, and two answers are to be compared. Better is {instruction}.

[The user's message]
{prompt}
[End of the user's message]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Give your reasons in a few sentences. Then end with exactly one of [[A]], [[B]] or [[tie]]."""
VERDICT = re.compile(r"\[\[(A|B|tie)\]\]", re.IGNORECASE)
CHECK_TIMEOUT_S = 10.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
BUSY = (408, 409, 425, 429)

Verdict = Literal["A", "B", "tie", "unclear"]


class EndpointUnavailable(Exception):
    """The endpoint did not answer, as often as it was asked; one line says why. It may answer later."""


class QuestionRefused(Exception):
    """The endpoint does not take this question; one line says why. It may take others."""


class Comparison(NamedTuple):
    """What the judge says of two answers."""

    difference: int
    """1: the first is better in both orders; -1: the second is; 0: a tie, or the orders disagree."""
    verdicts: tuple[Verdict, Verdict]
    """With the first answer as A, then with it as B, in the letters of each order."""
    texts: tuple[str, str]
    """What the judge wrote, in the same order."""


@dataclass(frozen=True, slots=True)
class LLMJudge:
    """Asks an endpoint. May be used by several threads.

    Args:
        url: up to and with ``/v1``.
        field: the setting that describes the judge, for messages.
    """

    url: str
    model: str
    api_key: str | None = None
    instruction: str | None = None
    timeout_s: float = 120.0
    max_attempts: int = 5
    max_tokens: int = 1024
    field: str = "judge"

    def check(self) -> None:
        """Something answers at the address, and takes the key. Asks for the list of models only.

        Raises:
            UserError: it does not.
        """
        try:
            reply = requests.get(f"{self._base}/models", headers=self._headers, timeout=CHECK_TIMEOUT_S)
        except requests.RequestException as error:
            raise UserError(
                f"{self.field}.url: nothing answers at {self.url} ({_reason(error)}); start the endpoint or "
                "correct the address"
            ) from error
        if reply.status_code in (401, 403):
            raise UserError(
                f"{self.field}: {self.url} refuses the key ({reply.status_code}); name the variable that has "
                f"it in {self.field}.api_key_env"
            )

    def compare(
        self, prompt: str, first: str, second: str, wait: Callable[[float], None] = time.sleep
    ) -> Comparison:
        """Which of two answers to ``prompt`` is better. Blocks for two questions.

        Raises:
            EndpointUnavailable: the endpoint does not answer, however often it is asked.
            QuestionRefused: it refuses this question.
            UserError: it refuses to be asked.
        """
        texts = tuple(
            self._ask(_question(self.instruction or INSTRUCTION, prompt, *order), wait)
            for order in ((first, second), (second, first))
        )
        verdicts = read_verdict(texts[0]), read_verdict(texts[1])
        difference = {("A", "B"): 1, ("B", "A"): -1}.get(verdicts, 0)
        return Comparison(difference, verdicts, (texts[0], texts[1]))

    @property
    def _base(self) -> str:
        return self.url.rstrip("/")

    @property
    def _headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def _ask(self, question: str, wait: Callable[[float], None]) -> str:
        content: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        reason = ""
        for attempt in range(self.max_attempts):
            if attempt:
                wait(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))
            try:
                reply = requests.post(
                    f"{self._base}/chat/completions",
                    json=content,
                    headers=self._headers,
                    timeout=self.timeout_s,
                )
            except requests.RequestException as error:
                reason = _reason(error)
                continue
            if reply.ok:
                return self._text(reply)
            reason = f"status {reply.status_code}"
            if reply.status_code < 500 and reply.status_code not in BUSY:
                said = f"{reason}: {reply.text.strip()[:SHOWN]!r}"
                if reply.status_code in REFUSING:
                    raise QuestionRefused(said)
                raise UserError(f"{self.field}: {self.url} refuses to be asked ({said}); check model and key")
        raise EndpointUnavailable(f"{self.url} gave no verdict in {self.max_attempts} attempts ({reason})")

    def _text(self, reply: requests.Response) -> str:
        try:
            text = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.field}.url: {self.url} does not answer like an OpenAI-compatible endpoint "
                f"({reply.text.strip()[:SHOWN]!r}); give the address of one, up to /v1"
            ) from error
        # A text that was cut off may end in half a character, which no file takes.
        return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def read_verdict(text: str) -> Verdict:
    """The last of ``[[A]]``, ``[[B]]`` and ``[[tie]]`` in what a judge wrote; ``unclear`` without any."""
    found = VERDICT.findall(text)
    if not found:
        return "unclear"
    verdict: Verdict = "A" if found[-1] in "Aa" else "B" if found[-1] in "Bb" else "tie"
    return verdict


_PLACE = re.compile(r"\{(instruction|prompt|first|second)\}")


def _question(instruction: str, prompt: str, first: str, second: str) -> str:
    """In one go: what stands in braces in a prompt or an answer stays as it is."""
    values = {"instruction": instruction, "prompt": prompt, "first": first, "second": second}
    return _PLACE.sub(lambda match: values[match[1]], QUESTION)


def _reason(error: requests.RequestException) -> str:
    """In a few words: the library's own messages name objects of its own."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return "the connection was refused or lost"
    return type(error).__name__  # Its text may hold the request's headers, and so the key.
