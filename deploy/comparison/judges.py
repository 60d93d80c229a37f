"""Judges made from their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mara.actors.heads import RewardHead, head_digests, load_head, read_head_llm
from mara.actors.llm import LLM
from mara.actors.llm_judge import LLMJudge
from mara.actors.reading import Reading, read_responses
from mara.actors.reward_models.config import RewardModelConfig
from mara.actors.reward_models.http import HttpRefused, read_api_key
from mara.actors.reward_models.loading import load_reward_model
from mara.common.contracts import Conversation, RewardModel
from mara.common.errors import UserError
from mara.deploy.comparison.config import LIKELIHOOD, LLMJudgeConfig
from mara.deploy.config import RewardHeadConfig
from mara.deploy.preflight import warn_of_another_llm
from mara.deploy.reward_models import check_reward_model


def check_scoring_judge(
    name: str, config: RewardHeadConfig | RewardModelConfig, hidden_size: int, model: str
) -> dict[str, str]:
    """The judge can be read and fits the base LLM; SHA-256 of what it is made of, by name. Loads no LLM.

    Raises:
        UserError: it cannot, or does not.
    """
    if not isinstance(config, RewardHeadConfig):
        return check_reward_model(f"judges.{name}", config)
    field = f"judges.{name}.path"
    try:
        load_head(config.path, hidden_size)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    warn_of_another_llm(field, "fitted", read_head_llm(config.path), model)
    return head_digests(config.path)


class Judges:
    """The judges that score, each opened when it is first needed. What heads read is read once for all.

    Args:
        configs: by name.
        base: the base LLM, loaded when a judge first needs it.
        search_folder: where the module of a function may be, besides those installed.
    """

    def __init__(
        self,
        configs: Mapping[str, RewardHeadConfig | RewardModelConfig],
        base: Callable[[], LLM],
        search_folder: Path,
    ) -> None:
        self._configs, self._base, self._search_folder = configs, base, search_folder
        self._opened: dict[str, RewardHead | RewardModel] = {}
        self.refusal = ""
        """Who refused an answer last, and what the server said."""

    def judge(
        self, names: Sequence[str], said: Sequence[Conversation], others: Sequence[str | None] = ()
    ) -> list[dict[str, dict[str, Any]]]:
        """Of each response what every judge in ``names`` says, and how likely it is, as their files have it.

        ``others`` has for each another prompt, or None, after which its likelihood is looked at as well. Only
        the likelihood needs them. A response that a server refuses has the score None, and beside it what the
        server said.

        Raises:
            UserError: a number is not finite, or a judge gives none.
        """
        readings = read_responses(self._base(), said) if self._must_read(names) else []
        found: list[dict[str, dict[str, Any]]] = [{} for _ in said]
        for name in names:
            if name == LIKELIHOOD:
                for row, reading, elsewhere in zip(
                    found, readings, self._elsewhere(said, others), strict=True
                ):
                    row[name] = {
                        "num_tokens": reading.num_tokens,
                        "logprob": reading.logprob,
                        "logprob_elsewhere": elsewhere,
                    }
                continue
            for row, score in zip(found, self._scores(name, said, readings), strict=True):
                is_refused = isinstance(score, str)
                row[name] = {"score": None, "refused": score} if is_refused else {"score": score}
        return found

    def weighted(self, names: Sequence[str]) -> RewardModel:
        """The sum of the scores of ``names``, by their weights, as one reward model; -inf where one of them
        was refused."""
        return _Weighted(self, {name: self._configs[name].weight for name in names})

    def _elsewhere(
        self, said: Sequence[Conversation], others: Sequence[str | None]
    ) -> Iterator[float | None]:
        """Log-probability of each response after the other prompt; None where there is none."""
        moved = [
            Conversation(other, one.response)
            for one, other in zip(said, others, strict=True)
            if other is not None
        ]
        readings = iter(read_responses(self._base(), moved))
        return (None if other is None else next(readings).logprob for other in others)

    def _must_read(self, names: Sequence[str]) -> bool:
        return any(name == LIKELIHOOD or isinstance(self._open(name), RewardHead) for name in names)

    def _open(self, name: str) -> RewardHead | RewardModel:
        if name not in self._opened:
            config = self._configs[name]
            if isinstance(config, RewardHeadConfig):
                llm = self._base()
                self._opened[name] = load_head(config.path, llm.hidden_size).to(llm.device)
            else:
                self._opened[name] = load_reward_model(f"judges.{name}", config, self._search_folder)
        return self._opened[name]

    def _scores(
        self, name: str, said: Sequence[Conversation], readings: Sequence[Reading]
    ) -> Sequence[float | str]:
        """The score of each response, or what a server said that refused it."""
        judge = self._open(name)
        scores: Sequence[float | str]
        if isinstance(judge, RewardHead):
            scores = judge.score_states([reading.states_ND for reading in readings]).tolist()
        else:
            scores = self._asked(name, judge, said)
        if not all(isinstance(score, str) or math.isfinite(score) for score in scores):
            raise UserError(
                f"judges.{name}: a score is not finite; look at the judge, or try llm.dtype=float32"
            )
        return scores

    def _asked(self, name: str, judge: RewardModel, said: Sequence[Conversation]) -> Sequence[float | str]:
        try:
            scores: list[float | str] = judge.score(said).tolist()
            return scores
        except HttpRefused as refusal:
            if len(said) > 1:  # It may have taken the others.
                half = len(said) // 2
                return [*self._asked(name, judge, said[:half]), *self._asked(name, judge, said[half:])]
            self.refusal = f"judges.{name}: {refusal}"
            return [str(refusal)]
        except Exception as error:
            # A function or a server of the user's fails in ways of its own.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"judges.{name}: no scores ({reason}); look at that, then resume") from error


@dataclass(frozen=True, slots=True)
class _Weighted:
    judges: Judges
    weights: Mapping[str, float]

    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        rows = self.judges.judge(list(self.weights), conversations)
        return torch.tensor([self._sum(row) for row in rows])

    def _sum(self, row: Mapping[str, Mapping[str, Any]]) -> float:
        if any(row[name]["score"] is None for name in self.weights):
            return -math.inf
        return sum(weight * float(row[name]["score"]) for name, weight in self.weights.items())


def make_llm_judge(name: str, config: LLMJudgeConfig) -> LLMJudge:
    """The judge, with its key from the environment.

    Raises:
        UserError: the variable that should have the key is not set, or holds none.
    """
    field = f"judges.{name}"
    try:
        key = read_api_key(config.api_key_env)
    except UserError as error:
        raise UserError(f"{field}.{error}") from error
    return LLMJudge(
        url=config.url,
        model=config.model,
        api_key=key,
        instruction=config.instruction,
        timeout_s=config.timeout_s,
        max_attempts=config.max_attempts,
        max_tokens=config.max_tokens,
        field=field,
    )
