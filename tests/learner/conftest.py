"""Small networks, batches and hand-made episodes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mara.common.contracts import TransitionBatch
from mara.common.episode import Episode

EpisodeMaker = Callable[..., Episode]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def same_state() -> Callable[[Any, Any], bool]:
    """Whether two states of a learner agree bit for bit, wherever they read and however long it took."""

    def agree(one: Any, other: Any) -> bool:
        if isinstance(one, dict):
            names = (one.keys() | other.keys()) - {"cursor", "seconds", "idle_s"}
            return all(name in one and name in other and agree(one[name], other[name]) for name in names)
        if isinstance(one, torch.Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        return bool(one == other)

    return agree


@pytest.fixture
def make_batch() -> Callable[..., TransitionBatch]:
    """Random transitions: ``make_batch(num, hidden_size, seed)``."""

    def make(num: int = 32, hidden_size: int = 12, seed: int = 0, **replaced: Any) -> TransitionBatch:
        g = torch.Generator().manual_seed(seed)
        columns = {
            "states_BD": torch.randn(num, hidden_size, generator=g).bfloat16(),
            "next_states_BD": torch.randn(num, hidden_size, generator=g).bfloat16(),
            "actions_B": torch.randint(0, 2, (num,), generator=g),
            "rewards_B": torch.randn(num, generator=g),
            "discounts_B": 0.99 * (torch.rand(num, generator=g) < 0.8),
            "forced_B": torch.rand(num, generator=g) < 0.2,
            "next_forced_B": torch.rand(num, generator=g) < 0.2,
            "behaviour_logprobs_B": -torch.rand(num, generator=g),
            "policy_versions_B": torch.zeros(num, dtype=torch.int64),
        }
        columns["actions_B"][columns["forced_B"]] = 1
        return TransitionBatch(**(columns | replaced))

    return make


@pytest.fixture
def make_episode() -> EpisodeMaker:
    """An episode with the given decisions; states are random, all log-probabilities those of a coin."""
    count = 0

    def make(
        actions: Sequence[int],
        ranks: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        forced: Sequence[bool] | None = None,
        *,
        num_tokens: int | None = None,
        hidden_size: int = 12,
        version: int = 0,
        scores: dict[str, float] | None = None,
        **replaced: Any,
    ) -> Episode:
        nonlocal count
        count += 1
        num = len(actions)
        if positions is None:
            positions = np.concatenate(([0], np.cumsum(actions)[:-1])) if num else []
        forced_T = np.asarray(forced if forced is not None else [False] * num, bool)
        g = torch.Generator().manual_seed(count)
        num_tokens = int(np.sum(actions)) if num_tokens is None else num_tokens
        if ranks is None:  # one more for each rejection since the last acceptance
            ranks = [0] * num
            for t in range(1, num):
                ranks[t] = 0 if actions[t - 1] else ranks[t - 1] + 1
        columns = {
            "uid": f"episode-{count}",
            "prompt_id": "prompt/1",
            "actor_id": "actor-0",
            "prompt_ids_P": np.arange(3, dtype=np.int32),
            "response_ids_N": np.arange(num_tokens, dtype=np.int32),
            "states_TD": torch.randn(num, hidden_size, generator=g).bfloat16(),
            "actions_T": np.asarray(actions, np.uint8),
            "ranks_T": np.asarray(ranks, np.int16),
            "num_candidates_T": np.full(num, 3, np.int16),
            "positions_T": np.asarray(positions, np.int32),
            "forced_T": forced_T,
            "reference_logprobs_T": np.full(num, -1.0, np.float32),
            "accept_logprobs_T": np.where(forced_T, 0.0, np.log(0.5)).astype(np.float32),
            "reject_logprobs_T": np.where(forced_T, -np.inf, np.log(0.5)).astype(np.float32),
            "policy_versions_T": np.full(num, version, np.int64),
            "finish_reason": "eos",
            "started_at_s": 0.0,
            "finished_at_s": 1.0,
            "scores": {"good": 1.0} if scores is None else scores,
        }
        return Episode(**(columns | replaced))

    return make
