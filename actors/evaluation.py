"""Is the aligned text better than the LLM's own, and is it still language? (section 4.1, Eq. 12)

Three systems answer the same prompts: the plain LLM, greedy; the LLM with the agent, greedy; and, as the
yardstick of fluency, the plain LLM sampled from the same candidate sets at temperature 1. A preference rate
says nothing without fluency beside it: reward models are easily fooled by text nobody would read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mara.actors.config import DecodingConfig
from mara.actors.decoding.engine import Engine, Generation, Request
from mara.actors.decoding.policies import AgentPolicy, Plain, Policy
from mara.actors.heads import RewardHead
from mara.actors.llm import LLM
from mara.actors.prompts import Prompt
from mara.actors.rollout import render_prompts, score_prefixes
from mara.common.agent import Agent
from mara.common.seeding import derive_seed

NUM_RESAMPLES = 2000
NUM_RANKS = 5


@dataclass(frozen=True, slots=True)
class PreferenceRate:
    """w = (wins - losses) / prompts of one system against another (Eq. 12), within [-1, 1]."""

    rate: float
    low: float
    """Lower end of the 95 % bootstrap interval over prompts."""
    high: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class Fluency:
    """Whether the text of one system reads like the LLM's."""

    perplexity: float
    """exp of the mean negative log-likelihood of all tokens under the plain LLM (temperature 1)."""
    distinct_1: float
    """Distinct words over words, all answers together."""
    distinct_2: float
    """Distinct pairs of neighbouring words over such pairs."""
    distinct_3: float
    mean_tokens: float
    eos_share: float
    """Answers that ended by themselves."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its answers and their raw scores."""

    prompt: str
    answers: dict[str, str]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What ``mara eval`` shows and writes as JSON."""

    num_prompts: int
    preference: dict[str, PreferenceRate]
    """Agent against the greedy LLM, for each reward model and ``joint``: better by all of them is a win,
    worse by all a loss, else a tie."""
    fluency: dict[str, Fluency]
    """For each system: ``base``, ``agent``, ``base_sampled``."""
    mean_scores: dict[str, dict[str, float]]
    """System → reward model → mean raw score."""
    accepted_ranks: list[float]
    """Share of the agent's decided tokens by the rank of the candidate taken; the last entry is the rest."""
    decisions_per_token: float
    forced_share: float
    """Decided tokens at which every other candidate was rejected."""
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Progress = Callable[[str, int, int], None]
"""Called with the system, answers done and answers in all."""


def evaluate(
    llm: LLM,
    agent: Agent,
    prompts: Sequence[Prompt],
    heads: Mapping[str, RewardHead],
    weights: Mapping[str, float],
    decoding: DecodingConfig,
    rows: int,
    max_prompt_tokens: int,
    seed: int = 0,
    num_samples: int = 4,
    progress: Progress = lambda system, done, total: None,
) -> EvaluationReport:
    """Compare the agent with the plain LLM on ``prompts``, by ``heads``; all decoding is greedy.

    Args:
        weights: sign of each reward model: negative where lower is better.
        rows: prompts decoded at the same time.
        seed: of the sampled yardstick; the greedy systems have no randomness.
        num_samples: prompts whose answers are kept in the report, evenly spread.
    """
    policies: dict[str, Policy | Plain] = {
        "base": "greedy",
        "agent": AgentPolicy(agent.eval(), threshold=decoding.threshold),
        "base_sampled": "sample",
    }
    answers = {
        system: answer_prompts(
            llm, prompts, decoding, policy, rows, max_prompt_tokens, seed, _for_system(progress, system)
        )
        for system, policy in policies.items()
    }
    scores = {system: _scores(heads, generations, llm.eos_ids) for system, generations in answers.items()}
    return _report(llm, prompts, answers, scores, weights, seed, num_samples)


def answer_prompts(
    llm: LLM,
    prompts: Sequence[Prompt],
    decoding: DecodingConfig,
    policy: Policy | Plain,
    rows: int,
    max_prompt_tokens: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Generation]:
    """One answer for each prompt, in their order."""
    rendered = render_prompts(llm, prompts, max_prompt_tokens)
    engine = Engine(
        llm.model, llm.eos_ids, decoding, policy, min(rows, len(prompts)), max(map(len, rendered.values()))
    )
    # Longest first: the batch then empties evenly and its prefills are of like length.
    order = sorted(range(len(prompts)), key=lambda index: -len(rendered[prompts[index].id]))
    requests = (
        Request(rendered[prompts[index].id], derive_seed(seed, "answer", prompts[index].id), tag=index)
        for index in order
    )
    answers: list[Generation | None] = [None] * len(prompts)
    for done, generation in enumerate(engine.generate(requests), start=1):
        answers[generation.request.tag] = generation
        progress(done, len(prompts))
    return [answer for answer in answers if answer is not None]


def preference_rate(differences: Sequence[np.ndarray], seed: int = 0) -> PreferenceRate:
    """Rate of a system whose score differences to another are given, one float array [N] for each judge.

    A prompt is won where every difference is above 0, lost where every one is below 0, else tied. With two
    judges that never tie this is the mean of their two rates. The interval is the 2.5th to 97.5th percentile
    of the rate over resampled prompts.
    """
    signs_JN = np.sign(np.stack(differences))
    outcome_N = np.where((signs_JN > 0).all(0), 1, np.where((signs_JN < 0).all(0), -1, 0))
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    picks = rng.integers(len(outcome_N), size=(NUM_RESAMPLES, len(outcome_N)))
    low, high = np.percentile(outcome_N[picks].mean(1), [2.5, 97.5])
    wins, losses = int((outcome_N > 0).sum()), int((outcome_N < 0).sum())
    return PreferenceRate(
        rate=float(outcome_N.mean()),
        low=float(low),
        high=float(high),
        wins=wins,
        ties=len(outcome_N) - wins - losses,
        losses=losses,
    )


def fluency(generations: Sequence[Generation], texts: Sequence[str]) -> Fluency:
    """Perplexity under the plain LLM, distinct-n over lower-cased words, length."""
    logprobs = np.concatenate([generation.token_logprobs for generation in generations])
    words = [text.lower().split() for text in texts]
    return Fluency(
        perplexity=float(np.exp(-logprobs.mean())),
        distinct_1=_distinct(words, 1),
        distinct_2=_distinct(words, 2),
        distinct_3=_distinct(words, 3),
        mean_tokens=float(np.mean([len(generation.response_ids) for generation in generations])),
        eos_share=float(np.mean([generation.finish_reason == "eos" for generation in generations])),
    )


def _scores(
    heads: Mapping[str, RewardHead], generations: Sequence[Generation], eos_ids: Sequence[int]
) -> dict[str, np.ndarray]:
    """float32 [N] raw scores of N answers, by reward model."""
    rows = [score_prefixes(heads, generation, eos_ids) for generation in generations]
    return {name: np.array([row[name][-1] for row in rows]) for name in heads}


def _distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _for_system(progress: Progress, system: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(system, done, total)


def _report(
    llm: LLM,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Generation]],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    weights: Mapping[str, float],
    seed: int,
    num_samples: int,
) -> EvaluationReport:
    texts = {
        system: [llm.decode(g.response_ids) for g in generations] for system, generations in answers.items()
    }
    differences = {
        name: np.sign(weight) * (scores["agent"][name] - scores["base"][name])
        for name, weight in weights.items()
        if weight != 0
    }
    preference = {name: preference_rate([values], seed) for name, values in differences.items()}
    preference["joint"] = preference_rate(list(differences.values()), seed)
    taken = [d for generation in answers["agent"] for d in generation.decisions if d.action]
    ranks = np.bincount([min(d.rank, NUM_RANKS) for d in taken], minlength=NUM_RANKS + 1)
    num_tokens = sum(len(generation.response_ids) for generation in answers["agent"])
    num_decisions = sum(len(generation.decisions) for generation in answers["agent"])
    shown = np.linspace(0, len(prompts) - 1, min(num_samples, len(prompts))).astype(int).tolist()
    return EvaluationReport(
        num_prompts=len(prompts),
        preference=preference,
        fluency={system: fluency(generations, texts[system]) for system, generations in answers.items()},
        mean_scores={
            system: {name: float(values.mean()) for name, values in by_name.items()}
            for system, by_name in scores.items()
        },
        accepted_ranks=(ranks / max(1, len(taken))).tolist(),
        decisions_per_token=num_decisions / max(1, num_tokens),
        forced_share=sum(d.forced for d in taken) / max(1, len(taken)),
        samples=[
            Sample(
                prompt=prompts[index].prompt,
                answers={system: texts[system][index] for system in ("base", "agent")},
                scores={
                    system: {name: float(values[index]) for name, values in scores[system].items()}
                    for system in ("base", "agent")
                },
            )
            for index in shown
        ],
    )
