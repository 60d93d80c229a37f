"""The benchmark of the learner: a gradient step on a live log against one on a static batch, against the
authors' way of feeding it, and against what the hardware could do.

Legend: B transitions of a batch, D hidden size of the LLM.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from mara.buffer.background import BackgroundReader
from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog, RedisEpisodeReader
from mara.buffer.publisher import BackgroundWeights
from mara.buffer.server import EmbeddedServer
from mara.buffer.weights import RedisWeightChannel
from mara.common.agent import agent_digest
from mara.common.config import AgentConfig
from mara.common.contracts import LogReader, WeightSink
from mara.common.errors import UserError
from mara.deploy.bench.figures import Figure, Rounds, check_json_path, in_turn, machine, report
from mara.deploy.bench.list_learner import ListLearner
from mara.deploy.bench.replay import NUM_DECISIONS, synthetic_episodes
from mara.learner.config import LearnerConfig, SACConfig
from mara.learner.loop import Learner

Say = Callable[[str], None]
Precision = Literal["float32", "bfloat16"]

_RUN = "bench"
_DISTINCT_EPISODES = 32
_LOG_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class LearnerSizes:
    """What is measured with; the defaults are the paper's."""

    hidden_size: int = 4096
    batch_size: int = 1024
    widths: tuple[int, int] = (1024, 256)
    """Of the agent and of each critic head."""
    capacity: int = 1_000_000
    """Transitions in the ring, which is full. Fewer where they would take more than half of the memory."""
    peer_capacity: int = 2048
    """Transitions in the peer's lists."""
    inserted_per_s: float = 5000.0
    """Transitions that another process appends to the log: about what one GPU writes with an 8 B LLM."""
    live_s: float = 20.0
    """How long the learner trains on the log that grows."""
    precision: Precision = "float32"
    device: str = "auto"
    num_threads: int = 1
    """Of torch, in the learner and in the peer."""

    @property
    def agent(self) -> AgentConfig:
        return AgentConfig(widths=self.widths)

    @property
    def sac(self) -> SACConfig:
        return SACConfig(critic_widths=self.widths, precision=self.precision)


def bench_learner(sizes: LearnerSizes, num_rounds: int, json_file: Path | None, say: Say) -> None:
    """``mara bench learner``.

    Raises:
        UserError: the JSON file cannot be written, there is no server program, or no such device.
    """
    check_json_path(json_file)
    sizes = replace(sizes, capacity=_affordable(sizes))
    store = ReplayConfig(log_max_bytes=_LOG_BYTES)
    digest = agent_digest(sizes.hidden_size, sizes.agent)
    with (
        EmbeddedServer(store.store_max_bytes(2)) as server,
        BackgroundReader(RedisEpisodeReader(connect(server.url), _RUN, store)) as source,
        BackgroundWeights(RedisWeightChannel(connect(server.url), _RUN, store, digest)) as weights,
    ):
        learner, rows = _make_learner(sizes, source, weights)
        figures = _alone(sizes, learner, num_rounds, say)
        figures.append(_live(sizes, learner, rows, server.url, say))
    report(figures, json_file)


def _affordable(sizes: LearnerSizes) -> int:
    """Transitions that half of the free memory holds, at most those wanted, in whole episodes."""
    if torch.cuda.is_available() and sizes.device != "cpu":
        free_bytes, _ = torch.cuda.mem_get_info()
    else:
        free_bytes = psutil.virtual_memory().available
    most = min(sizes.capacity, free_bytes // 2 // (2 * sizes.hidden_size + 22))
    if most < 2 * NUM_DECISIONS:
        raise UserError(
            f"--capacity: {most} transitions are too few to measure with; give more, or free memory"
        )
    return most // NUM_DECISIONS * NUM_DECISIONS


def _make_learner(
    sizes: LearnerSizes, source: LogReader, weights: WeightSink
) -> tuple[Learner, list[tuple[float, dict[str, float]]]]:
    """A learner that never has to wait, with a full ring, and the list of its rows, each with its time."""
    rows: list[tuple[float, dict[str, float]]] = []
    config = LearnerConfig(
        sac=sizes.sac,
        batch_size=sizes.batch_size,
        num_episodes=1_000_000_000,
        gradient_steps_per_episode=10_000.0,
        start_batches=1,
        log_period_s=1.0,
        device=sizes.device,
        num_threads=sizes.num_threads,
    )
    learner = Learner(
        config,
        sizes.agent,
        ReplayConfig(capacity_transitions=sizes.capacity),
        ShapingConfig(score_weights={"helpful": 1.0}),
        hidden_size=sizes.hidden_size,
        source=source,
        weights=weights,
        on_metrics=lambda row: rows.append((time.monotonic(), row)),
    )
    episodes = synthetic_episodes(_DISTINCT_EPISODES, sizes.hidden_size)
    while learner.mirror.num_transitions < sizes.capacity:
        learner.mirror.add(episodes)
    return learner, rows


def _alone(sizes: LearnerSizes, learner: Learner, num_rounds: int, say: Say) -> list[Figure]:
    """The learner's feed and step against the authors' way and the hardware, with nothing else going on."""
    torch.set_num_threads(sizes.num_threads)
    device, B = learner.sac.device, sizes.batch_size
    say(f"the authors' way: {sizes.peer_capacity} transitions as lists")
    peer = ListLearner(sizes.hidden_size, sizes.widths, sizes.sac, sizes.peer_capacity, B, device)
    draws = torch.Generator().manual_seed(1)
    batch = learner.mirror.sample(B, draws)
    feed = _per_second(lambda: learner.mirror.sample(B, draws), 20, device)
    step = _per_second(lambda: learner.sac.update(batch), 5, device)
    whole = _per_second(lambda: learner.sac.update(learner.mirror.sample(B, draws)), 5, device)
    their_feed = _per_second(peer.sample, 2, device)
    their_whole = _per_second(lambda: peer.update(peer.sample()), 2, device)
    for measure in (feed, whole, their_whole):
        measure(0)  # warm
    say(f"feed and step: {num_rounds} rounds")
    feeds = in_turn(feed, their_feed, num_rounds)
    wholes = in_turn(whole, their_whole, num_rounds)
    say(f"the hardware: {num_rounds} rounds")
    ceilings: list[dict[str, float]] = []

    def floor(_round: int) -> float:
        ceilings.append(_ceilings(device, sizes.precision))
        return 1 / floor_s(sizes, **ceilings[-1])

    floors = in_turn(step, floor, num_rounds)
    measured = {name: statistics.median(c[name] for c in ceilings) for name in ceilings[0]}
    bytes_each = learner.mirror.nbytes / learner.mirror.num_transitions
    way = "lists of Python floats, unshared passes"
    return [
        _figure("step_vs_list_feed", sizes, wholes, "updates/s", way),
        _figure("feed_vs_list_feed", sizes, feeds, "batches/s", "random.sample, tensors of lists"),
        Figure(
            figure="memory_vs_list_feed",
            value=bytes_each,
            unit="bytes",
            peer=way,
            ratio=peer.bytes_per_transition / bytes_each,
            conditions=_conditions(sizes) | {"peer_value": peer.bytes_per_transition},
        ),
        Figure(
            figure="updates_per_s",
            value=statistics.median(wholes.ours),
            unit="updates/s",
            conditions=_conditions(sizes),
        ),
        _figure(
            "step_vs_floor", sizes, floors, "updates/s", "FLOPs and bytes over measured ceilings", **measured
        ),
    ]


def _live(
    sizes: LearnerSizes, learner: Learner, rows: list[tuple[float, dict[str, float]]], url: str, say: Say
) -> Figure:
    """The whole loop while another process writes, against a step on one batch before and after that."""
    say(f"{sizes.live_s:.0f} s of training while {sizes.inserted_per_s:.0f} transitions/s are written")
    kept = learner.mirror.sample(sizes.batch_size)
    batch = replace(kept, states_BD=kept.states_BD.clone(), next_states_BD=kept.next_states_BD.clone())
    num_steps = max(
        3, round(sizes.live_s / 4 * _per_second(lambda: learner.sac.update(batch), 3, learner.sac.device)(0))
    )
    static = _per_second(lambda: learner.sac.update(batch), num_steps, learner.sac.device)
    before = static(0)
    context = multiprocessing.get_context("spawn")
    is_writing, ended = context.Event(), context.Event()
    writer = context.Process(
        target=_write, args=(url, sizes.hidden_size, sizes.inserted_per_s, is_writing, ended)
    )
    writer.start()
    try:
        while not is_writing.wait(0.1):
            if not writer.is_alive():
                raise RuntimeError(f"the process that writes ended with status {writer.exitcode}")
        threading.Timer(sizes.live_s, learner.stop).start()
        learner.run()
    finally:
        ended.set()
        writer.join()
    after = static(0)
    # The first row covers the start, the last the end.
    (began_s, first), *_, (ended_s, last) = rows[:-1]
    seconds = ended_s - began_s
    live = (last["learner/gradient_step"] - first["learner/gradient_step"]) / seconds
    between = [row for _, row in rows[1:-1]]
    return Figure(
        figure="live_feed_vs_static_batch",
        value=live,
        unit="updates/s",
        peer="SAC.update on one batch, nothing else running",
        ratio=2 * live / (before + after),
        conditions=_conditions(sizes)
        | {
            "peer_value": (before + after) / 2,
            "static_before": before,
            "static_after": after,
            "live_s": seconds,
            "inserted_per_s": statistics.mean(row["replay/insert_rate"] for row in between),
            "idle_ratio": statistics.mean(row["learner/idle_ratio"] for row in between),
            "publish_period_s": learner.config.publish_period_s,
        },
    )


def _write(url: str, hidden_size: int, per_s: float, is_writing: Event, ended: Event) -> None:
    """What rollout actors do to the log: append episodes at an even pace."""
    torch.set_num_threads(1)
    log = RedisEpisodeLog(connect(url), _RUN, ReplayConfig(log_max_bytes=_LOG_BYTES))
    episodes = synthetic_episodes(_DISTINCT_EPISODES, hidden_size, seed=1)
    period_s, number, began = NUM_DECISIONS / per_s, 0, time.monotonic()
    while not ended.wait(max(0.0, began + number * period_s - time.monotonic())):
        log.append([replace(episodes[number % len(episodes)], uid=f"live-{number}")])
        number += 1
        is_writing.set()


def floor_s(sizes: LearnerSizes, flops_per_s: float, bytes_per_s: float) -> float:
    """The least seconds that a gradient step can take, by the products and the memory traffic it needs.

    The gradients take at least their products and at least the reading of states and weights; the optimisers
    need all of them for their norm, so they come after, and go through weights, gradients and two moments.
    Counted are the agent twice forward (states, next states), critic and target critic once, and agent and
    critic backward, where the first layer needs no gradient of its input.
    """
    D, (first, second), B = sizes.hidden_size, sizes.widths, sizes.batch_size
    outer, inner = D * first, first * second + 2 * second
    agent, critic = outer + inner, 2 * (outer + inner)  # weights; the critic has two heads
    forward = 2 * agent + 2 * critic
    backward = (outer + 2 * inner) + 2 * (outer + 2 * inner)
    flops = 2 * B * (forward + backward)
    gradient_bytes = 2 * B * D * 2 + 4 * (agent + 2 * critic) + 4 * (agent + critic)
    optimiser_bytes = 4 * 7 * (agent + critic) + 4 * 3 * critic / sizes.sac.target_update_period
    return max(flops / flops_per_s, gradient_bytes / bytes_per_s) + optimiser_bytes / bytes_per_s


def _ceilings(device: torch.device, precision: Precision) -> dict[str, float]:
    """The best rate of products of square matrices, and of copies larger than any cache, of five each."""
    size = 4096 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    long = torch.zeros(64 << 20, device=device)
    other = torch.empty_like(long)
    products = max(_per_second(lambda: a @ a, 1, device)(0) for _ in range(5))
    copies = max(_per_second(lambda: other.copy_(long), 1, device)(0) for _ in range(5))
    return {"flops_per_s": 2 * size**3 * products, "bytes_per_s": 2 * long.nbytes * copies}


def _per_second(work: Callable[[], object], times: int, device: torch.device) -> Callable[[int], float]:
    """Measures how often a second ``work`` is done, over ``times`` of it, to the end of its work on a GPU."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(_round: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return times / (time.perf_counter() - began)

    return measure


def _figure(
    name: str, sizes: LearnerSizes, rounds: Rounds, unit: str, peer: str, **conditions: Any
) -> Figure:
    return Figure(
        figure=name,
        value=statistics.median(rounds.ours),
        unit=unit,
        peer=peer,
        ratio=rounds.ratio,
        conditions=_conditions(sizes)
        | {"rounds": len(rounds.ours), "peer_value": statistics.median(rounds.peers), **conditions},
    )


def _conditions(sizes: LearnerSizes) -> dict[str, Any]:
    return machine() | {
        "hidden_size": sizes.hidden_size,
        "batch_size": sizes.batch_size,
        "widths": list(sizes.widths),
        "capacity": sizes.capacity,
        "precision": sizes.precision,
        "device": sizes.device,
    }
