"""The process of the learner."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from mara.buffer.log import RedisEpisodeReader
from mara.buffer.weights import RedisWeightChannel
from mara.deploy.config import RunConfig
from mara.deploy.process import RUNNING, STARTING, HostSpec, Report, log_to
from mara.learner.loop import AGENT_FOLDER, Learner, LearnerSummary


@dataclass(frozen=True, slots=True)
class LearnerSpec(HostSpec):
    hidden_size: int
    """Hidden size of the LLM."""


class LearnerHost:
    """The learner, until it has seen all its episodes or is stopped."""

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._stop = threading.Event()
        self._learner: Learner | None = None
        self._phase = STARTING
        self._rows: deque[dict[str, float]] = deque()

    def run(self) -> LearnerSummary:
        """Train; save the agent and a checkpoint into the run folder at the end. Blocks."""
        log_to(self._spec.log_file)
        config, run_id = self._spec.config, self._spec.run_id
        client = self._spec.connect()
        self._learner = Learner(
            config.learner,
            config.agent,
            config.replay,
            config.weighted_shaping,
            hidden_size=self._spec.hidden_size,
            source=RedisEpisodeReader(client, run_id, config.replay),
            weights=RedisWeightChannel(client, run_id, config.replay),
            seed=config.run.seed,
            on_metrics=self._rows.append,
            run_folder=self._spec.folder,
            agent_card=agent_card(config),
        )
        if self._stop.is_set():
            self._learner.stop()
        self._phase = RUNNING
        return self._learner.run()

    def stop(self) -> None:
        """End :meth:`run` after the current gradient step. Returns at once."""
        self._stop.set()
        if self._learner is not None:
            self._learner.stop()

    def report(self) -> Report:
        """Phase, and the rows of metrics since the last call. Returns at once."""
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        return Report(self._phase, os.getpid(), {}, rows)

    def agent_files(self) -> dict[str, bytes]:
        """Name and content of each file of the saved agent, for a driver on another machine."""
        folder = self._spec.folder / AGENT_FOLDER
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def agent_card(config: RunConfig) -> dict[str, Any]:
    """What is kept beside an agent: what it was trained with and belongs to."""
    content = config.model_dump(mode="json", include={"llm", "decoding", "rewards"})
    return {**content, "seed": config.run.seed}
