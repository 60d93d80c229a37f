"""Keeping what a learner has learnt on disk. Only the last save of a run is waited for.

::

    run folder/
        agent/          the agent and its critic as others use them
        checkpoints/    where the learner goes on
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mara.common.agent import Agent, save_agent
from mara.common.critic import TwinCritic, save_critic
from mara.learner.checkpoint import Checkpointed, save_checkpoint

CHECKPOINT_FOLDER = "checkpoints"
AGENT_FOLDER = "agent"


@dataclass(frozen=True, slots=True)
class _Copied:
    """A learner as it was: what a checkpoint is made of."""

    gradient_step: int
    num_episodes: int
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state


class Saver:
    """Writes agent and checkpoints into a run folder. Called from one thread."""

    def __init__(self, folder: Path, num_checkpoints: int) -> None:
        """``num_checkpoints`` are kept."""
        self._folder = folder
        self._num_checkpoints = num_checkpoints
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def save(
        self, agent: Agent, critic: TwinCritic, card: Mapping[str, Any], learner: Checkpointed | None
    ) -> None:
        """Write agent and critic with their card, and a checkpoint of ``learner`` if given; return when it is
        done.

        Waits first for what :meth:`begin` began. If that failed, this is its second try.
        """
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._writing = None
        self._write(agent, critic, card, learner)

    def begin(
        self, agent: Agent, critic: TwinCritic, card: Mapping[str, Any], learner: Checkpointed | None
    ) -> None:
        """Copy what :meth:`save` would write, and write it in another thread.

        Does nothing while the one before is being written: its disk is slower than they come.
        """
        if self._writing is not None and not self._writing.done():
            return
        self.check()
        copied = None
        if learner is not None:
            copied = _Copied(learner.gradient_step, learner.num_episodes, _copy(learner.state_dict()))
        self._thread = self._thread or ThreadPoolExecutor(1, "saver")
        networks = copy.deepcopy((agent, critic))
        self._writing = self._thread.submit(self._write, *networks, dict(card), copied)

    def check(self) -> None:
        """Raise what went wrong in the other thread, once. Returns at once."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()

    def _write(
        self, agent: Agent, critic: TwinCritic, card: Mapping[str, Any], learner: Checkpointed | None
    ) -> None:
        # First: whoever finds an agent's card finds its critic.
        save_critic(critic, self._folder / AGENT_FOLDER)
        save_agent(agent, self._folder / AGENT_FOLDER, dict(card))
        if learner is not None:
            save_checkpoint(self._folder / CHECKPOINT_FOLDER, learner, self._num_checkpoints)


def _copy(node: Any) -> Any:
    """A nested state that shares nothing with the original; tensors are on the CPU."""
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return copy.deepcopy(node)
