"""Is the aligned text better than the LLM's own, and is it still language? (section 4.1, Eq. 12)

Three systems answer the same prompts: the plain LLM, greedy; the LLM with the agent, greedy; and, as the
yardstick of fluency, the plain LLM sampled from the same candidate sets at temperature 1. A preference rate
says nothing without fluency beside it: reward models are easily fooled by text nobody would read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mara.actors.config import DecodingConfig
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Generation, Request
from mara.actors.decoding.policies import AnyPolicy, goes_by_value, most_demanding
from mara.actors.decoding.prefill import common_prefix
from mara.actors.heads import RewardHead
from mara.actors.llm import LLM
from mara.actors.prompts import Prompt
from mara.actors.rollout import render_prompts, score_prefixes
from mara.common.contracts import Conversation, RewardModel
from mara.common.episode import FinishReason
from mara.common.errors import UserError
from mara.common.seeding import derive_seed

NUM_RESAMPLES = 2000
NUM_RANKS = 5
FEWEST_PROMPTS = 20
"""For an interval to be shown: of fewer, resampling makes it too narrow, up to no width at all."""


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

    @property
    def is_enough(self) -> bool:
        """Whether there are so many prompts that the interval means something."""
        return self.wins + self.ties + self.losses >= FEWEST_PROMPTS

    def interval(self) -> str:
        """The interval for people; why there is none where resampling says nothing."""
        if self.wins == self.losses == 0:
            return "all tie"
        if not self.is_enough:
            return "too few prompts"
        return f"{self.low:+.1%} to {self.high:+.1%}"


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
class ScoredAnswer:
    """What the comparison needs of one answer. Its hidden states are gone: those of all would fill a GPU."""

    response_ids: list[int]
    """With the end-of-sequence token if one was taken."""
    token_logprobs: list[float]
    """Of every token under the LLM itself (temperature 1, whole vocabulary)."""
    finish_reason: FinishReason
    scores: dict[str, float]
    """Raw score by reward model."""
    accepted_ranks: list[int]
    """Rank of the candidate taken, at each position that had several and a policy to decide."""
    num_decisions: int
    num_forced: int
    """Acceptances without a choice: every other candidate was rejected, or all were."""


Outcome = Literal["better", "worse", "mixed", "same"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its answers and their raw scores."""

    id: str
    prompt: str
    category: str
    """As the file of prompts names it; empty: it does not."""
    outcome: Outcome
    """Of the agent's answer against the greedy LLM's: ``better`` or ``worse`` by all reward models that have
    a weight; ``same``: the same tokens; ``mixed``: anything else. The last two are ties."""
    answers: dict[str, str]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class CategoryRates:
    """Preference rates over the prompts of one category."""

    num_prompts: int
    preference: dict[str, PreferenceRate]
    """As in :class:`EvaluationReport`."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What ``mara eval`` shows and writes as JSON."""

    num_prompts: int
    num_different: int
    """Prompts to which the agent's answer is not that of the greedy LLM."""
    preference: dict[str, PreferenceRate]
    """Agent against the greedy LLM, for each reward model and ``joint``: better by all of them is a win,
    worse by all a loss, else a tie. Answers of the same tokens are ties."""
    fluency: dict[str, Fluency]
    """For each system: ``base``, ``agent``, ``base_sampled``."""
    mean_scores: dict[str, dict[str, float]]
    """System → reward model → mean raw score."""
    accepted_ranks: list[float]
    """Share of the agent's decided tokens by the rank of the candidate taken; the last entry is the rest."""
    decisions_per_token: float
    forced_share: float | None
    """Decided tokens at which every other candidate, or every one, was rejected. None by value, where nothing
    is rejected."""
    interventions: float
    """Share of all the agent's tokens that are not the LLM's first candidate."""
    samples: list[Sample] = field(default_factory=list)
    """Every prompt, in the order of their file."""
    categories: dict[str, CategoryRates] = field(default_factory=dict)
    """Category → its rates, by name. Prompts without a category count in none."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def interventions(answers: Sequence[ScoredAnswer]) -> float:
    """Share of the tokens of all ``answers`` that are not the LLM's first candidate."""
    num_tokens = sum(len(answer.response_ids) for answer in answers)
    return sum(rank > 0 for answer in answers for rank in answer.accepted_ranks) / max(1, num_tokens)


Progress = Callable[[int, int], None]
"""Called with the answers done and the answers in all, of all systems."""


def evaluate(
    llm: LLM,
    agent: AnyPolicy,
    prompts: Sequence[Prompt],
    heads: Mapping[str, RewardHead],
    weights: Mapping[str, float],
    decoding: DecodingConfig,
    rows: int,
    max_prompt_tokens: int,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    models: Mapping[str, Callable[[], RewardModel]] = MappingProxyType({}),
) -> EvaluationReport:
    """Compare the agent with the plain LLM on ``prompts``, by ``heads``; all decoding is greedy.

    Args:
        agent: as :func:`~mara.actors.decoding.policies.steered_by` makes it.
        weights: sign of each reward model: negative where lower is better.
        rows: answers decoded at the same time. In 16 bit a few greedy answers change with it and with the
            candidates examined in a pass, because the LLM rounds differently in passes of another size.
        seed: of the sampled yardstick; the greedy systems draw nothing.
        models: loads each of the other reward models; one after the other scores all the answers.

    Raises:
        UserError: a prompt is too long, or a reward or the LLM gives a number that is not finite.
    """
    policies: dict[str, AnyPolicy] = {
        "base": "greedy",
        "agent": agent,
        "base_sampled": "sample",
    }
    answers = answer_prompts(llm, prompts, decoding, policies, rows, max_prompt_tokens, seed, progress, heads)
    for name, load in models.items():
        score_texts(name, load(), llm, prompts, answers)
    return _report(llm, prompts, answers, weights, seed, by_value=goes_by_value(agent))


def answer_prompts(
    llm: LLM,
    prompts: Sequence[Prompt],
    decoding: DecodingConfig,
    policies: Mapping[str, AnyPolicy],
    rows: int,
    max_prompt_tokens: int,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    heads: Mapping[str, RewardHead] = MappingProxyType({}),
) -> dict[str, list[ScoredAnswer]]:
    """One answer by each of the ``policies`` to each prompt, in the prompts' order, scored by ``heads``.

    All are answered together, those by value first (a pass is as wide as its widest row). A prompt is read
    once for all policies that are not, and their answers are rounded alike.

    Raises:
        UserError: a prompt is too long, or a head or the LLM gives a number that is not finite.
    """
    rendered = render_prompts(llm, prompts, max_prompt_tokens)
    num_answers = len(policies) * len(prompts)
    engine = Engine(
        llm.model,
        llm.eos_ids,
        decoding,
        most_demanding(policies.values()),
        min(rows, num_answers),
        max(map(len, rendered.values())),
        common_prefix(list(rendered.values())),
    )
    # Longest first: the batch then empties evenly and its prefills are of like length. Those by value come
    # before all others: a pass is as wide as its widest row, so few of them cost as much as many.
    order = sorted(range(len(prompts)), key=lambda index: -len(rendered[prompts[index].id]))
    in_turn = sorted(
        ((index, system, policy) for index in order for system, policy in policies.items()),
        key=lambda turn: not goes_by_value(turn[2]),
    )
    requests = (
        Request(
            rendered[prompts[index].id],
            derive_seed(seed, "answer", prompts[index].id),
            tag=(system, index),
            policy=policy,
        )
        for index, system, policy in in_turn
    )
    progress(0, num_answers)
    answers: dict[str, list[ScoredAnswer | None]] = {system: [None] * len(prompts) for system in policies}
    for done, generation in enumerate(engine.generate(requests), start=1):
        system, index = generation.request.tag
        answer = _scored(generation, heads, llm.eos_ids)
        _check_finite(answer, prompts[index])
        answers[system][index] = answer
        progress(done, num_answers)
    return {
        system: [answer for answer in of_system if answer is not None]
        for system, of_system in answers.items()
    }


def score_texts(
    name: str,
    model: RewardModel,
    llm: LLM,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[ScoredAnswer]],
) -> None:
    """Add the scores of reward model ``name`` to all ``answers``, by the text of prompt and answer.

    Raises:
        UserError: it gives an answer no finite score.
    """
    for system, of_system in answers.items():
        conversations = [
            Conversation(prompt.prompt, llm.decode(answer.response_ids))
            for prompt, answer in zip(prompts, of_system, strict=True)
        ]
        try:
            scores = model.score(conversations).tolist()
        except Exception as error:  # A function or a server may fail in any way.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"rewards.{name}: no scores ({reason}); look at that, then evaluate again"
            ) from error
        for prompt, answer, score in zip(prompts, of_system, scores, strict=True):
            if not np.isfinite(score):
                raise UserError(
                    f"rewards.{name}: the answer of {system!r} to prompt {prompt.id!r} has no finite score "
                    f"({score}); a longer max_length or too_long=truncate may help"
                )
            answer.scores[name] = score


def outcomes(differences: Sequence[np.ndarray]) -> np.ndarray:
    """int [N]: 1 where every judge's difference, float [N], is above 0, -1 where all are below, else 0."""
    signs_JN = np.sign(np.stack(differences))
    return np.where((signs_JN > 0).all(0), 1, np.where((signs_JN < 0).all(0), -1, 0))


def preference_rate(differences: Sequence[np.ndarray], seed: int = 0) -> PreferenceRate:
    """Rate of a system whose score differences to another are given, one float array [N] for each judge.

    A prompt is won where every difference is above 0, lost where every one is below 0, else tied. With two
    judges that never tie this is the mean of their two rates. The interval is the 2.5th to 97.5th percentile
    of the rate over resampled prompts.
    """
    outcome_N = outcomes(differences)
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


def fluency(answers: Sequence[ScoredAnswer], texts: Sequence[str]) -> Fluency:
    """Perplexity under the plain LLM, distinct-n over lower-cased words, length."""
    logprobs = np.concatenate([answer.token_logprobs for answer in answers])
    words = [text.lower().split() for text in texts]
    return Fluency(
        perplexity=float(np.exp(-logprobs.mean())),
        distinct_1=distinct(words, 1),
        distinct_2=distinct(words, 2),
        distinct_3=distinct(words, 3),
        mean_tokens=float(np.mean([len(answer.response_ids) for answer in answers])),
        eos_share=float(np.mean([answer.finish_reason == "eos" for answer in answers])),
    )


def _scored(generation: Generation, heads: Mapping[str, RewardHead], eos_ids: Sequence[int]) -> ScoredAnswer:
    """The answer without its hidden states."""
    taken = [decision for decision in generation.decisions if decision.action]
    scores = score_prefixes(heads, generation, eos_ids)
    return ScoredAnswer(
        response_ids=generation.response_ids,
        token_logprobs=generation.token_logprobs,
        finish_reason=generation.finish_reason,
        scores={name: float(scores_N[-1]) for name, scores_N in scores.items()},
        accepted_ranks=[decision.rank for decision in taken],
        num_decisions=len(generation.decisions),
        num_forced=sum(decision.forced for decision in taken),
    )


def _check_finite(answer: ScoredAnswer, prompt: Prompt) -> None:
    """A comparison with NaN is neither a win nor a loss: it must not pass for a tie."""
    for name, score in answer.scores.items():
        if not np.isfinite(score):
            raise UserError(
                f"rewards.{name}.path: the head gives the answer to prompt {prompt.id!r} the score {score}; "
                "fit it again, or try llm.dtype=float32"
            )
    if not np.isfinite(answer.token_logprobs).all():
        raise UserError(
            f"llm.model: the probabilities of the answer to prompt {prompt.id!r} are not finite; "
            "try llm.dtype=float32"
        )


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different runs of ``n`` words over all such runs, of all texts together; 0 without any."""
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _outcome(joint: int, differs: bool) -> Outcome:
    """In words; a tie of two different answers is ``mixed``."""
    if joint:
        return "better" if joint > 0 else "worse"
    return "mixed" if differs else "same"


def _preference(differences: Mapping[str, np.ndarray], seed: int) -> dict[str, PreferenceRate]:
    """The rate by each judge, and by all of them together."""
    rates = {name: preference_rate([values], seed) for name, values in differences.items()}
    return rates | {"joint": preference_rate(list(differences.values()), seed)}


def _report(
    llm: LLM,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[ScoredAnswer]],
    weights: Mapping[str, float],
    seed: int,
    *,
    by_value: bool,
) -> EvaluationReport:
    texts = {
        system: [llm.decode(answer.response_ids) for answer in of_system]
        for system, of_system in answers.items()
    }
    scores = {
        system: {name: np.array([answer.scores[name] for answer in of_system]) for name in weights}
        for system, of_system in answers.items()
    }
    differs_N = np.array(
        [a.response_ids != b.response_ids for a, b in zip(answers["agent"], answers["base"], strict=True)]
    )
    # Batches of other shapes round differently: the same tokens must not win or lose by that, nor look so.
    for name, base_N in scores["base"].items():
        scores["agent"][name] = np.where(differs_N, scores["agent"][name], base_N)
    differences = {
        name: np.sign(weight) * (scores["agent"][name] - scores["base"][name])
        for name, weight in weights.items()
        if weight != 0
    }
    in_category = {
        name: np.array([prompt.category == name for prompt in prompts])
        for name in sorted({prompt.category for prompt in prompts if prompt.category})
    }
    joint_N = outcomes(list(differences.values()))
    taken = [min(rank, NUM_RANKS) for answer in answers["agent"] for rank in answer.accepted_ranks]
    ranks = np.bincount(taken, minlength=NUM_RANKS + 1)
    num_tokens = sum(len(answer.response_ids) for answer in answers["agent"])
    num_decisions = sum(answer.num_decisions for answer in answers["agent"])
    num_forced = sum(answer.num_forced for answer in answers["agent"])
    return EvaluationReport(
        num_prompts=len(prompts),
        num_different=int(differs_N.sum()),
        preference=_preference(differences, seed),
        fluency={system: fluency(of_system, texts[system]) for system, of_system in answers.items()},
        mean_scores={
            system: {name: float(values.mean()) for name, values in by_name.items()}
            for system, by_name in scores.items()
        },
        accepted_ranks=(ranks / max(1, len(taken))).tolist(),
        decisions_per_token=num_decisions / max(1, num_tokens),
        forced_share=None if by_value else num_forced / max(1, len(taken)),
        interventions=interventions(answers["agent"]),
        samples=[
            Sample(
                id=prompt.id,
                prompt=prompt.prompt,
                category=prompt.category,
                outcome=_outcome(int(joint_N[index]), bool(differs_N[index])),
                answers={system: texts[system][index] for system in ("base", "agent")},
                scores={
                    system: {name: float(values[index]) for name, values in scores[system].items()}
                    for system in ("base", "agent")
                },
            )
            for index, prompt in enumerate(prompts)
        ],
        categories={
            name: CategoryRates(
                int(mask_N.sum()),
                _preference({judge: values[mask_N] for judge, values in differences.items()}, seed),
            )
            for name, mask_N in in_category.items()
        },
    )
