"""Episodes that could have happened, and a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
import torch

from mara.buffer.connection import connect
from mara.buffer.server import EmbeddedServer
from mara.common.episode import Episode

torch.set_num_threads(1)


def _decisions(
    rng: np.random.Generator, num_tokens: int, fallback: str
) -> list[tuple[int, int, int, bool, bool]]:
    """(position, rank, candidates, accepted, forced) of each decision of one answer."""
    decisions = []
    for position in range(num_tokens):
        num_candidates = int(rng.integers(1, 6))
        if num_candidates == 1:
            continue
        for rank in range(num_candidates):
            forced = fallback == "last" and rank == num_candidates - 1
            accepted = forced or bool(rng.random() < 0.5)
            decisions.append((position, rank, num_candidates, accepted, forced))
            if accepted:
                break
        else:
            decisions.append((position, 0, num_candidates, True, True))
    return decisions


def build_episode(
    uid: str = "e",
    seed: int = 0,
    num_tokens: int = 6,
    hidden_size: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    prompt_id: str = "p",
    scores: dict[str, float] | None = None,
    fallback: str = "last",
) -> Episode:
    rng = np.random.default_rng(seed)
    decisions = _decisions(rng, num_tokens, fallback)
    scores = {"helpful": float(rng.normal())} if scores is None else scores
    columns = np.array(decisions, np.int64).reshape(-1, 5).T
    position, rank, num_candidates, accepted, forced = columns
    forced_T = forced.astype(np.bool_)
    accept_T = rng.uniform(0.05, 0.95, len(decisions))
    with np.errstate(divide="ignore"):
        accept_logprobs_T = np.where(forced_T, 0.0, np.log(accept_T)).astype(np.float32)
        reject_logprobs_T = np.where(forced_T, -np.inf, np.log1p(-accept_T)).astype(np.float32)
    prompt_ids_P = rng.integers(0, 1000, 3).astype(np.int32)
    response_ids_N = rng.integers(0, 1000, num_tokens).astype(np.int32)
    states_TD = rng.normal(size=(len(decisions), hidden_size))
    reference_logprobs_T = np.log(rng.uniform(0.05, 0.5, len(decisions))).astype(np.float32)
    retaken = np.flatnonzero(forced_T & (rank == 0))  # The first candidate of its set once more.
    for column_T in (states_TD, reference_logprobs_T):
        column_T[retaken] = column_T[retaken - num_candidates[retaken]]
    return Episode(
        uid=uid,
        prompt_id=prompt_id,
        actor_id="actor-0",
        prompt_ids_P=prompt_ids_P,
        response_ids_N=response_ids_N,
        states_TD=torch.from_numpy(states_TD).to(dtype),
        actions_T=accepted.astype(np.uint8),
        ranks_T=rank.astype(np.int16),
        num_candidates_T=num_candidates.astype(np.int16),
        positions_T=position.astype(np.int32),
        forced_T=forced_T,
        reference_logprobs_T=reference_logprobs_T,
        accept_logprobs_T=accept_logprobs_T,
        reject_logprobs_T=reject_logprobs_T,
        policy_versions_T=np.sort(rng.integers(0, 9, len(decisions))).astype(np.int64),
        finish_reason="eos",
        started_at_s=1.5,
        finished_at_s=2.5,
        scores=scores,
        prefix_scores={
            name: np.append(rng.normal(size=max(0, num_tokens - 1)), [score] * min(1, num_tokens)).astype(
                np.float32
            )
            for name, score in scores.items()
        },
    )


@pytest.fixture(scope="session")
def make_episode() -> Callable[..., Episode]:
    """``build_episode``; equal arguments give equal episodes."""
    return build_episode


@pytest.fixture(scope="session")
def same() -> Callable[[Episode, Episode], bool]:
    """Whether two episodes agree in every field, bit for bit."""

    def agree(one: Episode, other: Episode) -> bool:
        for name in Episode.__slots__:
            a, b = getattr(one, name), getattr(other, name)
            if isinstance(a, torch.Tensor):
                equal = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
            elif isinstance(a, np.ndarray):
                equal = a.dtype == b.dtype and np.array_equal(a, b)
            elif name == "prefix_scores":
                equal = a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
            else:
                equal = a == b
            if not equal:
                return False
        return True

    return agree


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """A server in memory, shared by the tests; each uses a run id of its own."""
    with EmbeddedServer(max_bytes=256 << 20) as running:
        yield running


@pytest.fixture
def durable_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, whose data survive a restart."""
    with EmbeddedServer(max_bytes=64 << 20, data_dir=tmp_path / "store") as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    connection = connect(server.url)
    yield connection
    connection.close()


@pytest.fixture
def run_id(request: pytest.FixtureRequest) -> str:
    """A run id that no other test uses."""
    return f"run-{abs(hash(request.node.nodeid))}"
