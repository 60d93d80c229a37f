"""Rewards and discounts against a slow oracle that follows the equations."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from mara.buffer.config import ShapingConfig
from mara.buffer.shaping import ScoreNormaliser, Shaped, shape_episode
from mara.common.episode import Episode
from mara.common.errors import UserError

MakeEpisode = Callable[..., Episode]

TERMINALS = get_args(ShapingConfig.model_fields["terminal"].annotation)
ESTIMATORS = get_args(ShapingConfig.model_fields["kl_estimator"].annotation)
DISCOUNTS_PER = get_args(ShapingConfig.model_fields["discount_per"].annotation)


def is_retaken(episode: Episode, t: int) -> bool:
    """The first candidate, taken because all were rejected: forced, though it is not the last."""
    return bool(episode.forced_T[t]) and episode.ranks_T[t] == 0


def probability_of_candidate(episode: Episode, t: int) -> float:
    """Eq. 6, as a product of probabilities; of a candidate that is retaken, of both ways to it."""
    probability = math.exp(episode.accept_logprobs_T[t])
    asked_before = [u for u in range(t) if episode.positions_T[u] == episode.positions_T[t]]
    for earlier in asked_before:
        probability *= math.exp(episode.reject_logprobs_T[earlier])
    if is_retaken(episode, t):
        probability += math.exp(episode.accept_logprobs_T[asked_before[0]])
    return probability


def value_of_prefix(episode: Episode, num_tokens: int, score: float) -> float:
    """n/N × the score of the first n tokens, moved so that the whole answer is worth ``score``."""
    if num_tokens == 0:
        return 0.0
    scores = episode.prefix_scores["helpful"]
    return float(num_tokens / episode.num_tokens * (scores[num_tokens - 1] - scores[-1] + score))


def rewards_by_the_book(episode: Episode, config: ShapingConfig, score: float) -> list[float]:
    last = episode.num_decisions - 1
    num_accepted = sum(1 for action in episode.actions_T if action == 1)
    rewards = []
    for t in range(episode.num_decisions):
        accepted = episode.actions_T[t] == 1
        pi = probability_of_candidate(episode, t)
        pi_ref = math.exp(episode.reference_logprobs_T[t])
        reward = 0.0
        if config.terminal == "last" and t == last:
            reward += score
        if config.terminal == "spread" and accepted:
            reward += score / num_accepted
        if config.terminal == "progress" and accepted:
            later = [episode.positions_T[u] for u in range(t + 1, last + 1) if episode.actions_T[u] == 1]
            earlier = [u for u in range(t) if episode.actions_T[u] == 1]
            end = later[0] if later else episode.num_tokens
            start = episode.positions_T[t] if earlier else 0
            reward += value_of_prefix(episode, end, score) - value_of_prefix(episode, start, score)
        if config.terminal == "postback":
            exponent = sum(1 for later in range(t, last) if episode.actions_T[later] == 1)
            reward += score * config.discount**exponent
        if config.kl_estimator == "accepted_log_ratio" and accepted:
            reward -= config.kl_weight * (math.log(pi) - math.log(pi_ref))
        if config.kl_estimator == "pointwise":
            reward -= config.kl_weight * pi * (math.log(pi) - math.log(pi_ref))
            if is_retaken(episode, t):
                first = min(u for u in range(t) if episode.positions_T[u] == episode.positions_T[t])
                pi = math.exp(episode.accept_logprobs_T[first])
                reward += config.kl_weight * pi * (math.log(pi) - episode.reference_logprobs_T[first])
        if config.kl_estimator == "reference_only" and accepted:
            reward += config.kl_weight * math.log(pi_ref)
        rewards.append(reward)
    return rewards


def shape(episode: Episode, config: ShapingConfig, score: float) -> Shaped:
    """With prefix scores, which only ``progress`` reads."""
    return shape_episode(episode, config, score, episode.prefix_scores["helpful"].astype(np.float64))


@pytest.mark.parametrize("fallback", ["last", "first"])
@pytest.mark.parametrize(("terminal", "estimator"), list(itertools.product(TERMINALS, ESTIMATORS)))
def test_rewards_follow_the_equations(
    make_episode: MakeEpisode, terminal: str, estimator: str, fallback: str
) -> None:
    config = ShapingConfig(terminal=terminal, kl_estimator=estimator, kl_weight=0.3, discount=0.9)
    for seed in range(20):
        episode = make_episode(seed=seed, fallback=fallback)
        rewards_T = shape(episode, config, score=1.7).rewards_T
        assert rewards_T.dtype == np.float32
        np.testing.assert_allclose(rewards_T, rewards_by_the_book(episode, config, 1.7), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("discount_per", DISCOUNTS_PER)
def test_discounts_end_the_episode_and_spare_rejections_if_told_so(
    make_episode: MakeEpisode, discount_per: str
) -> None:
    config = ShapingConfig(discount=0.9, discount_per=discount_per)
    episode = make_episode(seed=3)
    expected = []
    for t in range(episode.num_decisions):
        rejected = episode.actions_T[t] == 0
        expected.append(1.0 if rejected and discount_per == "accepted_token" else 0.9)
    expected[-1] = 0.0
    discounts_T = shape_episode(episode, config, 0.0).discounts_T
    assert discounts_T.dtype == np.float32
    np.testing.assert_allclose(discounts_T, expected, rtol=1e-6)
    assert 0 in episode.actions_T, "the example has to hold a rejection"


@pytest.mark.parametrize("terminal", ["last", "spread", "progress"])
def test_the_sum_of_rewards_does_not_depend_on_the_number_of_rejections(
    make_episode: MakeEpisode, terminal: str
) -> None:
    config = ShapingConfig(terminal=terminal, kl_estimator="none")
    counts = set()
    for seed in range(20):
        episode = make_episode(seed=seed)
        counts.add(episode.num_decisions)
        assert shape(episode, config, 2.5).rewards_T.sum() == pytest.approx(2.5, rel=1e-5)
    assert len(counts) > 3


@pytest.mark.parametrize("discount_per", DISCOUNTS_PER)
def test_monte_carlo_returns_are_discounted_sums_to_the_end(
    make_episode: MakeEpisode, discount_per: str
) -> None:
    episode = make_episode(seed=5)
    steps = shape(episode, ShapingConfig(discount=0.8, discount_per=discount_per), 1.3)
    whole = shape(episode, ShapingConfig(discount=0.8, discount_per=discount_per, returns="monte_carlo"), 1.3)
    for t in range(episode.num_decisions):
        expected, factor = 0.0, 1.0
        for later in range(t, episode.num_decisions):
            expected += factor * float(steps.rewards_T[later])
            factor *= float(steps.discounts_T[later])
        assert whole.rewards_T[t] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not whole.discounts_T.any()


def test_prefixes_are_weighted_and_standardised_like_the_score(make_episode: MakeEpisode) -> None:
    weights = {"a": 1.0, "b": -2.0}
    normaliser = ScoreNormaliser(ShapingConfig(score_weights=weights, normalise="running"))
    rng = np.random.default_rng(2)
    for seed in range(6):
        episode = make_episode(seed=seed, scores={"a": float(rng.normal(5, 2)), "b": float(rng.normal())})
        normaliser.count(episode)
        score = normaliser.score(episode)
        assert normaliser.prefix_scores(episode)[-1] == pytest.approx(score, abs=1e-5)


def test_progress_needs_models_that_judge_unfinished_answers(make_episode: MakeEpisode) -> None:
    episode = make_episode(scores={"a": 1.0})
    episode.prefix_scores.clear()
    with pytest.raises(UserError, match=r"terminal=progress: the reward model 'a'"):
        ScoreNormaliser(ShapingConfig(score_weights={"a": 1.0})).prefix_scores(episode)


def test_postback_pays_for_every_decision(make_episode: MakeEpisode) -> None:
    config = ShapingConfig(terminal="postback", kl_estimator="none", discount=1.0)
    episode = make_episode(seed=1)
    np.testing.assert_array_equal(shape_episode(episode, config, 2.5).rewards_T, 2.5)
    assert shape_episode(episode, config, 2.5).rewards_T.sum() == 2.5 * episode.num_decisions


@pytest.mark.parametrize("terminal", TERMINALS)
def test_an_answer_without_decisions_teaches_nothing(make_episode: MakeEpisode, terminal: str) -> None:
    episode = make_episode(num_tokens=0)
    shaped = shape(episode, ShapingConfig(terminal=terminal), 1.0)
    assert shaped.rewards_T.tolist() == []
    assert shaped.discounts_T.tolist() == []


def test_the_expected_accepted_log_ratio_is_the_kl_divergence_of_one_token(make_episode: MakeEpisode) -> None:
    """Over all three ways through one candidate set of three: Σ π(t) Σ rewards = -λ KL(π, π_ref)."""
    template = make_episode(seed=0)
    accept = [0.6, 0.3, 1.0]
    reference = [0.5, 0.3, 0.2]
    pi = [0.6, 0.4 * 0.3, 0.4 * 0.7]
    config = ShapingConfig(kl_weight=0.5)
    expected_reward = 0.0
    for chosen in range(3):
        num = chosen + 1
        with np.errstate(divide="ignore"):
            fields: dict[str, Any] = {
                "actions_T": np.array([0] * chosen + [1], np.uint8),
                "ranks_T": np.arange(num, dtype=np.int16),
                "positions_T": np.zeros(num, np.int32),
                "reference_logprobs_T": np.log(np.array(reference[:num], np.float32)),
                "accept_logprobs_T": np.log(np.array(accept[:num], np.float32)),
                "reject_logprobs_T": np.log1p(-np.array(accept[:num], np.float32)),
            }
        kept = {name: getattr(template, name) for name in Episode.__slots__ if name not in fields}
        rewards_T = shape_episode(Episode(**kept, **fields), config, 0.0).rewards_T
        expected_reward += pi[chosen] * float(rewards_T.sum())
    divergence = sum(p * math.log(p / q) for p, q in zip(pi, reference, strict=True))
    assert expected_reward == pytest.approx(-0.5 * divergence, rel=1e-5)


def divergence_by_all_paths(accept: list[float], reference: list[float], fallback: str) -> float:
    """KL(π, π_ref) of one token, π from every sequence of answers that an agent may give to a set."""
    num, pi = len(accept), [0.0] * len(accept)
    for answers in itertools.product([True, False], repeat=num):
        probability = math.prod(p if yes else 1 - p for p, yes in zip(accept, answers, strict=True))
        nothing_accepted = num - 1 if fallback == "last" else 0
        pi[answers.index(True) if any(answers) else nothing_accepted] += probability
    assert sum(pi) == pytest.approx(1.0)
    return sum(p * math.log(p / q) for p, q in zip(pi, reference, strict=True))


@pytest.mark.parametrize("fallback", ["last", "first"])
def test_where_all_candidates_were_asked_about_the_pointwise_terms_are_the_divergence_of_the_token(
    make_episode: MakeEpisode, fallback: str
) -> None:
    config = ShapingConfig(kl_estimator="pointwise", kl_weight=0.5)
    num_compared = 0
    for seed in range(80):
        episode = make_episode(seed=seed, fallback=fallback)
        rewards_T = shape(episode, config, 0.0).rewards_T
        for position in set(episode.positions_T.tolist()):
            here = np.flatnonzero(episode.positions_T == position)
            if not episode.forced_T[here[-1]]:
                continue
            asked = here if fallback == "last" else here[:-1]
            # Any reference will do: each record only has to have its candidate's.
            reference = np.exp(episode.reference_logprobs_T[asked]).tolist()
            accept = np.exp(episode.accept_logprobs_T[asked]).tolist()
            divergence = divergence_by_all_paths(accept, reference, fallback)
            assert rewards_T[here].sum() == pytest.approx(-0.5 * divergence, rel=1e-4, abs=1e-5)
            num_compared += 1
    assert num_compared > 20


def test_scores_are_weighted_by_name(make_episode: MakeEpisode) -> None:
    config = ShapingConfig(score_weights={"helpful": 2.0, "harm": -1.0})
    episode = make_episode(scores={"helpful": 0.5, "harm": 3.0, "unused": 100.0})
    assert ScoreNormaliser(config).score(episode) == pytest.approx(2.0 * 0.5 - 3.0)


def test_a_weight_without_a_score_is_the_users_mistake(make_episode: MakeEpisode) -> None:
    normaliser = ScoreNormaliser(ShapingConfig(score_weights={"helpfull": 1.0}))
    with pytest.raises(UserError, match=r"shaping\.score_weights.*'helpfull'.*have helpful"):
        normaliser.count(make_episode(scores={"helpful": 1.0}))


def test_running_normalisation_standardises_each_model_and_then_freezes(make_episode: MakeEpisode) -> None:
    weights = {"a": 1.0, "b": 10.0}
    config = ShapingConfig(score_weights=weights, normalise="running", normalise_episodes=20)
    normaliser = ScoreNormaliser(config)
    rng = np.random.default_rng(0)
    seen: dict[str, list[float]] = {"a": [], "b": []}
    for number in range(25):
        scores = {"a": float(rng.normal(50, 3)), "b": float(rng.normal(-1, 0.1))}
        expected = 0.0
        for name, score in scores.items():
            if number < 20:
                seen[name].append(score)
            expected += weights[name] * (score - np.mean(seen[name])) / (np.std(seen[name]) or 1.0)
        episode = make_episode(scores=scores)
        normaliser.count(episode)
        assert normaliser.score(episode) == pytest.approx(expected, abs=1e-9)
    assert len(seen["a"]) == 20


@pytest.mark.parametrize(("normalise", "num_needed"), [("none", 0), ("running", 16)])
def test_scores_are_ready_once_their_deviation_means_something(
    make_episode: MakeEpisode, normalise: str, num_needed: int
) -> None:
    normaliser = ScoreNormaliser(ShapingConfig(score_weights={"a": 1.0}, normalise=normalise))
    for _ in range(num_needed):
        assert not normaliser.is_ready
        normaliser.count(make_episode(scores={"a": 1.0}))
    assert normaliser.is_ready


def test_the_baseline_is_what_the_prompt_scored_before(make_episode: MakeEpisode) -> None:
    normaliser = ScoreNormaliser(ShapingConfig(score_weights={"a": 1.0}, baseline="prompt"))

    def score(prompt_id: str, value: float) -> float:
        return normaliser.score(make_episode(prompt_id=prompt_id, scores={"a": value}))

    assert score("x", 4.0) == 4.0  # nothing seen at all
    assert score("x", 6.0) == 6.0 - 4.0
    assert score("y", 6.0) == 6.0 - (4.0 + 6.0) / 2  # a new prompt: the mean over all
    assert score("x", 6.0) == 6.0 - (4.0 + 6.0) / 2
    assert score("y", 7.0) == 7.0 - 6.0


def test_a_normaliser_goes_on_from_its_saved_state(make_episode: MakeEpisode) -> None:
    config = ShapingConfig(score_weights={"a": 1.0}, normalise="running", baseline="prompt")
    episodes = [
        make_episode(prompt_id=f"p{number % 3}", scores={"a": math.sin(number)}) for number in range(12)
    ]
    uninterrupted, before, after = (ScoreNormaliser(config) for _ in range(3))

    def count_and_score(normaliser: ScoreNormaliser, episode: Episode) -> float:
        normaliser.count(episode)
        return normaliser.score(episode)

    expected = [count_and_score(uninterrupted, episode) for episode in episodes]
    first = [count_and_score(before, episode) for episode in episodes[:6]]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + [count_and_score(after, episode) for episode in episodes[6:]] == expected
