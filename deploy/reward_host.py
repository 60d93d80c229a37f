"""The process of one reward model that is no head on the LLM."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mara.actors.reward_models.function import FunctionFailed
from mara.actors.reward_models.loading import load_reward_model
from mara.actors.reward_models.merging import MergedCalls
from mara.common.contracts import Conversation
from mara.deploy.process import LOADING_REWARD, RUNNING, STARTING, HostSpec, Report, log_to

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RewardSpec(HostSpec):
    reward: str
    """Name of the reward model in ``rewards``."""
    search_folder: Path
    """Where the module of a function may be, besides those installed."""


class RewardHost:
    """One copy of a reward model, for all rollout actors. Ray starts it again where it dies."""

    def __init__(self, spec: RewardSpec) -> None:
        self._spec = spec
        self._phase = STARTING
        self._loading = threading.Lock()
        self._calls: MergedCalls | None = None
        self._told: set[str] = set()

    def run(self) -> None:
        """Load the model, unless somebody has asked for a score before."""
        log_to(self._spec.log_file)
        self._loaded()

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """A score for each conversation; blocks until they are there.

        Raises:
            TimeoutError: they are not within ``timeout_s``.
            Exception: what the model raised.
        """
        try:
            return self._loaded().score(conversations).tolist()
        except FunctionFailed as error:
            kind = str(error).partition(":")[0]
            if kind not in self._told:  # In full where its author looks; the run's own line is short.
                self._told.add(kind)
                logger.exception("the function failed; further failures of this kind are not told of")
            raise

    def stop(self) -> None:
        """Nothing is left to be saved."""

    def report(self) -> Report:
        """Phase now. Returns at once."""
        return Report(self._phase, os.getpid(), {}, [])

    def _loaded(self) -> MergedCalls:
        with self._loading:
            if self._calls is None:
                self._phase = LOADING_REWARD
                config = self._spec.config.reward_models[self._spec.reward]
                model = load_reward_model(f"rewards.{self._spec.reward}", config, self._spec.search_folder)
                self._calls = MergedCalls(model, config.timeout_s)
                self._phase = RUNNING
        return self._calls
