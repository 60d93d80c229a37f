"""Systems that answer prompts with one LLM, side by side: plain, steered by an agent, best of several.

All answers share the passes of one engine, each by the policy of its own system. An answer is handed over
when it is finished, so that it can be kept at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from mara.actors.config import DecodingConfig
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Generation, Request
from mara.actors.decoding.policies import AnyPolicy, goes_by_value, most_demanding
from mara.actors.decoding.prefill import common_prefix
from mara.actors.llm import LLM
from mara.common.agent import ACCEPT
from mara.common.contracts import Conversation, RewardModel
from mara.common.episode import FinishReason
from mara.common.errors import UserError
from mara.common.seeding import derive_seed


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that a system is to answer."""

    system: str
    id: str
    prompt: str
    """The user's words: what the answer is scored with."""
    asked: str | None = None
    """What the LLM is asked in place of ``prompt``: a corrector's template with another answer in it."""
    seconds_before: float = 0.0
    """What that other answer took."""
    another: str | None = None
    """Another prompt. How likely the answer is there shows how much it owes to its own."""


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """A finished answer."""

    question: Question
    response: str
    num_tokens: int
    """Of the response, with the end-of-sequence token if one was taken."""
    seconds: float
    """From the reading of the prompt to the end of the answer, in a batch with others; of several answers,
    of which this is the best, the sum, and the scoring."""
    finish_reason: FinishReason
    num_changed: int
    """Tokens that are not the LLM's first candidate, by an agent's decision; 0 where none decided."""
    score: float | None = None
    """By which it was the best; None where nothing was chosen, or none could be scored."""


@dataclass(frozen=True, slots=True)
class System:
    """How one system answers."""

    policy: AnyPolicy
    num_candidates: int = 1
    """Answers drawn to each prompt, of which the best is kept."""
    judge: RewardModel | None = None
    """Who says which is the best. Needed where several are drawn."""
    uses_chat_template: bool = True


class _Draft(NamedTuple):
    response: str
    generation: Generation
    num_changed: int


@dataclass(slots=True)
class Answerer:
    """Answers with one LLM. The engine is kept from one call to the next.

    Args:
        rows: answers decoded at the same time.
        seed: of everything that is sampled.
    """

    llm: LLM
    systems: Mapping[str, System]
    decoding: DecodingConfig
    rows: int
    max_prompt_tokens: int
    seed: int = 0
    _engine: Engine | None = field(default=None, init=False)

    def answer(
        self, questions: Sequence[Question], progress: Callable[[int], None] = lambda num_tokens: None
    ) -> Iterator[TimedAnswer]:
        """Every question's answer when it is finished, in no fixed order; the best of several at the end.

        ``progress`` gets the number of tokens of each finished generation.

        Raises:
            UserError: a prompt is too long, or the LLM or a judge gives a number that is not finite.
        """
        requests = list(self._requests(questions))
        drafts: dict[Question, dict[int, _Draft]] = {}
        for generation in self._engine_for(requests).generate(requests):
            question: Question
            question, number = generation.request.tag
            _check_finite(generation, question)
            progress(len(generation.response_ids))
            num_changed = sum(made.action == ACCEPT and made.rank > 0 for made in generation.decisions)
            draft = _Draft(self.llm.decode(generation.response_ids), generation, num_changed)
            generation.token_states.clear()
            generation.decisions.clear()
            if self.systems[question.system].num_candidates == 1:
                yield _timed(question, draft)
            else:
                drafts.setdefault(question, {})[number] = draft
        # In the order they were drawn, not that in which they ended: of equals the first is taken.
        in_order = {asked: [of[number] for number in sorted(of)] for asked, of in drafts.items()}
        yield from self._best(in_order)

    def _requests(self, questions: Sequence[Question]) -> Iterator[Request]:
        """Longest first: the batch then empties evenly, and its prefills are of like length. Those by value
        before all others: a pass is as wide as its widest row."""
        rendered: dict[tuple[str, bool], list[int]] = {}
        for question in questions:
            text, in_chat = self._text_of(question)
            if (text, in_chat) not in rendered:
                rendered[text, in_chat] = self._render(question, text, in_chat)

        def turn(question: Question) -> tuple[bool, int]:
            by_value = goes_by_value(self.systems[question.system].policy)
            return not by_value, -len(rendered[self._text_of(question)])

        for question in sorted(questions, key=turn):
            system = self.systems[question.system]
            for number in range(system.num_candidates):
                several = (question.system, number) if system.num_candidates > 1 else ()
                seed = derive_seed(self.seed, "answer", question.id, *several)
                ids = rendered[self._text_of(question)]
                yield Request(ids, seed, tag=(question, number), policy=system.policy)

    def _text_of(self, question: Question) -> tuple[str, bool]:
        text = question.prompt if question.asked is None else question.asked
        return text, self.systems[question.system].uses_chat_template

    def _render(self, question: Question, text: str, in_chat: bool) -> list[int]:
        ids = self.llm.render(text) if in_chat else list(self.llm.tokenizer(text)["input_ids"])
        if len(ids) > self.max_prompt_tokens:
            raise UserError(
                f"datasets: prompt {question.id!r} has {len(ids)} tokens with its template for "
                f"systems.{question.system}, max_prompt_tokens is {self.max_prompt_tokens}; shorten it or "
                "raise the limit"
            )
        return ids

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """The engine there is, or one with room for longer prompts."""
        longest = max(len(request.prompt_ids) for request in requests)
        if self._engine is None or self._engine.max_prompt_tokens < longest:
            self._engine = None  # Its cache goes before the next one comes.
            self._engine = Engine(
                self.llm.model,
                self.llm.eos_ids,
                self.decoding,
                most_demanding(system.policy for system in self.systems.values()),
                self.rows,
                longest,
                common_prefix([request.prompt_ids for request in requests]),
            )
        return self._engine

    def _best(self, drafts: Mapping[Question, Sequence[_Draft]]) -> Iterator[TimedAnswer]:
        """Of several answers to a question the one with the highest score; the first drawn of equals.

        One that could not be scored (-inf) is taken only where none could be.
        """
        for name in {question.system for question in drafts}:
            system = self.systems[name]
            asked = [question for question in drafts if question.system == name]
            said = [Conversation(q.prompt, draft.response) for q in asked for draft in drafts[q]]
            assert system.judge is not None
            started_s = time.monotonic()
            total_N = system.judge.score(said)
            scoring_s = (time.monotonic() - started_s) / max(1, len(asked))
            if (total_N.isnan() | (total_N == torch.inf)).any():
                raise UserError(
                    f"systems.{name}.judges: a score is not finite; look at the judges, or "
                    "try llm.dtype=float32"
                )
            for question, total_n in zip(asked, total_N.view(len(asked), -1), strict=True):
                best = int(total_n.argmax())
                # Each took a row of the batch: so many times what one answer takes.
                decoding_s = sum(map(_decoding_s, drafts[question]))
                score = float(total_n[best]) if total_n[best].isfinite() else None
                yield _timed(question, drafts[question][best], decoding_s + scoring_s, score=score)


def _decoding_s(draft: _Draft) -> float:
    return draft.generation.finished_at_s - draft.generation.started_at_s


def _timed(
    question: Question, draft: _Draft, seconds: float | None = None, score: float | None = None
) -> TimedAnswer:
    generation = draft.generation
    if seconds is None:
        seconds = _decoding_s(draft)
    return TimedAnswer(
        question=question,
        response=draft.response,
        num_tokens=len(generation.response_ids),
        seconds=seconds + question.seconds_before,
        finish_reason=generation.finish_reason,
        num_changed=draft.num_changed,
        score=score,
    )


def _check_finite(generation: Generation, question: Question) -> None:
    if not np.isfinite(generation.token_logprobs).all():
        raise UserError(
            f"systems.{question.system}: the probabilities of the answer to prompt {question.id!r} are not "
            "finite; try llm.dtype=float32"
        )
