"""Episodes without an LLM, for the benchmarks of replay and learner.

Legend: T decisions of an episode, D hidden size of the LLM.
"""

from __future__ import annotations

import numpy as np
import torch

from mara.common.episode import Episode

NUM_DECISIONS = 128
"""Of each episode."""


def synthetic_episodes(count: int, hidden_size: int, seed: int = 0) -> list[Episode]:
    """Answers of :data:`NUM_DECISIONS` decisions that accept the first candidate, with random states."""
    generator = torch.Generator().manual_seed(seed)
    T = NUM_DECISIONS
    logprobs_T = np.full(T, np.log(0.5), np.float32)
    return [
        Episode(
            uid=f"bench-{seed}-{number}",
            prompt_id="bench",
            actor_id="bench",
            prompt_ids_P=np.zeros(64, np.int32),
            response_ids_N=np.zeros(T, np.int32),
            states_TD=torch.randn(T, hidden_size, generator=generator).to(torch.float16),
            actions_T=np.ones(T, np.uint8),
            ranks_T=np.zeros(T, np.int16),
            num_candidates_T=np.full(T, 40, np.int16),
            positions_T=np.arange(T, dtype=np.int32),
            forced_T=np.zeros(T, np.bool_),
            reference_logprobs_T=logprobs_T,
            accept_logprobs_T=logprobs_T,
            reject_logprobs_T=logprobs_T,
            policy_versions_T=np.zeros(T, np.int64),
            finish_reason="length",
            started_at_s=0.0,
            finished_at_s=1.0,
            scores={"helpful": 0.5},
            prefix_scores={},
        )
        for number in range(count)
    ]
