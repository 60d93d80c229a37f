"""How does an agent keep its gain while it steps in less often? Answers of each way to use it, compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mara.actors.config import DecodingConfig, GateConfig
from mara.actors.decoding.policies import AnyPolicy, steered_by
from mara.actors.evaluation import (
    PreferenceRate,
    Progress,
    ScoredAnswer,
    answer_prompts,
    interventions,
    preference_rate,
    score_texts,
)
from mara.actors.heads import RewardHead
from mara.actors.llm import LLM
from mara.actors.prompts import Prompt
from mara.common.agent import Agent
from mara.common.contracts import RewardModel
from mara.common.critic import TwinCritic

GATES = tuple(
    GateConfig(max_first_probability=probability, min_confidence=confidence, min_salience=salience)
    for probability, confidence, salience in [
        *itertools.product((0.8, 0.6, 0.45), (0.0, 0.8, 0.9), (0.0,)),
        *itertools.product((1.0,), (0.8, 0.9, 0.95), (0.0, 0.2, 0.3)),
    ]
)
"""Gates that are tried on an agent without a critic."""
ADVANTAGES = (0.03, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.27, 0.33, 0.4, 0.6)
"""Values of ``decoding.min_advantage`` that are tried on an agent with its critic."""


@dataclass(frozen=True, slots=True)
class GateOutcome:
    """What an agent does when it is used in one way."""

    decoding: DecodingConfig
    joint: PreferenceRate
    """Against the greedy LLM (Eq. 12)."""
    gain: float
    """Mean over prompts and reward models of what the answers' scores exceed those of the greedy LLM by, in
    standard deviations of the LLM's scores; each reward model counts by the size of its weight. Less noisy
    than a rate of so few prompts."""
    gain_error: float
    """Half of the width of its 95 % interval over prompts; 0 for a single prompt."""
    interventions: float
    """Tokens that are not the LLM's first candidate, over all tokens."""
    perplexity: float
    """Of the answers under the plain LLM."""


def ways_to_try(decoding: DecodingConfig, *, has_critic: bool) -> list[DecodingConfig]:
    """The paper's way first, where the agent decides everywhere; then ``decoding`` itself, if it is none of
    the rest; then by value with each of ``ADVANTAGES``, or without a critic behind each of ``GATES``. Else
    all are as ``decoding``."""
    dense = decoding.model_copy(update={"steering": "policy", "gate": GateConfig()})
    changes: list[dict[str, Any]] = [{"gate": gate} for gate in GATES]
    if has_critic:
        changes = [{"steering": "value", "min_advantage": advantage} for advantage in ADVANTAGES]
    ways = [dense, *(dense.model_copy(update=change) for change in changes)]
    if decoding.how not in [way.how for way in ways] and (has_critic or decoding.steering == "policy"):
        ways.insert(1, decoding)
    return ways


def try_ways(
    llm: LLM,
    agent: Agent,
    critic: TwinCritic | None,
    ways: Sequence[DecodingConfig],
    prompts: Sequence[Prompt],
    heads: Mapping[str, RewardHead],
    weights: Mapping[str, float],
    rows: int,
    max_prompt_tokens: int,
    progress: Progress = lambda done, total: None,
    models: Mapping[str, Callable[[], RewardModel]] = MappingProxyType({}),
) -> list[GateOutcome]:
    """What the agent does in each of the ``ways`` to use it, in that order.

    Args:
        critic: the agent's; needed for those by value.
        ways: they differ in steering, gate, threshold and advantage alone.
        weights: of each reward model; those with weight 0 are not looked at.
        models: loads each of the reward models that are no heads.

    Raises:
        UserError: a prompt is too long, or a reward or the LLM gives a number that is not finite.
    """
    systems: dict[str, AnyPolicy] = {"base": "greedy"}
    tried = {f"way {number}": way for number, way in enumerate(ways)}
    systems |= {name: steered_by(agent.eval(), way, critic) for name, way in tried.items()}
    answers = answer_prompts(
        llm, prompts, ways[0], systems, rows, max_prompt_tokens, progress=progress, heads=heads
    )
    for name, load in models.items():
        score_texts(name, load(), llm, prompts, answers)
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    return [_outcome(way, answers[name], answers["base"], counted) for name, way in tried.items()]


def choose_gate(outcomes: Sequence[GateOutcome], max_interventions: float) -> GateOutcome | None:
    """The one with the largest gain among those :func:`within`; None if there is none."""
    return max(within(outcomes, max_interventions), key=lambda outcome: outcome.gain, default=None)


def within(outcomes: Sequence[GateOutcome], max_interventions: float) -> list[GateOutcome]:
    """Those that intervene at most ``max_interventions`` times as often as the first of ``outcomes``, where
    the agent decides everywhere; all if that never intervenes."""
    limit = max_interventions * outcomes[0].interventions if outcomes[0].interventions else np.inf
    # A share that is the limit must not be beyond it by rounding.
    return [outcome for outcome in outcomes if outcome.interventions <= limit * (1 + 1e-9)]


def is_proved(outcome: GateOutcome) -> bool:
    """Whether the interval of the gain is above 0.

    It is that of one way. The best of many that do nothing passes more often than 2.5 %: with 18 gates,
    which are alike, in some 10 to 20 %. So it keeps noise of few prompts away; it is no proof of a gain.
    """
    return outcome.gain > outcome.gain_error > 0


def _outcome(
    decoding: DecodingConfig,
    answers: Sequence[ScoredAnswer],
    base: Sequence[ScoredAnswer],
    weights: Mapping[str, float],
) -> GateOutcome:
    # Batches of other shapes round differently: the same tokens must not win or lose by that.
    differs_N = np.array([a.response_ids != b.response_ids for a, b in zip(answers, base, strict=True)])
    differences: list[np.ndarray] = []
    gain_N = np.zeros(len(answers))
    for name, weight in weights.items():
        base_N = np.array([answer.scores[name] for answer in base])
        difference_N = (np.array([answer.scores[name] for answer in answers]) - base_N) * differs_N
        differences.append(np.sign(weight) * difference_N)
        gain_N += weight * difference_N / max(float(base_N.std()), 1e-9) / sum(map(abs, weights.values()))
    return GateOutcome(
        decoding=decoding,
        joint=preference_rate(differences),
        gain=float(gain_N.mean()),
        gain_error=1.96 * float(gain_N.std(ddof=1)) / len(gain_N) ** 0.5 if len(gain_N) > 1 else 0.0,
        interventions=interventions(answers),
        perplexity=float(np.exp(-np.concatenate([answer.token_logprobs for answer in answers]).mean())),
    )
