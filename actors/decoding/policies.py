"""Who decides about a candidate: the agent, sampled or greedy. And how the plain LLM picks.

Legend: B rows, D hidden size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch

from mara.common.agent import ACCEPT, REJECT, Agent


class Decisions(NamedTuple):
    """Accept or reject, for B rows. On the CPU."""

    accept_B: torch.Tensor
    """bool."""
    accept_logprobs_B: torch.Tensor
    """float32."""
    reject_logprobs_B: torch.Tensor
    """float32."""
    policy_version: int


class Policy(Protocol):
    """Decides about candidates from the LLM's hidden states."""

    def decide(self, states_BD: torch.Tensor, uniforms_B: torch.Tensor) -> Decisions:
        """``uniforms_B``: float32 in [0, 1), each row's own draw; unused by a greedy policy."""
        ...


class AgentPolicy:
    """The agent, sampling for training (``threshold=None``) or greedy for inference."""

    def __init__(self, agent: Agent, threshold: float | None, version: int = 0) -> None:
        self.agent = agent
        self.threshold = threshold
        self.version = version

    @torch.inference_mode()
    def decide(self, states_BD: torch.Tensor, uniforms_B: torch.Tensor) -> Decisions:
        logprobs_B2 = self.agent(states_BD).cpu()
        accept_B = logprobs_B2[:, ACCEPT].exp()
        bar_B = uniforms_B if self.threshold is None else torch.full_like(accept_B, self.threshold)
        return Decisions(
            # A draw of exactly 0 must not accept what has probability 0.
            accept_B=(accept_B > bar_B) if self.threshold is None else (accept_B >= bar_B),
            accept_logprobs_B=logprobs_B2[:, ACCEPT],
            reject_logprobs_B=logprobs_B2[:, REJECT],
            policy_version=self.version,
        )


Plain = Literal["greedy", "sample"]
"""The LLM without an agent: its most probable token, or one drawn from its candidate set at
temperature 1. Neither asks anybody, so each token costs one forward pass."""
