"""What a comparison still has to do, in chunks: everything that its files do not have yet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from mara.actors.answering import Question
from mara.actors.prompts import Prompt
from mara.deploy.comparison.config import (
    LIKELIHOOD,
    ComparisonConfig,
    CorrectorSystem,
    ResponsesSystem,
    fill_template,
)
from mara.deploy.comparison.host import Model, Work
from mara.deploy.comparison.results import Results, Row
from mara.deploy.comparison.verdicts import Pair

SCORES_A_PROMPT = 4
"""Answers that are scored in the time of one that is made, more or less."""

Item = TypeVar("Item")
Prompts = Mapping[str, Sequence[Prompt]]


class Planner:
    """Finds what is missing. Each chunk gets a number of its own."""

    def __init__(self, config: ComparisonConfig, prompts: Prompts, results: Results) -> None:
        self._config, self._prompts, self._results = config, prompts, results
        self._numbers = itertools.count()

    @property
    def num_answers(self) -> int:
        """Answers in all, those that somebody else made included."""
        return len(self._config.systems) * sum(map(len, self._prompts.values()))

    def count_answers(self) -> int:
        """Answers that there are."""
        return sum(len(self._results.answers(d, s)) for d in self._prompts for s in self._config.systems)

    def answers(self, wave: Sequence[str]) -> list[Work]:
        """Chunks of prompts that systems of a wave have not answered; all systems of an LLM together."""
        config = self._config
        groups: dict[Model, list[str]] = {}
        for name in wave:
            if not isinstance(config.systems[name], ResponsesSystem):
                groups.setdefault(Model(*config.llm_of(name)), []).append(name)
        return [
            Work(next(self._numbers), model, dataset, tuple(itertools.chain.from_iterable(chunk)))
            for model, names in groups.items()
            for dataset in self._prompts
            for chunk in self._chunks(list(self._unanswered(dataset, names)), config.prompts_per_chunk)
        ]

    def scores(self) -> list[Work]:
        """Chunks of answers that a judge has not scored, or whose likelihood is not known."""
        config = self._config
        return [
            Work(
                next(self._numbers),
                Model(config.llm),
                dataset,
                tuple(question for question, _ in chunk),
                tuple(response for _, response in chunk),
                judges,
            )
            for dataset in self._prompts
            for judges, unscored in self._unscored(dataset).items()
            for chunk in self._chunks(unscored, SCORES_A_PROMPT * config.prompts_per_chunk)
        ]

    def pairs(self, judge: str) -> Iterator[tuple[Pair, Row | None]]:
        """Pairs of answers, and what a judge has said of them; None where it was not asked."""
        for dataset, prompts in self._prompts.items():
            for system, against in self._config.compared:
                known = self._results.verdicts(dataset, system, against, judge)
                first = self._results.answers(dataset, system)
                second = self._results.answers(dataset, against)
                for prompt in prompts:
                    answers = first[prompt.id]["response"], second[prompt.id]["response"]
                    pair = Pair(dataset, system, against, prompt.id, prompt.prompt, *answers)
                    yield pair, known.get(prompt.id)

    def has_scored(self, judge: str) -> bool:
        """Whether a judge has scored any answer."""
        return any(
            row["score"] is not None
            for dataset in self._prompts
            for system in self._config.systems
            for row in self._results.scores(dataset, system, judge).values()
        )

    def has_chosen(self, system: str) -> bool:
        """Whether a system that chooses by scores has an answer that it chose by one."""
        return any(
            "score" in row
            for dataset in self._prompts
            for row in self._results.answers(dataset, system).values()
        )

    def _unanswered(self, dataset: str, names: Sequence[str]) -> Iterator[list[Question]]:
        """Of each prompt the questions to the systems without an answer; long prompts first.

        The first chunk then shows how long prompts become, and the last ones are short.
        """
        known = {name: self._results.answers(dataset, name) for name in names}
        drafts = {
            name: self._results.answers(dataset, system.of)
            for name in names
            if isinstance(system := self._config.systems[name], CorrectorSystem)
        }
        for prompt in sorted(self._prompts[dataset], key=lambda prompt: -len(prompt.prompt)):
            questions = []
            for name in names:
                if prompt.id in known[name]:
                    continue
                system = self._config.systems[name]
                if isinstance(system, CorrectorSystem):
                    draft = drafts[name][prompt.id]
                    asked = fill_template(system.template, prompt.prompt, draft["response"])
                    before_s = draft["seconds"] or 0.0
                    questions.append(Question(name, prompt.id, prompt.prompt, asked, before_s))
                else:
                    questions.append(Question(name, prompt.id, prompt.prompt))
            if questions:
                yield questions

    def _unscored(self, dataset: str) -> dict[tuple[str, ...], list[tuple[Question, str]]]:
        """Answers by who has not scored them. Those to one prompt stand together: it is read once."""
        config = self._config
        judges = (LIKELIHOOD, *config.scoring_judges)
        known = {
            (name, judge): self._results.scores(dataset, name, judge)
            for name in config.systems
            for judge in judges
        }
        answers = {name: self._results.answers(dataset, name) for name in config.systems}
        found: dict[tuple[str, ...], list[tuple[Question, str]]] = {}
        prompts = self._prompts[dataset]
        for number, prompt in enumerate(prompts):
            # The next one's: the same for all systems, and however the work is divided.
            another = prompts[(number + 1) % len(prompts)].prompt if len(prompts) > 1 else None
            for name in config.systems:
                missing = tuple(judge for judge in judges if prompt.id not in known[name, judge])
                if missing:
                    question = Question(name, prompt.id, prompt.prompt, another=another)
                    found.setdefault(missing, []).append((question, answers[name][prompt.id]["response"]))
        return found

    def _chunks(self, items: Sequence[Item], size: int) -> Iterable[Sequence[Item]]:
        """Of at most ``size``, and small enough for every actor to get one."""
        size = max(1, min(size, math.ceil(len(items) / self._config.num_actors)))
        return (items[start : start + size] for start in range(0, len(items), size))
