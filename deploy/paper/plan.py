"""What an experiment would cost, counted from the settings of its commands and from rates that are assumed.

Imports no torch.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from pydantic import Field

from mara.common.config import Config
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.config import RunConfig
from mara.deploy.config_file import find_config, load_comparison, load_config
from mara.deploy.paper.experiments import Step

BILLIONS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.0,
    "meta-llama/Llama-3.1-8B-Instruct": 8.0,
    "meta-llama/Llama-3.2-1B-Instruct": 1.2,
    "meta-llama/Llama-3.2-3B-Instruct": 3.2,
    "mistralai/Mistral-7B-Instruct-v0.1": 7.2,
    "mistralai/Mistral-7B-Instruct-v0.2": 7.2,
    "mistralai/Mistral-7B-Instruct-v0.3": 7.2,
    "aligner/aligner-7b-v1.0": 6.7,
}
"""Parameters of the LLMs. Others, those of the user, count as the base LLM of their comparison."""
RATED_BILLIONS = 8.0
"""The size of LLM that the rates are of."""
TRANSITION_BYTES = 2 * 4096
"""Of a decision in the log: the state of an LLM of hidden size 4096, in 16 bit."""
NUM_SYSTEMS_OF_A_RUN = 3
"""What ``mara eval RUN`` has answer: the LLM greedy, with the agent, and sampled."""


class Rates(Config):
    """What a plan assumes. ``mara bench`` measures the first three on a machine of yours."""

    tokens_per_s: float = Field(default=1000.0, gt=0)
    """Tokens a second that one GPU decodes with an LLM of 8 B, many answers at a time; inverse to size."""
    single_tokens_per_s: float = Field(default=30.0, gt=0)
    """The same, one answer at a time."""
    step_s: float = Field(default=0.01, gt=0)
    """Duration of a gradient step, seconds."""
    scores_per_s: float = Field(default=20.0, gt=0)
    """Answers a second that one reward model of 7 B scores."""
    training_tokens: float = Field(default=300.0, gt=0)
    """Tokens of an answer in training, on average."""
    evaluation_tokens: float = Field(default=400.0, gt=0)
    """Tokens of an answer in a comparison, on average."""
    decisions_per_token: float = Field(default=2.0, gt=0)
    """Candidates that the agent decides on for a token of training; the size of a log follows from it."""
    start_s: float = Field(default=300.0, ge=0)
    """Time in which a command loads its models, seconds."""


class Cost(NamedTuple):
    """What a command takes."""

    num_gpus: int
    seconds: float
    slowest: str = ""
    """Of a training, the part that takes so long."""
    log_bytes: float = 0.0
    """Of the episodes that it keeps; 0 where it keeps none."""


def assumptions(rates: Rates) -> Iterator[str]:
    """What a plan rests on, a line each."""
    yield (
        "These are assumptions, not measurements; put figures of `mara bench rollout`, `decode` and "
        "`learner` in their place:"
    )
    for name, field in Rates.model_fields.items():
        text = " ".join((field.description or "").split()).rstrip(".")
        yield f"  {name}={getattr(rates, name):g}: {text[:1].lower() + text[1:]}"
    yield (
        "Decoding, scoring and learning go on at the same time: a training takes as long as the slowest of "
        "the three. Where that is learning, the last steps are done when all episodes are there."
    )


def cost_of(step: Step, rates: Rates) -> Cost | None:
    """What ``step`` takes by its settings; None for a benchmark, which takes minutes.

    Raises:
        UserError: its settings are wrong.
    """
    match settings_of(step):
        case RunConfig() as config if shlex.split(step.command)[1] == "train":
            return _training_cost(config, rates)
        case RunConfig() as config:
            return _evaluation_cost(config, rates)
        case ComparisonConfig() as comparison:
            return _comparison_cost(comparison, rates)
    return None


def settings_of(step: Step) -> RunConfig | ComparisonConfig | None:
    """What a command would go by, its overrides included; None for a benchmark.

    Raises:
        UserError: its settings are wrong.
    """
    _, command, *words = shlex.split(step.command)
    if command == "bench":
        return None
    if "--out" in words:
        place = words.index("--out")
        words = words[:place] + words[place + 2 :]
    name, *overrides = words
    if step.of is not None:
        _, _, name, *of_training = shlex.split(step.of)
        return load_config(find_config(name), [*of_training, *overrides])
    if command == "train":
        return load_config(find_config(name), overrides)
    return load_comparison(find_config(name, is_comparison=True), overrides)


def _training_cost(config: RunConfig, rates: Rates) -> Cost:
    num_episodes, rollout = config.learner.num_episodes, config.rollout
    learner_s = num_episodes * config.learner.gradient_steps_per_episode * rates.step_s
    if config.replay.from_run is not None:
        return Cost(1, rates.start_s + learner_s, "learning")
    num_tokens = num_episodes * rates.training_tokens
    rollout_s = num_tokens / (rollout.num_actors * _tokens_per_s(config.llm.model, rates))
    scoring_s = max(
        (num_episodes / (one.replicas * rates.scores_per_s) for one in config.reward_models.values()),
        default=0.0,
    )
    log_bytes = 0.0
    if config.replay.durable:
        log_bytes = num_tokens * rates.decisions_per_token * TRANSITION_BYTES
    num_gpus = math.ceil(rollout.num_actors * rollout.num_gpus + config.reward_gpus)
    parts = {"decoding": rollout_s, "scoring": scoring_s, "learning": learner_s}
    slowest = max(parts, key=parts.__getitem__)
    return Cost(num_gpus, rates.start_s + parts[slowest], slowest, log_bytes)


def _comparison_cost(config: ComparisonConfig, rates: Rates) -> Cost:
    num_prompts = sum(dataset.num_prompts or 0 for dataset in config.datasets.values())
    answers_s = 0.0
    for name in config.systems:
        model = config.llm_of(name)[0].model
        model = model if model in BILLIONS else config.llm.model
        tokens_per_s = _tokens_per_s(model, rates, is_single=config.rows == 1)
        answers_s += num_prompts * rates.evaluation_tokens / tokens_per_s
    num_scores = num_prompts * len(config.systems) * len(config.scoring_judges)
    work_s = answers_s + num_scores / rates.scores_per_s
    num_gpus = math.ceil(config.num_actors * config.num_gpus)
    return Cost(num_gpus, rates.start_s + work_s / config.num_actors)


def _evaluation_cost(config: RunConfig, rates: Rates) -> Cost:
    num_answers = NUM_SYSTEMS_OF_A_RUN * (config.evaluation.num_prompts or 0)
    answers_s = num_answers * rates.evaluation_tokens / _tokens_per_s(config.llm.model, rates)
    scores_s = num_answers * len(config.reward_models) / rates.scores_per_s
    return Cost(1, rates.start_s + answers_s + scores_s)


def _tokens_per_s(model: str, rates: Rates, *, is_single: bool = False) -> float:
    rate = rates.single_tokens_per_s if is_single else rates.tokens_per_s
    return rate * RATED_BILLIONS / BILLIONS.get(model, RATED_BILLIONS)


def cost_in_words(cost: Cost) -> str:
    hours = cost.seconds / 3600
    text = f"{cost.num_gpus} GPU{'s' if cost.num_gpus > 1 else ''} × {hours:.2f} h"
    if cost.slowest:
        text += f", which {cost.slowest} takes"
    if cost.log_bytes:
        text += f"; keeps {cost.log_bytes / 1e9:.0f} GB of episodes, in memory and on disk"
    return text
