"""Settings of the learner. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveInt

from mara.common.config import LONGEST_S, Config


class SACConfig(Config):
    """Discrete soft actor-critic with two critic heads (section 3.3, Eq. 9–11)."""

    critic_widths: tuple[PositiveInt, PositiveInt] = (1024, 256)
    """Units of the two hidden layers of each critic head. Usual range 64–2048."""
    critic_learning_rate: float = Field(default=3e-4, gt=0, le=1)
    """Adam's rate for the critic. Usual range 1e-4–1e-3."""
    policy_learning_rate: float = Field(default=3e-4, gt=0, le=1)
    """Adam's rate for the agent. A third of the critic's keeps the agent from following an untrained
    critic. Usual range 3e-5–3e-4."""
    temperature_learning_rate: float = Field(default=3e-4, gt=0, le=1)
    """Adam's rate for the logarithm of the temperature. Usual range 3e-4–1e-2."""
    initial_temperature: float = Field(default=0.01, gt=0)
    """First value of the temperature α, in units of reward per nat of entropy. Too low a start lets the
    agent become certain before the critic knows anything. Usual range 0.01–1."""
    learn_temperature: bool = True
    """Adjust α so that the entropy meets its target (Eq. 11). False: α stays at its first value."""
    target_entropy_fraction: float = Field(default=0.6, ge=0, le=1)
    """Entropy that α aims at, as a fraction of ln 2, the most a binary action can have. The authors' code
    has 0.6; the paper prints a target of 2 nats, which cannot be reached. Usual range 0.1–0.9."""
    polyak: float = Field(default=0.005, gt=0, le=1)
    """Step τ of the target network towards the critic. Usual range 0.001–0.05; 1 copies."""
    target_update_period: int = Field(default=10, ge=1)
    """Gradient steps between two steps of the target network. Usual range 1–10."""
    max_gradient_norm: float = Field(default=0.5, gt=0)
    """Longest gradient of the critic and of the agent; longer ones are scaled down. Usual range 0.5–10."""
    critic_only_steps: int = Field(default=0, ge=0)
    """Gradient steps at the start in which only the critic learns. The paper: 0. Usual range 0–500."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of the matrix products in the hidden layers. Weights, optimisers, the last layers, losses and targets
    are float32 either way. bfloat16 is several times quicker on GPUs and on processors that multiply it. tf32
    rounds what NVIDIA GPUs from Ampere on multiply to 11 significant bits (bfloat16: 8), the last layers'
    too; elsewhere it is float32."""
    cuda_graph: bool = True
    """On an NVIDIA GPU, capture the gradient step as a CUDA graph and replay it: two to five times as quick,
    with the same results. False helps to find an error in a step."""

    @property
    def target_entropy(self) -> float:
        """The target of Eq. 11, nats."""
        return self.target_entropy_fraction * math.log(2)


class LearnerConfig(Config):
    """The learner: how much it trains on what it reads, and how often it reports."""

    sac: SACConfig = SACConfig()
    batch_size: int = Field(default=1024, ge=1)
    """Transitions in one gradient step. Usual range 256–4096."""
    num_episodes: int = Field(default=21_000, ge=1)
    """Episodes to train on; the run ends when they were read and their gradient steps were done. Of
    a finished log (``replay.from``) at most so many."""
    gradient_steps_per_episode: float = Field(default=10.0, gt=0)
    """Replay ratio: gradient steps earned by each episode read after the start. Usual range 0.5–20."""
    max_samples_per_transition: float | None = Field(default=None, gt=0)
    """Bound on how often a transition is in a batch, on average over all that came: beyond it the learner
    waits for new data, though gradient steps are owed. Keeps short answers from being learnt by heart.
    None: no bound. Usual range 4–50."""
    start_batches: int = Field(default=64, ge=1)
    """Training starts when this many batches of transitions have come. Episodes read before that earn no
    gradient steps. Usual range 1–64."""
    max_backlog_episodes: int = Field(default=100, ge=1)
    """Most gradient steps owed, in episodes' worth of them. What is earned beyond that is dropped and
    counted, so that a learner that stalled does not then train in one burst on what it missed.
    Usual range 20–1000."""
    data_timeout_s: float | None = Field(default=1800.0, gt=0, le=LONGEST_S)
    """The run ends if the learner has waited so long for an episode and none came, seconds. The first one
    takes as long as the rollout actors need to load the LLM and write an answer. None: it waits for ever.
    Usual range 300–7200."""
    max_skipped_steps: int = Field(default=20, ge=0)
    """Gradient steps in a row that may be skipped because a loss, a gradient or a parameter is not finite.
    After one more the run ends, and keeps that batch. Usual range 0–100."""
    publish_period_s: float = Field(default=1.0, ge=0, le=LONGEST_S)
    """Least time between two publications of the agent's weights, seconds. Usual range 0.2–10."""
    checkpoint_period_s: float = Field(default=300.0, gt=0, le=LONGEST_S)
    """Time between two checkpoints, seconds; one more is written at the end. Usual range 60–3600."""
    num_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that are kept; older ones are deleted. With one alone there is none to go back to where it
    is damaged. As many are kept of those that a run which went on from an earlier one has set aside
    (``not-used-*``). Usual range 2–5."""
    log_period_s: float = Field(default=5.0, gt=0, le=LONGEST_S)
    """Time between two rows of metrics, seconds. Usual range 1–60."""
    device: str = "auto"
    """``auto`` takes a GPU if there is one. Else ``cpu``, ``cuda``, ``cuda:1``, …"""
    num_threads: int = Field(default=1, ge=1)
    """Threads of the learner's arithmetic on the CPU. More than the cores at hand slows everybody down."""

    @property
    def start_transitions(self) -> int:
        """Transitions that must have come before training starts."""
        return self.start_batches * self.batch_size
