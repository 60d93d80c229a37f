"""Which gate keeps what an agent gains while it steps in less often? Answers behind each gate, compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mara.actors.config import DecodingConfig, GateConfig
from mara.actors.decoding.policies import AgentPolicy, Gated, Plain, Policy
from mara.actors.evaluation import (
    PreferenceRate,
    Progress,
    ScoredAnswer,
    answer_prompts,
    preference_rate,
    score_texts,
)
from mara.actors.heads import RewardHead
from mara.actors.llm import LLM
from mara.actors.prompts import Prompt
from mara.common.agent import Agent
from mara.common.contracts import RewardModel

DENSE = GateConfig()
CANDIDATES = tuple(
    GateConfig(max_first_probability=probability, min_confidence=confidence, min_salience=salience)
    for probability, confidence, salience in [
        *itertools.product((0.8, 0.6, 0.45), (0.0, 0.8, 0.9), (0.0,)),
        *itertools.product((1.0,), (0.8, 0.9, 0.95), (0.0, 0.2, 0.3)),
    ]
)
"""Gates that are tried unless others are given."""


@dataclass(frozen=True, slots=True)
class GateOutcome:
    """What an agent does behind one gate."""

    gate: GateConfig
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


def try_gates(
    llm: LLM,
    agent: Agent,
    prompts: Sequence[Prompt],
    heads: Mapping[str, RewardHead],
    weights: Mapping[str, float],
    decoding: DecodingConfig,
    rows: int,
    max_prompt_tokens: int,
    gates: Sequence[GateConfig] = CANDIDATES,
    progress: Progress = lambda done, total: None,
    models: Mapping[str, Callable[[], RewardModel]] = MappingProxyType({}),
) -> list[GateOutcome]:
    """What the agent does without a gate, and behind each of ``gates``, in that order.

    Args:
        weights: of each reward model; those with weight 0 are not looked at.
        models: loads each of the reward models that are no heads.

    Raises:
        UserError: a prompt is too long, or a reward or the LLM gives a number that is not finite.
    """
    policy = AgentPolicy(agent.eval(), decoding.threshold)
    systems: dict[str, Policy | Plain | Gated] = {"base": "greedy"}
    tried = {f"gate {number}": gate for number, gate in enumerate((DENSE, *gates))}
    systems |= {name: Gated(policy, gate) for name, gate in tried.items()}
    answers = answer_prompts(
        llm, prompts, decoding, systems, rows, max_prompt_tokens, progress=progress, heads=heads
    )
    for name, load in models.items():
        score_texts(name, load(), llm, prompts, answers)
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    return [_outcome(gate, answers[name], answers["base"], counted) for name, gate in tried.items()]


def choose_gate(outcomes: Sequence[GateOutcome], max_interventions: float) -> GateOutcome | None:
    """The gate with the largest gain among those that intervene at most ``max_interventions`` times as often
    as the first of ``outcomes``, the one that is open everywhere. None: no gate intervenes so seldom."""
    limit = max_interventions * outcomes[0].interventions
    return max(
        (outcome for outcome in outcomes if outcome.interventions <= limit),
        key=lambda outcome: outcome.gain,
        default=None,
    )


def is_proved(outcome: GateOutcome) -> bool:
    """Whether the interval of the gain is above 0.

    It is that of one gate. The best of many that do nothing passes more often than 2.5 %: with 18 gates,
    which are alike, in some 10 to 20 %. So it keeps noise of few prompts away; it is no proof of a gain.
    """
    return outcome.gain > outcome.gain_error > 0


def _outcome(
    gate: GateConfig,
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
    tokens = sum(len(answer.response_ids) for answer in answers)
    return GateOutcome(
        gate=gate,
        joint=preference_rate(differences),
        gain=float(gain_N.mean()),
        gain_error=1.96 * float(gain_N.std(ddof=1)) / len(gain_N) ** 0.5 if len(gain_N) > 1 else 0.0,
        interventions=sum(rank > 0 for answer in answers for rank in answer.accepted_ranks) / max(1, tokens),
        perplexity=float(np.exp(-np.concatenate([answer.token_logprobs for answer in answers]).mean())),
    )
