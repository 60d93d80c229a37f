"""What an answer of RLHF is paid: what an agent's would be.

Legend: B answers, N tokens of one, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mara.actors.answer_states import read_answers
from mara.actors.heads import RewardHead
from mara.actors.llm import LLM


class SampledTokens(NamedTuple):
    """What has been scored, tokens."""

    prompts: int = 0
    """The prompt of every answer."""
    answers: int = 0
    """With their end-of-sequence tokens."""
    scored_prompts: int = 0
    """Prompts that were read for it, once for all answers to them in a call."""


class Scorer:
    """The weighted sum of the heads' scores (Eq. 13), from the states that the plain LLM has at the tokens.

    Args:
        reader: the plain LLM.
        heads: on its device.
        weights: of each head.
    """

    def __init__(self, reader: LLM, heads: Mapping[str, RewardHead], weights: Mapping[str, float]) -> None:
        self._reader, self._heads, self._weights = reader, heads, weights
        self.tokens = SampledTokens()

    def score(
        self,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        """The reward of each answer, as TRL's trainers ask for it; ``log_metric`` gets the mean of each head.

        An end-of-sequence token is no part of the text, as in rollouts.
        """
        llm = self._reader
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        rendered = {prompt: llm.render(prompt) for prompt in rows}
        words = [list(ids[:-1]) if ids[-1] in llm.eos_ids else list(ids) for ids in completion_ids]
        filled = {prompt: [row for row in rows[prompt] if words[row]] for prompt in rows}
        groups = [(rendered[prompt], [words[row] for row in filled[prompt]]) for prompt in rows]
        states = [torch.empty(0, llm.hidden_size)] * len(prompts)
        for prompt, answers in zip(rows, read_answers(llm, groups), strict=True):
            for row, answer in zip(filled[prompt], answers, strict=True):
                states[row] = answer.states_ND
        rewards_B = torch.zeros(len(prompts))
        for name, head in self._heads.items():
            scores_B = head.score_states(states)
            log_metric(f"score/{name}", float(scores_B.mean()))
            rewards_B += self._weights[name] * scores_B
        before = self.tokens
        self.tokens = SampledTokens(
            before.prompts + sum(len(rendered[prompt]) for prompt in prompts),
            before.answers + sum(len(ids) for ids in completion_ids),
            before.scored_prompts + sum(len(ids) for ids in rendered.values()),
        )
        return rewards_B.tolist()
