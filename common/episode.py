"""The episode record: everything one generated answer leaves behind, and nothing derived from it.

Legend: P prompt tokens, N response tokens, T decisions, D hidden size of the LLM.

Rewards are not stored. Raw scores and log-probabilities are, so that the same log can be read again
with other reward weights, another KL penalty or other shaping.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One answer of the LLM under the agent, with every decision taken on the way.

    Decisions are in the order they were taken. The state after decision ``t`` is the state of decision
    ``t + 1``, so states are stored once; the decision ``T - 1`` ends the episode. An answer may have no
    decisions at all (every position had a single candidate): then T is 0 and nothing can be learnt.
    """

    uid: str
    """Globally unique; appending the same uid twice stores it once."""
    prompt_id: str
    """The id of the prompt in its data set."""
    actor_id: str
    """The rollout actor that made it."""
    prompt_ids_P: np.ndarray
    """int32 [P], the templated prompt."""
    response_ids_N: np.ndarray
    """int32 [N], with the end-of-sequence token if it was accepted."""
    states_TD: torch.Tensor
    """bfloat16 or float16 [T, D]: the LLM's last hidden state, after its final norm, at the candidate."""
    actions_T: np.ndarray
    """uint8 [T]: 1 accepts, 0 rejects."""
    ranks_T: np.ndarray
    """int16 [T]: place of the candidate in its set, 0 is the most probable."""
    num_candidates_T: np.ndarray
    """int16 [T]: size of the candidate set, at least 2."""
    positions_T: np.ndarray
    """int32 [T]: index into the response of the token being decided."""
    forced_T: np.ndarray
    """bool [T]: the policy had no choice. Either the last candidate, which then is not asked about; or, where
    it was asked about and rejected like all the others, the first one, which is taken in its place: a record
    of its own, rank 0 once more, after that rejection."""
    reference_logprobs_T: np.ndarray
    """float32 [T]: log-probability of the candidate under the LLM, normalised over its candidate set
    after the temperature."""
    accept_logprobs_T: np.ndarray
    """float32 [T]: log-probability that the behaviour policy accepts (0 where forced)."""
    reject_logprobs_T: np.ndarray
    """float32 [T]: log-probability that the behaviour policy rejects (-inf where forced)."""
    policy_versions_T: np.ndarray
    """int64 [T]: version of the weights that took the decision."""
    finish_reason: FinishReason
    """``eos``: an end-of-sequence token was accepted; ``length``: the limit was reached."""
    started_at_s: float
    """Unix time at which the prompt entered the batch."""
    finished_at_s: float
    """Unix time of the last decision."""
    scores: dict[str, float] = field(default_factory=dict)
    """One raw score for each reward model, by name."""
    prefix_scores: dict[str, np.ndarray] = field(default_factory=dict)
    """float32 [N] for each reward model that can judge an unfinished answer: the raw score of the first
    n tokens, n = 1 … N. The last entry is the model's score of the whole answer."""

    @property
    def num_decisions(self) -> int:
        return len(self.actions_T)

    @property
    def num_tokens(self) -> int:
        return len(self.response_ids_N)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = [getattr(self, name) for name in self.__slots__ if name.endswith(("_T", "_P", "_N"))]
        arrays += self.prefix_scores.values()
        states = self.states_TD
        return sum(int(a.nbytes) for a in arrays) + states.numel() * states.element_size()


def policy_token_logprobs(episode: Episode) -> np.ndarray:
    """Log-probability with which the behaviour policy picks each candidate it was asked about (Eq. 6).

    Accepting candidate k of a set means rejecting the k - 1 before it:
    ``log pi(t_k) = log p(accept | k) + sum_{j<k} log p(reject | j)``, the sum over the same position.
    The last candidate is forced, so these probabilities sum to one over the set.

    Where the first candidate is retaken because all were rejected, two ways lead to it, and that record has
    the probability of both: ``p(accept | 1) + prod_j p(reject | j)``. It stands at the acceptance that
    happened; the rejection of the first candidate before it keeps ``p(accept | 1)``, and over the set the sum
    is one without that rejection.

    Returns float32 [T]. Example: accept probabilities 0.6 and (forced) 1.0 at one position give
    log 0.6 and log 0.4. If both candidates are asked about, with 0.6 and 0.5, and rejected, the three records
    have log 0.6, log 0.2 and log (0.6 + 0.2).
    """
    logprobs_T = np.empty(episode.num_decisions, np.float32)
    rejected_so_far, opened_at = 0.0, 0
    for t in range(episode.num_decisions):
        if t == 0 or episode.positions_T[t] != episode.positions_T[t - 1]:
            rejected_so_far, opened_at = 0.0, t
        logprobs_T[t] = rejected_so_far + episode.accept_logprobs_T[t]
        if t > opened_at and episode.ranks_T[t] == 0:
            logprobs_T[t] = np.logaddexp(logprobs_T[t], logprobs_T[opened_at])
        rejected_so_far += episode.reject_logprobs_T[t]
    return logprobs_T
