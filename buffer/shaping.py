"""From an episode's raw scores and log-probabilities to rewards and discounts (Eq. 6, 8 and 13).

Legend: T decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mara.buffer.config import NORMALISE_FROM_EPISODES, ShapingConfig
from mara.common.agent import ACCEPT
from mara.common.episode import Episode, policy_token_logprobs
from mara.common.errors import UserError


class Shaped(NamedTuple):
    """What one episode teaches."""

    rewards_T: np.ndarray
    """float32 [T]."""
    discounts_T: np.ndarray
    """float32 [T]: what the value of the next state counts; 0 at the last decision."""


def shape_episode(
    episode: Episode, config: ShapingConfig, score: float, prefix_scores_N: np.ndarray | None = None
) -> Shaped:
    """Return the rewards and discounts of an episode whose answer is worth ``score``. Pure.

    ``score`` is r(x, y) of Eq. 13 as :class:`ScoreNormaliser` gives it, ``prefix_scores_N`` the same for the
    answer's first n tokens, needed with ``terminal`` "progress" only. Without decisions both arrays are
    empty. With ``returns`` "monte_carlo" a decision's reward is its whole return and its discount 0.

    Example: two decisions, a rejection and the forced acceptance, score 2, ``terminal`` "last",
    no KL term: rewards 0 and 2, discounts γ (1 with ``discount_per`` "accepted_token") and 0.
    """
    accepted_T = episode.actions_T == ACCEPT
    if config.terminal == "progress":
        assert prefix_scores_N is not None, "the caller asks the normaliser for them"
        rewards_T = _progress_rewards(episode, accepted_T, score, prefix_scores_N)
    else:
        rewards_T = _terminal_rewards(accepted_T, config, score)
    rewards_T += _kl_rewards(episode, accepted_T, config)
    if config.discount_per == "decision":
        discounts_T = np.full(len(accepted_T), config.discount, np.float32)
    else:
        discounts_T = np.where(accepted_T, config.discount, 1.0).astype(np.float32)
    discounts_T[-1:] = 0.0
    if config.returns == "monte_carlo":
        for t in range(len(rewards_T) - 2, -1, -1):
            rewards_T[t] += discounts_T[t] * rewards_T[t + 1]
        discounts_T[:] = 0.0
    return Shaped(rewards_T.astype(np.float32), discounts_T)


def _terminal_rewards(accepted_T: np.ndarray, config: ShapingConfig, score: float) -> np.ndarray:
    """Where the score of the answer is paid: float64 [T]."""
    rewards_T = np.zeros(len(accepted_T))
    if config.terminal == "last":
        rewards_T[-1:] = score
    elif config.terminal == "spread":
        rewards_T[accepted_T] = score / max(1, int(accepted_T.sum()))
    else:
        # γ to the number of acceptances from here on, the last decision's own left out, as in the released
        # code (which also leaves out the first decision of an episode; we do not).
        counted_T = accepted_T.copy()
        counted_T[-1:] = False
        rewards_T = score * config.discount ** np.cumsum(counted_T[::-1])[::-1].astype(np.float64)
    return rewards_T


def _progress_rewards(
    episode: Episode, accepted_T: np.ndarray, score: float, prefix_scores_N: np.ndarray
) -> np.ndarray:
    """What each acceptance added to n/N × score of the first n tokens: float64 [T], sums to ``score``.

    Tokens without a decision count for the acceptance before them, those at the start for the first one.
    A difference between ``score`` and the last prefix score, a baseline, is spread evenly over the tokens.
    """
    if not len(accepted_T):
        return np.zeros(0)
    num_tokens = len(prefix_scores_N)
    share_N = np.arange(1, num_tokens + 1) / num_tokens
    value_N = share_N * (prefix_scores_N - prefix_scores_N[-1:] + score)
    positions = episode.positions_T[accepted_T]
    ends = np.append(positions[1:], num_tokens) - 1
    rewards_T = np.zeros(len(accepted_T))
    rewards_T[accepted_T] = np.diff(value_N[ends], prepend=0.0)
    return rewards_T


def _kl_rewards(episode: Episode, accepted_T: np.ndarray, config: ShapingConfig) -> np.ndarray:
    """The penalty for leaving the reference, as a reward: float64 [T]."""
    reference_T = episode.reference_logprobs_T.astype(np.float64)
    if config.kl_estimator == "none" or config.kl_weight == 0:
        return np.zeros(len(accepted_T))
    if config.kl_estimator == "reference_only":
        return np.where(accepted_T, config.kl_weight * reference_T, 0.0)
    policy_T = policy_token_logprobs(episode).astype(np.float64)
    log_ratio_T = policy_T - reference_T
    if config.kl_estimator == "accepted_log_ratio":
        return np.where(accepted_T, -config.kl_weight * log_ratio_T, 0.0)
    terms_T = np.exp(policy_T) * log_ratio_T
    # The divergence has one term for each candidate. A first candidate that is retaken stands in two records.
    # Only the second has its whole probability, and what the first was charged for part of it is taken off.
    retaken = np.flatnonzero(episode.forced_T & (episode.ranks_T == 0))
    terms_T[retaken] -= terms_T[np.searchsorted(episode.positions_T, episode.positions_T[retaken])]
    return -config.kl_weight * terms_T


class ScoreNormaliser:
    """Turns an episode's named raw scores into r(x, y) of Eq. 13, with the memory that this takes.

    Each episode is counted once with :meth:`count`, and then scored once, as soon as :attr:`is_ready`. The
    running statistics and baselines depend on the order of the episodes, and are saved with the learner.
    Not thread-safe.
    """

    def __init__(self, config: ShapingConfig) -> None:
        self._config = config
        self._models = {name: _RunningMoments() for name in config.score_weights}
        self._prompts: dict[str, _RunningMoments] = {}
        self._all_prompts = _RunningMoments()

    def count(self, episode: Episode) -> None:
        """Take the episode's scores into the running means and deviations, until those are frozen.

        Raises:
            UserError: a reward model with a weight did not score the episode.
        """
        for name, moments in self._models.items():
            if name not in episode.scores:
                raise UserError(
                    f"shaping.score_weights: the episodes have no score named {name!r} (they have "
                    f"{', '.join(sorted(episode.scores)) or 'none'}); name reward models that the run scores"
                )
            if self._config.normalise == "running" and moments.count < self._config.normalise_episodes:
                moments.add(episode.scores[name])

    @property
    def is_ready(self) -> bool:
        """Whether enough episodes were counted to score any: at once, unless scores are standardised."""
        if self._config.normalise == "none":
            return True
        return all(moments.count >= NORMALISE_FROM_EPISODES for moments in self._models.values())

    def score(self, episode: Episode, *, remember: bool = True) -> float:
        """Return r(x, y) = Σ weight × (standardised) score, less the baseline, of an episode counted before.

        The baseline then remembers the episode, unless it does already: ``remember`` False.
        """
        total = 0.0
        for name, weight in self._config.score_weights.items():
            total += weight * float(self._standardised(name, episode.scores[name]))
        if self._config.baseline == "none":
            return total
        prompt = self._prompts.get(episode.prompt_id, _RunningMoments())
        # A running mean that has seen nothing is 0.
        baseline = prompt.mean if prompt.count else self._all_prompts.mean
        if remember:
            self._prompts[episode.prompt_id] = prompt
            prompt.add(total)
            self._all_prompts.add(total)
        return total - baseline

    def prefix_scores(self, episode: Episode) -> np.ndarray:
        """r(x, y) of the answer's first n tokens, float64 [N], without a baseline. Remembers nothing.

        Raises:
            UserError: a reward model with a weight does not judge unfinished answers.
        """
        total_N = np.zeros(episode.num_tokens)
        for name, weight in self._config.score_weights.items():
            if name not in episode.prefix_scores:
                raise UserError(
                    f"shaping.terminal=progress: the reward model {name!r} does not judge unfinished "
                    "answers; use reward heads, or terminal last or spread"
                )
            total_N += weight * self._standardised(name, episode.prefix_scores[name].astype(np.float64))
        return total_N

    def _standardised(self, name: str, score: Any) -> Any:
        """A number or an array by the running mean and deviation."""
        if self._config.normalise == "none":
            return score
        moments = self._models[name]
        return (score - moments.mean) / (moments.deviation or 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts: everything :meth:`load_state_dict` needs to go on."""
        return {
            "models": {name: moments.to_list() for name, moments in self._models.items()},
            "prompts": {name: moments.to_list() for name, moments in self._prompts.items()},
            "all_prompts": self._all_prompts.to_list(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; a reward model that it does not know starts afresh."""
        for name in self._models.keys() & state["models"].keys():
            self._models[name] = _RunningMoments(*state["models"][name])
        self._prompts = {name: _RunningMoments(*moments) for name, moments in state["prompts"].items()}
        self._all_prompts = _RunningMoments(*state["all_prompts"])


class _RunningMoments:
    """Count, mean and standard deviation of numbers seen one by one (Welford)."""

    def __init__(self, count: int = 0, mean: float = 0.0, squares: float = 0.0) -> None:
        self.count = count
        self.mean = mean
        self._squares = squares

    def add(self, value: float) -> None:
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self._squares += delta * (value - self.mean)

    @property
    def deviation(self) -> float:
        """Of the population; 0 where all values were equal."""
        return float((self._squares / max(1, self.count)) ** 0.5)

    def to_list(self) -> list[float]:
        return [self.count, self.mean, self._squares]
