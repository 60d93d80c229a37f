"""The benchmarks of replay: sampling against a bare gather and other libraries, writing against raw Redis,
and how soon published weights are used.

Legend: B transitions of a batch, T decisions of an episode, D hidden size of the LLM.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch

from mara.actors.config import RolloutConfig
from mara.buffer.codec import encode_episode
from mara.buffer.config import APPEND_BYTES, ReplayConfig, ShapingConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog, RedisEpisodeReader
from mara.buffer.mirror import Mirror
from mara.buffer.server import EmbeddedServer
from mara.buffer.shared_weights import SharedWeights
from mara.buffer.weights import RedisWeightChannel
from mara.common.agent import Agent, agent_digest, why_unfit
from mara.common.config import AgentConfig
from mara.common.episode import Episode
from mara.common.extras import install_extra
from mara.deploy.bench.figures import Figure, Rounds, check_json_path, in_turn, machine, report
from mara.deploy.bench.synthetic import NUM_DECISIONS, synthetic_episodes

LOG_BYTES = 256 << 20
"""Bound of the log that is written to: in every round after the first the oldest episodes make room."""
RING_BYTES = 512 << 20
"""Of the states that are sampled from: larger than the last-level cache of the machines of today."""
_SAMPLES_A_ROUND = 30
_DISTINCT_EPISODES = 32

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured with."""

    hidden_size: int = 4096
    batch_size: int = 1024
    ring_bytes: int = RING_BYTES
    append_bytes: int = LOG_BYTES
    """Of the episodes that each side writes in a round."""
    num_threads: int = 1
    """Of torch, as in the learner."""

    @property
    def capacity(self) -> int:
        """Transitions in the ring, whole episodes."""
        return max(2, self.ring_bytes // (2 * self.hidden_size * NUM_DECISIONS)) * NUM_DECISIONS


def bench_replay(sizes: Sizes, num_rounds: int, json_file: Path | None, say: Say) -> None:
    """``mara bench replay``.

    Raises:
        UserError: the JSON file cannot be written, or there is no server program.
    """
    check_json_path(json_file)
    torch.set_num_threads(sizes.num_threads)
    report([*_sampling(sizes, num_rounds, say), *_writing(sizes, num_rounds, say)], json_file)


def _sampling(sizes: Sizes, num_rounds: int, say: Say) -> list[Figure]:
    """The mirror against a bare gather, TorchRL and cpprb, each holding the same transitions."""
    mirror = Mirror(
        sizes.hidden_size,
        ReplayConfig(capacity_transitions=sizes.capacity),
        ShapingConfig(score_weights={"helpful": 1.0}),
    )
    episodes = synthetic_episodes(_DISTINCT_EPISODES, sizes.hidden_size)
    say(f"filling the ring with {sizes.capacity} transitions")
    while mirror.num_transitions < sizes.capacity:
        mirror.add(episodes)
    B = sizes.batch_size
    generator = torch.Generator().manual_seed(1)
    ours = _rate(lambda: mirror.sample(B, generator), B)
    peers: dict[str, tuple[str, Callable[[], Callable[[], object]]]] = {
        "sample_vs_bare_gather": (
            "two torch.index_select of the states, into memory that is used again",
            lambda: _bare_gather(sizes),
        ),
        "sample_vs_torchrl": (
            "torchrl.data.TensorDictReplayBuffer on LazyTensorStorage",
            lambda: _torchrl(sizes, episodes),
        ),
        "sample_vs_cpprb": ("cpprb.ReplayBuffer with next_of", lambda: _cpprb(sizes, episodes)),
    }
    figures = []
    for name, (peer, make) in peers.items():
        try:
            sample = make()
        except ImportError as error:
            say(f"{name}: left out, {error.name} is not installed; {install_extra('bench')}")
            continue
        say(f"{name}: {num_rounds} rounds")
        theirs = _rate(sample, B)
        ours(0), theirs(0)  # warm
        rounds = in_turn(ours, theirs, num_rounds)
        figures.append(
            _figure(name, rounds, "transitions/s", peer, sizes, bytes_per_transition=_ring_bytes(mirror))
        )
        del sample, theirs
    return figures


def _ring_bytes(mirror: Mirror) -> float:
    return mirror.nbytes / mirror.num_transitions


def _rate(sample: Callable[[], object], batch_size: int) -> Callable[[int], float]:
    """Measures transitions per second of ``sample``, which draws ``batch_size`` of them."""

    def measure(_round: int) -> float:
        times = []
        for _ in range(_SAMPLES_A_ROUND):
            began = time.perf_counter()
            sample()
            times.append(time.perf_counter() - began)
        return batch_size / float(np.median(times))

    return measure


def _bare_gather(sizes: Sizes) -> Callable[[], object]:
    ring_CD = torch.randn(sizes.capacity, sizes.hidden_size).to(torch.float16)
    states_BD = ring_CD.new_empty(sizes.batch_size, sizes.hidden_size)
    next_states_BD = torch.empty_like(states_BD)

    def sample() -> None:
        slots_B = torch.randint(sizes.capacity - 1, (sizes.batch_size,))
        torch.index_select(ring_CD, 0, slots_B, out=states_BD)
        torch.index_select(ring_CD, 0, slots_B + 1, out=next_states_BD)

    return sample


def _torchrl(sizes: Sizes, episodes: Sequence[Episode]) -> Callable[[], object]:
    from tensordict import TensorDict  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from torchrl.data import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        LazyTensorStorage,
        TensorDictReplayBuffer,
    )

    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(sizes.capacity), batch_size=sizes.batch_size)
    for number in range(sizes.capacity // NUM_DECISIONS):
        columns = _columns(episodes[number % len(episodes)])
        buffer.extend(
            TensorDict(
                {name: torch.from_numpy(column) for name, column in columns.items()},
                batch_size=[NUM_DECISIONS],
            )
        )
    return lambda: buffer.sample()


def _cpprb(sizes: Sizes, episodes: Sequence[Episode]) -> Callable[[], object]:
    from cpprb import ReplayBuffer  # type: ignore[import-not-found,import-untyped,unused-ignore]

    columns = _columns(episodes[0])
    shapes = {
        name: {"shape": column.shape[1:] or 1, "dtype": column.dtype}
        for name, column in columns.items()
        if name != "next_state"
    }
    buffer = ReplayBuffer(sizes.capacity, shapes, next_of="state")
    for number in range(sizes.capacity // NUM_DECISIONS):
        buffer.add(**_columns(episodes[number % len(episodes)]))
        buffer.on_episode_end()
    return lambda: buffer.sample(sizes.batch_size)


def _columns(episode: Episode) -> dict[str, np.ndarray]:
    """What a transition has in a library that keeps each by itself."""
    states_TD = episode.states_TD.numpy()
    T = len(states_TD)
    last_T = np.arange(T) == T - 1
    return {
        "state": states_TD,
        "next_state": np.concatenate([states_TD[1:], states_TD[-1:]]),
        "action": episode.actions_T,
        "reward": np.where(last_T, 0.5, 0.0).astype(np.float32),
        "discount": np.where(last_T, 0.0, 0.99).astype(np.float32),
        "forced": episode.forced_T,
        "next_forced": episode.forced_T,
        "behaviour_logprob": episode.accept_logprobs_T,
        "policy_version": episode.policy_versions_T,
    }


def _writing(sizes: Sizes, num_rounds: int, say: Say) -> list[Figure]:
    """One writer's episodes against raw pipelined writes of the same bytes, without and with a file."""
    figures = []
    for name, is_durable in (("insert_vs_raw_redis", False), ("insert_durable_vs_raw_redis", True)):
        say(f"{name}: {num_rounds} rounds")
        with ExitStack() as exits:
            folder = Path(exits.enter_context(tempfile.TemporaryDirectory())) if is_durable else None
            config = ReplayConfig(log_max_bytes=LOG_BYTES)
            server = exits.enter_context(EmbeddedServer(config.store_max_bytes(1), data_dir=folder))
            writing = _Writing(connect(server.url), config, sizes)
            writing.ours(-1), writing.raw(-1)  # fills both logs
            rounds = in_turn(writing.ours, writing.raw, num_rounds)
            tailing = [writing.tail() for _ in range(num_rounds)]
        figures.append(
            _figure(
                name,
                rounds,
                "transitions/s",
                "XADD of the encoded episodes in pipelines, with MAXLEN",
                sizes,
                append_only_file="everysec" if is_durable else "none",
                tail_transitions_per_s=float(np.median(tailing)),
            )
        )
    return figures


class _Writing:
    """Writes the same episodes with the replay log and with bare commands."""

    def __init__(self, client: redis.Redis, config: ReplayConfig, sizes: Sizes) -> None:
        self._client = client
        self._config = config
        self._episodes = synthetic_episodes(_DISTINCT_EPISODES, sizes.hidden_size)
        self._records = [encode_episode(episode) for episode in self._episodes]
        self._count = max(1, sizes.append_bytes // len(self._records[0]))
        self._log = RedisEpisodeLog(client, "bench", config)
        self._at_a_time = max(1, APPEND_BYTES // len(self._records[0]))

    def ours(self, number: int) -> float:
        """Transitions per second of the replay log: encoding, uids, the account of bytes, trimming."""
        episodes = [
            replace(self._episodes[index % len(self._episodes)], uid=f"{number}-{index}")
            for index in range(self._count)
        ]
        began = time.perf_counter()
        for start in range(0, self._count, self._at_a_time):
            self._log.append(episodes[start : start + self._at_a_time])
        return self._count * NUM_DECISIONS / (time.perf_counter() - began)

    def raw(self, _round: int) -> float:
        """Transitions per second of XADD with records that are encoded already, as many in a round trip."""
        most = self._config.log_max_bytes // len(self._records[0])
        began = time.perf_counter()
        for start in range(0, self._count, self._at_a_time):
            pipeline = self._client.pipeline(transaction=False)
            for index in range(start, min(start + self._at_a_time, self._count)):
                record = self._records[index % len(self._records)]
                pipeline.xadd("raw", {"e": record}, maxlen=most, approximate=False)
            pipeline.execute()
        return self._count * NUM_DECISIONS / (time.perf_counter() - began)

    def tail(self) -> float:
        """Transitions per second of a reader that goes through the whole log and decodes it."""
        reader = RedisEpisodeReader(self._client, "bench", self._config)
        num_read = 0
        began = time.perf_counter()
        while episodes := reader.read(64, timeout_s=0.0):
            num_read += len(episodes)
        return num_read * NUM_DECISIONS / (time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class WeightsSizes:
    """An agent, and who waits for its weights."""

    hidden_size: int = 4096
    widths: tuple[int, int] = (1024, 256)
    """With the hidden size the paper's agent of 4.47 M parameters."""
    num_subscribers: int = 32
    num_publications: int = 10
    publish_period_s: float = 1.0
    poll_s: float = RolloutConfig().weights_poll_s
    """Time between two looks of a subscriber."""


DECODING_STEP_S = 0.02
"""About a pass of an 8 B model over 64 rows on a data-centre GPU: twice the time in which its memory can read
the weights. Every slower step makes the look for newer weights a smaller share."""


def bench_weights(sizes: WeightsSizes, num_rounds: int, json_file: Path | None, say: Say) -> None:
    """``mara bench weights``: from publication to use, with many subscribers, a thread and connection each.

    Raises:
        UserError: the JSON file cannot be written, or there is no server program.
    """
    check_json_path(json_file)
    torch.set_num_threads(1)  # the subscribers are threads enough
    say(f"{num_rounds} × {sizes.num_publications} publications to {sizes.num_subscribers} subscribers")
    store = ReplayConfig(log_max_bytes=1 << 20).store_max_bytes(sizes.num_subscribers)
    with EmbeddedServer(store) as server:
        rounds = [_publish_and_apply(server.url, f"bench-{number}", sizes) for number in range(num_rounds)]
        look_s = _look_s(server.url, sizes)
    latencies_s = [latency for latencies in rounds for latency in latencies]
    num_expected = num_rounds * sizes.num_publications * sizes.num_subscribers
    conditions = machine() | {
        "subscribers": sizes.num_subscribers,
        "hidden_size": sizes.hidden_size,
        "widths": list(sizes.widths),
        "poll_s": sizes.poll_s,
        "publications": num_rounds * sizes.num_publications,
        "overtaken": num_expected - len(latencies_s),
        "median_s": float(np.median(latencies_s)),
        "largest_s": float(np.max(latencies_s)),
    }
    report(
        [
            Figure(
                figure="publish_to_applied_p95_s",
                value=float(np.quantile(latencies_s, 0.95)),
                unit="s",
                conditions=conditions,
            ),
            Figure(
                figure="look_for_weights_share_of_step",
                value=look_s / DECODING_STEP_S,
                unit="share",
                conditions=machine() | {"look_s": look_s, "decoding_step_s": DECODING_STEP_S},
            ),
        ],
        json_file,
    )


def _publish_and_apply(url: str, run_id: str, sizes: WeightsSizes) -> list[float]:
    """Seconds from each publication to the moment each subscriber had it in its agent."""
    config = AgentConfig(widths=sizes.widths)
    latencies_s: list[float] = []
    ended = threading.Event()

    def subscribe() -> None:
        """What a rollout actor does between two decoding steps."""
        agent, version = Agent(sizes.hidden_size, config), -1
        with SharedWeights(RedisWeightChannel(connect(url), run_id), run_id) as source:
            while not ended.wait(sizes.poll_s):
                newer = source.fetch_newer(version)
                if newer is not None and not why_unfit(agent, newer):
                    agent.load_state_dict(newer.tensors, assign=True)
                    version = newer.version
                    latencies_s.append(time.time() - newer.published_at_s)

    threads = [threading.Thread(target=subscribe) for _ in range(sizes.num_subscribers)]
    for thread in threads:
        thread.start()
    digest = agent_digest(sizes.hidden_size, config)
    sink, agent = RedisWeightChannel(connect(url), run_id, None, digest), Agent(sizes.hidden_size, config)
    for version in range(sizes.num_publications):
        time.sleep(sizes.publish_period_s)
        sink.publish(version, agent.state_dict())
    time.sleep(sizes.publish_period_s)
    ended.set()
    for thread in threads:
        thread.join()
    return latencies_s


def _look_s(url: str, sizes: WeightsSizes) -> float:
    """Median seconds of a look that finds nothing newer."""
    sink = RedisWeightChannel(connect(url), "looks")
    sink.publish(0, Agent(sizes.hidden_size, AgentConfig(widths=sizes.widths)).state_dict())
    times_s = []
    for _ in range(1000):
        began = time.perf_counter()
        sink.fetch_newer(0)
        times_s.append(time.perf_counter() - began)
    return float(np.median(times_s))


def _figure(name: str, rounds: Rounds, unit: str, peer: str, sizes: Sizes, **conditions: Any) -> Figure:
    return Figure(
        figure=name,
        value=float(np.median(rounds.ours)),
        unit=unit,
        peer=peer,
        ratio=rounds.ratio,
        conditions=machine()
        | {
            "hidden_size": sizes.hidden_size,
            "batch_size": sizes.batch_size,
            "capacity": sizes.capacity,
            "decisions_an_episode": NUM_DECISIONS,
            "rounds": len(rounds.ours),
            "peer_value": float(np.median(rounds.peers)),
            **conditions,
        },
    )
