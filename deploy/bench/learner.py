"""The benchmark of the learner: the whole loop on a log that grows, against a step on one static batch.

The step by itself is measured in :mod:`mara.deploy.bench.learner_step`.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

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
from mara.common.contracts import LogReader, WeightSink
from mara.common.errors import UserError
from mara.deploy.bench.figures import Figure, check_json_path, report
from mara.deploy.bench.learner_step import (
    DISTINCT_EPISODES,
    LearnerSizes,
    Say,
    conditions,
    fill,
    per_second,
    step_figures,
)
from mara.deploy.bench.synthetic import NUM_DECISIONS, synthetic_episodes
from mara.learner.config import LearnerConfig
from mara.learner.loop import Learner, learner_device

_RUN = "bench"
_LOG_BYTES = 512 << 20
_REAPED_S = 5.0
"""Longest wait for the status of a process that has ended."""


def bench_learner(sizes: LearnerSizes, num_rounds: int, json_file: Path | None, say: Say) -> None:
    """``mara bench learner``.

    Raises:
        UserError: the JSON file cannot be written, there is no server program, no such device, or the process
            that writes to the log ended early.
    """
    check_json_path(json_file)
    if sizes.precision == "tf32" and not _multiplies_tf32(learner_device(sizes.device)):
        raise UserError(
            "--precision=tf32: only NVIDIA GPUs from Ampere on multiply so; give float32 or bfloat16"
        )
    report(learner_figures(sizes, num_rounds, say), json_file)


def _multiplies_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def learner_figures(sizes: LearnerSizes, num_rounds: int, say: Say) -> list[Figure]:
    """The step by itself, then the whole loop.

    Raises:
        UserError: as :func:`bench_learner`.
    """
    sizes = replace(sizes, capacity=_affordable(sizes))
    store = ReplayConfig(log_max_bytes=_LOG_BYTES)
    digest = agent_digest(sizes.hidden_size, sizes.agent)
    with (
        EmbeddedServer(store.store_max_bytes(2)) as server,
        BackgroundReader(RedisEpisodeReader(connect(server.url), _RUN, store)) as source,
        BackgroundWeights(RedisWeightChannel(connect(server.url), _RUN, store, digest)) as weights,
    ):
        learner, rows = _make_learner(sizes, source, weights)
        figures = step_figures(sizes, learner.sac, learner.mirror, num_rounds, say)
        return [*figures, _live(sizes, learner, rows, server.url, say)]


def _affordable(sizes: LearnerSizes) -> int:
    """Transitions that half of the free memory holds, at most those wanted, in whole episodes."""
    device = learner_device(sizes.device)
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
    else:
        free_bytes = psutil.virtual_memory().available
    most = min(sizes.capacity, free_bytes // 2 // (2 * sizes.hidden_size + 22))
    most = most // NUM_DECISIONS * NUM_DECISIONS
    if most < 2 * NUM_DECISIONS:
        raise UserError(
            f"--capacity: {most} transitions are too few to measure with; give more, or free memory"
        )
    if most < sizes.batch_size:
        raise UserError(
            f"--batch-size={sizes.batch_size} is more than the {most} transitions in the replay; lower it, "
            "raise --capacity, or free memory"
        )
    return most


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
    fill(learner.mirror, sizes)
    return learner, rows


def _live(
    sizes: LearnerSizes, learner: Learner, rows: list[tuple[float, dict[str, float]]], url: str, say: Say
) -> Figure:
    """The whole loop while another process writes, against a step on one batch before and after that."""
    say(f"{sizes.live_s:.0f} s of training while {sizes.inserted_per_s:.0f} transitions/s are written")
    kept = learner.mirror.sample(sizes.batch_size, states_dtype=torch.float32)
    batch = replace(kept, states_BD=kept.states_BD.clone(), next_states_BD=kept.next_states_BD.clone())
    num_steps = max(
        3, round(sizes.live_s / 4 * per_second(lambda: learner.sac.update(batch), 3, learner.sac.device)(0))
    )
    static = per_second(lambda: learner.sac.update(batch), num_steps, learner.sac.device)
    before = static(0)
    context = multiprocessing.get_context("spawn")
    is_writing = context.Event()
    writer = context.Process(target=_write, args=(url, sizes.hidden_size, sizes.inserted_per_s, is_writing))
    writer.start()
    try:
        while not is_writing.wait(0.1):
            _check_alive(writer)
        # A row is written after a step: slow steps take longer to make the rows that are needed.
        live_s = max(sizes.live_s, 8 / before)
        threading.Thread(target=_stop_after, args=(learner, live_s, writer.sentinel), daemon=True).start()
        learner.run()
        _check_alive(writer)
    finally:
        writer.terminate()  # not by an event, which would wait for ever for one that was killed
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
        conditions=conditions(sizes)
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


def _stop_after(learner: Learner, seconds: float, sentinel: int) -> None:
    """Stop the learner when ``seconds`` have passed, or when the process of the sentinel has ended."""
    connection.wait([sentinel], seconds)
    learner.stop()


def _check_alive(writer: BaseProcess) -> None:
    # A process that ends closes its files, which the sentinel tells, a moment before it has a status.
    if connection.wait([writer.sentinel], 0):
        writer.join(_REAPED_S)
    if not writer.is_alive():
        raise UserError(
            f"bench learner: the process that writes to the log ended early, with status {writer.exitcode}; "
            "see what it said above, if anything, and measure again"
        )


def _write(url: str, hidden_size: int, per_s: float, is_writing: Event) -> None:
    """What rollout actors do to the log: append episodes at an even pace, until terminated."""
    torch.set_num_threads(1)
    log = RedisEpisodeLog(connect(url), _RUN, ReplayConfig(log_max_bytes=_LOG_BYTES))
    episodes = synthetic_episodes(DISTINCT_EPISODES, hidden_size, seed=1)
    period_s, number, began = NUM_DECISIONS / per_s, 0, time.monotonic()
    while True:
        time.sleep(max(0.0, began + number * period_s - time.monotonic()))
        log.append([replace(episodes[number % len(episodes)], uid=f"live-{number}")])
        number += 1
        is_writing.set()
