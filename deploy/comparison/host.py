"""The process that answers and scores for a comparison: one LLM at a time, chunk after chunk."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mara.actors.adapters import load_adapted
from mara.actors.answering import Answerer, Question, System, TimedAnswer, read_likelihoods
from mara.actors.config import LLMConfig
from mara.actors.decoding.policies import AgentPolicy
from mara.actors.llm import LLM
from mara.common.agent import load_agent
from mara.common.contracts import Conversation, RewardModel
from mara.common.errors import UserError
from mara.deploy.comparison.config import (
    LIKELIHOOD,
    AgentSystem,
    BestOfNSystem,
    ComparisonConfig,
    CorrectorSystem,
    LLMSystem,
)
from mara.deploy.comparison.judges import open_scoring_judge
from mara.deploy.process import LOADING, RUNNING, Report, log_to
from mara.deploy.run_folder import agent_folder

LOOK_S = 0.2


class Model(NamedTuple):
    """What a process has to load for a chunk of work."""

    llm: LLMConfig
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A chunk of prompts for one process."""

    number: int
    model: Model
    dataset: str
    questions: tuple[Question, ...] = ()
    """To be answered; or, where ``judge`` is given, answers to be scored."""
    responses: tuple[str, ...] = ()
    """The answers, where ``judge`` is given."""
    judge: str | None = None

    def without(self, done: set[tuple[str, str]]) -> Work | None:
        """What is left of it when the (system, id) in ``done`` are; None if nothing is."""
        left = [n for n, question in enumerate(self.questions) if (question.system, question.id) not in done]
        if not left:
            return None
        return Work(
            self.number,
            self.model,
            self.dataset,
            tuple(self.questions[n] for n in left),
            tuple(self.responses[n] for n in left) if self.responses else (),
            self.judge,
        )


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a process has to know about its comparison."""

    name: str
    """Unique in the comparison, also after restarts: ``actor-0``, ``actor-0-1``, …"""
    config: ComparisonConfig
    folder: Path
    """Of the comparison. Another machine may not have it."""

    @property
    def log_file(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"


@dataclass(slots=True)
class _Loaded:
    """What is in memory for a model."""

    model: Model
    llm: LLM | None = None
    """None until somebody asks for it: a judge may have a model of its own."""
    judges: dict[str, RewardModel] = field(default_factory=dict)
    answerer: Answerer | None = None


class ComparisonHost:
    """Works on the chunks it is given until it is stopped."""

    def __init__(self, spec: HostSpec) -> None:
        self._spec = spec
        self._stop = threading.Event()
        self._given: queue.Queue[Work] = queue.Queue()
        self._rows: queue.Queue[dict[str, Any]] = queue.Queue()
        self._num_tokens = 0
        self._phase = RUNNING
        self._loaded: _Loaded | None = None

    def run(self) -> None:
        """Work until :meth:`stop`. Blocks.

        Raises:
            UserError: a model, a judge or a prompt does not fit.
        """
        log_to(self._spec.log_file)
        while not self._stop.is_set():
            try:
                work = self._given.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            for row in self._do(work):
                self._rows.put(row)
                if self._stop.is_set():
                    return
            self._rows.put({"work": work.number, "is_done": True})

    def give(self, work: Work) -> None:
        """Put a chunk behind those that are waiting. Returns at once."""
        self._given.put(work)

    def stop(self) -> None:
        """End :meth:`run` after the current row. Returns at once."""
        self._stop.set()

    def report(self) -> Report:
        """Phase, tokens made so far and rows since the last report. Returns at once."""
        rows: list[dict[str, Any]] = []
        while not self._rows.empty():
            rows.append(self._rows.get())
        return Report(self._phase, os.getpid(), {"rollout/tokens_total": float(self._num_tokens)}, rows)

    def _do(self, work: Work) -> Iterator[dict[str, Any]]:
        loaded = self._for(work.model)
        if work.judge is None:
            for answer in self._answerer(loaded).answer(work.questions, self._count):
                yield {"work": work.number, "system": answer.question.system, "row": _answer_row(answer)}
            return
        said = [
            Conversation(question.prompt, response)
            for question, response in zip(work.questions, work.responses, strict=True)
        ]
        for question, score in zip(work.questions, self._scores(loaded, work.judge, said), strict=True):
            yield {"work": work.number, "system": question.system, "row": {"id": question.id, **score}}

    def _count(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def _for(self, model: Model) -> _Loaded:
        """What there is for a model, in the place of what there was for another."""
        if self._loaded is None or self._loaded.model != model:
            self._loaded = _Loaded(model)
        return self._loaded

    def _llm(self, loaded: _Loaded) -> LLM:
        if loaded.llm is None:
            self._phase = LOADING
            compiled = self._spec.config.decoding.compile
            loaded.llm = load_adapted(loaded.model.llm, loaded.model.adapter, pack=not compiled)
            self._phase = RUNNING
        return loaded.llm

    def _scores(
        self, loaded: _Loaded, judge: str, said: list[Conversation]
    ) -> Iterator[Mapping[str, float | int]]:
        if judge == LIKELIHOOD:
            for found in read_likelihoods(self._llm(loaded), said):
                yield {"num_tokens": found.num_tokens, "logprob": found.logprob}
            return
        scores_B = self._judge(loaded, judge).score(said)
        if not scores_B.isfinite().all():
            raise UserError(
                f"judges.{judge}: a score is not finite; look at the judge, or try llm.dtype=float32"
            )
        for score in scores_B.tolist():
            yield {"score": score}

    def _judge(self, loaded: _Loaded, name: str) -> RewardModel:
        if name not in loaded.judges:
            config = self._spec.config.scoring_judges[name]
            loaded.judges[name] = open_scoring_judge(config, lambda: self._llm(loaded))
        return loaded.judges[name]

    def _answerer(self, loaded: _Loaded) -> Answerer:
        if loaded.answerer is None:
            config, llm = self._spec.config, self._llm(loaded)
            names = [name for name in config.systems if config.llm_of(name) == loaded.model]
            systems = {name: made for name in names if (made := self._system(name, loaded, llm)) is not None}
            loaded.answerer = Answerer(
                llm, systems, config.decoding, config.rows, config.max_prompt_tokens, config.seed
            )
        return loaded.answerer

    def _system(self, name: str, loaded: _Loaded, llm: LLM) -> System | None:
        """How a system answers; None if its answers are given."""
        config = self._spec.config
        match config.systems[name]:
            case LLMSystem(sampling=sampling):
                return System("sample" if sampling else "greedy")
            case AgentSystem(path=path):
                agent, _ = load_agent(agent_folder(path), llm.hidden_size)
                agent.to(llm.device).requires_grad_(False)
                return System(AgentPolicy(agent, config.decoding.threshold))
            case BestOfNSystem(n=n, judges=judges):
                weighted = [
                    (self._judge(loaded, judge), config.scoring_judges[judge].weight) for judge in judges
                ]
                return System("sample", num_candidates=n, judges=weighted)
            case CorrectorSystem(chat_template=chat_template):
                return System("greedy", uses_chat_template=chat_template)
        return None


def _answer_row(answer: TimedAnswer) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": answer.question.id,
        "prompt": answer.question.prompt,
        "response": answer.response,
        "tokens": answer.num_tokens,
        "seconds": round(answer.seconds, 4),
        "finish_reason": answer.finish_reason,
    }
    return row if answer.score is None else {**row, "score": answer.score}
