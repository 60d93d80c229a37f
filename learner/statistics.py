"""What one episode tells about the policy that made it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mara.common.episode import Episode, policy_token_logprobs

NUM_RANKS = 5
"""Ranks of accepted candidates that are told apart; later ones are counted together."""


def episode_statistics(episode: Episode, reward_weights: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of one episode by name, without the ``episode/`` before them.

    ``reward`` is Eq. 13, the scores weighted and summed. Where the episode took no decision, what
    describes decisions is left out rather than given as 0.

    ===================== =====================================================================
    score/NAME            raw score of one reward model
    num_tokens            length of the answer, tokens
    finish_eos_rate       1 if the answer came to its end, 0 if it was cut off
    decisions_per_token   decisions per token of the answer
    kl                    log pi(token) - log ref(token), summed over decided positions, per token:
                          an estimate of the divergence in Eq. 8 from the tokens that were taken
    accept_rate           acceptances among the free decisions
    forced_rate           forced acceptances among all acceptances
    accepted_rank_0 … 4   share of the acceptances that took this rank; ``_rest``: any later one
    ===================== =====================================================================
    """
    num_tokens = max(episode.num_tokens, 1)
    row = {
        "reward": sum(weight * episode.scores[name] for name, weight in reward_weights.items()),
        "num_tokens": float(episode.num_tokens),
        "finish_eos_rate": float(episode.finish_reason == "eos"),
        "decisions_per_token": episode.num_decisions / num_tokens,
    }
    row |= {f"score/{name}": score for name, score in episode.scores.items()}
    accepted_T = episode.actions_T == 1
    log_ratio_T = policy_token_logprobs(episode) - episode.reference_logprobs_T
    row["kl"] = float(log_ratio_T[accepted_T].sum()) / num_tokens
    if (free_T := ~episode.forced_T).any():
        row["accept_rate"] = float(accepted_T[free_T].mean())
    if accepted_T.any():
        row["forced_rate"] = float(episode.forced_T[accepted_T].mean())
        ranks = np.minimum(episode.ranks_T[accepted_T], NUM_RANKS)
        shares = np.bincount(ranks, minlength=NUM_RANKS + 1) / len(ranks)
        names = [f"accepted_rank_{rank}" for rank in range(NUM_RANKS)] + ["accepted_rank_rest"]
        row |= dict(zip(names, shares.tolist(), strict=True))
    return row
