"""The process of one rollout actor."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mara.actors.prompts import Prompt
from mara.actors.rollout import RolloutWorker
from mara.actors.scoring import Judge
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.shared_weights import SharedWeights
from mara.buffer.weights import RedisWeightChannel
from mara.buffer.writer import BufferedSink
from mara.common.contracts import RewardModel
from mara.deploy.process import LOADING, RUNNING, STARTING, HostSpec, Report, log_to

FLUSH_S = 5.0
"""How long an actor that ends goes on storing the episodes it still has, seconds."""


class RemoteModel(RewardModel, Protocol):
    """A reward model in processes of its own."""

    def wait_until_loaded(self, should_stop: threading.Event) -> None:
        """Wait until each of its processes has loaded its model, or ``should_stop`` is set."""
        ...


@dataclass(frozen=True, slots=True)
class RolloutSpec(HostSpec):
    prompts: tuple[Prompt, ...]
    number: int = 0
    """Which of the run's actors this is, from 0; one that replaces another has its number."""
    reward_models: Mapping[str, RemoteModel] = field(default_factory=dict)
    """Reward models that are no heads, by name."""


class RolloutHost:
    """One rollout actor: its own frozen LLM, decoding until it is stopped."""

    def __init__(self, spec: RolloutSpec) -> None:
        self._spec = spec
        self._stop = threading.Event()
        self._worker: RolloutWorker | None = None
        self._sink: BufferedSink | None = None
        self._phase = STARTING

    def run(self) -> None:
        """Make episodes until :meth:`stop`. Blocks."""
        log_to(self._spec.log_file)
        self._phase = LOADING
        config = self._spec.config
        shard = self._spec.number % config.replay.num_shards
        log = RedisEpisodeLog(self._spec.connect(shard), self._spec.run_id, config.replay, shard)
        self._sink = BufferedSink(log, config.replay.writer_buffer_bytes)
        channel = RedisWeightChannel(self._spec.connect(), self._spec.run_id, config.replay)
        weights = SharedWeights(channel, self._spec.run_id)
        self._worker = RolloutWorker(
            config.llm,
            config.decoding,
            config.rollout,
            config.agent,
            {name: head.path for name, head in config.heads.items()},
            self._spec.prompts,
            self._sink,
            weights,
            self._spec.name,
            config.run.seed,
            {
                name: Judge(model, config.reward_models[name].max_outage_s)
                for name, model in self._spec.reward_models.items()
            },
        )
        self._phase = RUNNING
        try:
            for model in self._spec.reward_models.values():
                model.wait_until_loaded(self._stop)
            self._worker.run(self._stop)
        finally:
            self._sink.close(FLUSH_S)
            weights.close()

    def stop(self) -> None:
        """End :meth:`run` after the current decoding step. Returns at once."""
        self._stop.set()

    def report(self) -> Report:
        """Phase and metrics now. Returns at once."""
        if self._worker is None or self._sink is None:
            return Report(self._phase, os.getpid(), {}, [])
        return Report(self._phase, os.getpid(), self._worker.metrics() | self._sink.metrics, [])
