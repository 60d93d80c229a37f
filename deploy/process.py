"""What every process of a run has: what it is told, what it reports, and its log.

The processes are plain classes (:mod:`mara.deploy.rollout_host`, :mod:`mara.deploy.learner_host`,
:mod:`mara.deploy.reward_host`). Ray makes an actor of each (:mod:`mara.deploy.topology`): ``run`` blocks in
one thread while ``report`` and ``stop`` are answered in others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import redis

from mara.buffer.connection import connect
from mara.deploy.config import RunConfig

WAITING = "waiting for Ray"
"""No process has answered yet: Ray is starting it, or has no room for it."""
STARTING = "starting"
LOADING = "loading the LLM"
LOADING_REWARD = "loading the reward model"
RUNNING = "running"

LEARNER = "learner"
"""Name of the process of the learner."""
REWARD_PREFIX = "reward-"
"""How the names of the processes of reward models begin."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the process of a handle ended."""

    result: Any = None
    """What ``run`` returned, if it did."""
    error: BaseException | None = None
    """What ``run`` raised; None if it returned or the process died."""
    trace: str = ""
    """The traceback of ``error`` in its process."""
    died: bool = False
    """The process is gone."""

    def tell(self, name: str, log_file: Path) -> str:
        """What happened to the process ``name``, its first line; the traceback goes into ``log_file``."""
        if self.error is None:
            return f"{name} {'died' if self.died else 'ended by itself'}"
        with contextlib.suppress(OSError), log_file.open("a") as log:  # The disk may be full.
            log.write(self.trace.rstrip() + "\n")
        first_line = (str(self.error).strip() or "no message").splitlines()[0]
        return f"{name} failed: {type(self.error).__name__}: {first_line}"


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a process has to know about its run."""

    name: str
    """Unique in the run: ``learner``, ``actor-0``, ``actor-0-1`` after a restart, ``reward-NAME-0``, …"""
    config: RunConfig
    """The run's settings, with the address of the server in ``replay.redis_url``."""
    run_id: str
    folder: Path
    """The run folder. Another machine may not have it."""

    @property
    def log_file(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    def connect(self, shard: int = 0) -> redis.Redis:
        """A client of the server with shard ``shard`` of the replay log. The first has the weights too."""
        replay = self.config.replay
        assert replay.redis_urls, "the run fills in the address of the server it started"
        return connect(replay.redis_urls[shard], replay.connect_timeout_s)


class Report(NamedTuple):
    """What a process says about itself when asked."""

    phase: str
    pid: int
    metrics: dict[str, float]
    """The latest values."""
    rows: list[dict[str, Any]]
    """Rows since the last report, oldest first: the learner's record, or the findings of a comparison."""


def log_to(path: Path) -> None:
    """Send this process's output to ``path``, where its folder exists: native crashes are told there too."""
    if not path.parent.is_dir():
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True, format="%(asctime)s %(message)s")
    faulthandler.enable()
