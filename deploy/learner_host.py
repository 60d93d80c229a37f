"""The process of the learner."""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara.buffer.background import BackgroundReader
from mara.buffer.memory import MemoryWeightChannel
from mara.buffer.publisher import BackgroundWeights
from mara.buffer.shards import open_reader
from mara.buffer.weights import RedisWeightChannel
from mara.common.agent import agent_digest
from mara.common.errors import UserError
from mara.deploy.process import RUNNING, STARTING, HostSpec, Report, log_to
from mara.deploy.progress import StoppedEarly
from mara.deploy.run_lock import PREDECESSOR_S, hold_run
from mara.learner.checkpoint import load_checkpoint, read_checkpoint, set_newer_aside
from mara.learner.loop import Learner, LearnerSummary
from mara.learner.saving import AGENT_FOLDER, CHECKPOINT_FOLDER


@dataclass(frozen=True, slots=True)
class LearnerSpec(HostSpec):
    hidden_size: int
    """Hidden size of the LLM."""
    agent_card: dict[str, Any]
    """What is kept beside the agent. Made where the run began: the learner's machine may have no heads."""
    checkpoint: str | None = None
    """Name of the checkpoint in the run folder to go on from; None begins with the first episode of the log.
    """


class LearnerHost:
    """The learner, until it has seen all its episodes or is stopped."""

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._stop = threading.Event()
        self._learner: Learner | None = None
        self._phase = STARTING
        self._rows: deque[dict[str, float]] = deque()

    def run(self) -> LearnerSummary:
        """Train; save the agent and a checkpoint into the run folder at the end. Blocks.

        Raises:
            StoppedEarly: it was stopped while the learner of the run before ended still.
        """
        log_to(self._spec.log_file)
        with ExitStack() as exits:
            if self._spec.log_file.parent.is_dir():
                # A run that was killed may have a learner that ends still.
                exits.enter_context(hold_run(self._spec.log_file.parent, PREDECESSOR_S, self._pause))
            return self._run()

    def _pause(self, seconds: float) -> None:
        """Wait for the learner of the run before.

        Raises:
            StoppedEarly: :meth:`stop` was called.
        """
        if self._stop.wait(seconds):
            raise StoppedEarly

    def _run(self) -> LearnerSummary:
        config, run_id = self._spec.config, self._spec.run_id
        clients = [self._spec.connect(shard) for shard in range(config.replay.num_shards)]
        digest = agent_digest(self._spec.hidden_size, config.agent)
        # Of a finished run the log is only read; nobody waits for weights.
        is_finished = config.replay.from_run is not None
        channel = (
            MemoryWeightChannel(digest)
            if is_finished
            else RedisWeightChannel(clients[0], run_id, config.replay, digest)
        )
        checkpoint = self._checkpoint()
        # A store that has lost the log counts from the start again, so the old place in it means nothing.
        goes_on = checkpoint is not None and not open_reader(clients, run_id, config.replay).at_end()
        cursor = read_checkpoint(checkpoint)["cursor"] if checkpoint is not None and goes_on else ""
        reader = open_reader(clients, run_id, config.replay, cursor)
        with (
            BackgroundReader(reader, log_is_finished=is_finished) as source,
            BackgroundWeights(channel) as weights,
        ):
            self._learner = Learner(
                config.learner,
                config.agent,
                config.replay,
                config.weighted_shaping,
                hidden_size=self._spec.hidden_size,
                source=source,
                weights=weights,
                log_is_finished=is_finished,
                seed=config.run.seed,
                on_metrics=lambda row: self._rows.append(row | {"weights/dropped": weights.num_replaced}),
                run_folder=self._spec.folder,
                agent_card=self._spec.agent_card,
            )
            if checkpoint is not None:
                load_checkpoint(checkpoint, self._learner)
            if self._stop.is_set():
                self._learner.stop()
            self._phase = RUNNING
            return self._learner.run()

    def _checkpoint(self) -> Path | None:
        """The checkpoint to go on from, with those that are newer out of the way.

        Raises:
            UserError: it is not on this machine.
        """
        if self._spec.checkpoint is None:
            return None
        checkpoint = self._spec.folder / CHECKPOINT_FOLDER / self._spec.checkpoint
        if not checkpoint.is_dir():
            raise UserError(
                f"checkpoint: the learner's machine has no {checkpoint}; the machines must share the run "
                "folder (run.dir)"
            )
        set_newer_aside(checkpoint, self._spec.config.learner.num_checkpoints)
        return checkpoint

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
