"""The process that answers and scores for a comparison: one LLM at a time, chunk after chunk."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mara.actors.adapters import load_adapted
from mara.actors.answering import Answerer, Question, System, TimedAnswer
from mara.actors.config import LLMConfig
from mara.actors.decoding.policies import critic_used_in, steered_by
from mara.actors.llm import LLM
from mara.common.agent import load_agent
from mara.common.contracts import Conversation
from mara.deploy.comparison.config import (
    AgentSystem,
    BestOfNSystem,
    ComparisonConfig,
    CorrectorSystem,
    LLMSystem,
)
from mara.deploy.comparison.judges import Judges
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
    """To be answered; or, where ``judges`` are given, answered."""
    responses: tuple[str, ...] = ()
    """The answers, where ``judges`` are given."""
    judges: tuple[str, ...] = ()
    """Who score the answers; the likelihood counts as one."""

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
            self.judges,
        )


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a process has to know about its comparison."""

    name: str
    """Unique in the comparison, also after restarts: ``actor-0``, ``actor-0-1``, …"""
    config: ComparisonConfig
    folder: Path
    """Of the comparison. Another machine may not have it."""
    search_folder: Path
    """Where the module of a judge that is a function may be."""

    @property
    def log_file(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"


@dataclass(slots=True)
class _Loaded:
    """What is in memory for a model."""

    model: Model
    llm: LLM | None = None
    """None until somebody asks for it: a judge may have a model of its own."""
    judges: Judges | None = None
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
        if not work.judges:
            for answer in self._answerer(loaded).answer(work.questions, self._count):
                row = {"work": work.number, "system": answer.question.system, "row": _answer_row(answer)}
                if self._was_refused(answer):
                    row["refused"] = self._judges(loaded).refusal
                yield row
            return
        said = [
            Conversation(question.prompt, response)
            for question, response in zip(work.questions, work.responses, strict=True)
        ]
        found = self._judges(loaded).judge(
            work.judges, said, [question.another for question in work.questions]
        )
        for question, scores in zip(work.questions, found, strict=True):
            yield {
                "work": work.number,
                "system": question.system,
                "row": {"id": question.id, "scores": scores},
            }

    def _was_refused(self, answer: TimedAnswer) -> bool:
        """It was to be chosen by a score, and none of its prompt has one."""
        system = self._spec.config.systems[answer.question.system]
        return isinstance(system, BestOfNSystem) and system.n > 1 and answer.score is None

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

    def _judges(self, loaded: _Loaded) -> Judges:
        if loaded.judges is None:
            loaded.judges = Judges(
                self._spec.config.scoring_judges, lambda: self._llm(loaded), self._spec.search_folder
            )
        return loaded.judges

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
            case AgentSystem() as system:
                folder, decoding = agent_folder(system.path), system.used_in(config.decoding)
                agent, _ = load_agent(folder, llm.hidden_size)
                agent.to(llm.device).requires_grad_(False)
                critic = critic_used_in(decoding, folder, llm.hidden_size)
                return System(steered_by(agent, decoding, None if critic is None else critic.to(llm.device)))
            case BestOfNSystem(n=n, judges=judges):
                return System("sample", n, self._judges(loaded).weighted(judges))
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
        "changed": answer.num_changed,
    }
    return row if answer.score is None else {**row, "score": answer.score}
