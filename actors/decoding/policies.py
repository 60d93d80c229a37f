"""Who decides about candidates: the agent, sampled or greedy, or its critic. And how the plain LLM picks.

Legend: B rows, D hidden size, N candidates of any rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch

from mara.actors.config import DecodingConfig, GateConfig
from mara.common.agent import ACCEPT, REJECT, Agent
from mara.common.critic import TwinCritic, load_critic


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


class ValuePolicy:
    """The critic compares the candidates of a position.

    What a candidate is worth is the critic's value of accepting it, the mean of both heads: the return of the
    text that goes on with it. Two candidates of a position differ in nothing else, so the difference is what
    one gains over the other. The agent's own odds tell less: they weigh a candidate against those behind it,
    as they are sampled in training.

    Args:
        min_advantage: by how much a candidate must exceed the first one.
    """

    version = 0

    def __init__(self, critic: TwinCritic, min_advantage: float) -> None:
        self.critic = critic
        self.min_advantage = min_advantage

    @torch.inference_mode()
    def values(self, states_ND: torch.Tensor) -> list[float]:
        """What taking each candidate is worth, by the LLM's hidden states at them."""
        return self.critic(states_ND)[..., ACCEPT].mean(0).tolist()  # type: ignore[no-any-return]

    def choose(self, values: Sequence[float]) -> int:
        """Which of a position's candidates is taken, given what each is worth."""
        best = max(range(len(values)), key=values.__getitem__)
        return best if values[best] - values[0] >= self.min_advantage else 0


Plain = Literal["greedy", "sample"]
"""The LLM without an agent: its most probable token, or one drawn from its candidate set at
temperature 1. Neither asks anybody, so each token costs one forward pass."""


class Gated(NamedTuple):
    """A policy that may step in only where its gate is open; elsewhere the LLM's first candidate is taken."""

    policy: Policy | ValuePolicy
    gate: GateConfig


AnyPolicy = Policy | ValuePolicy | Gated | Plain
"""Whatever an answer's tokens may be chosen by."""


def goes_by_value(policy: AnyPolicy) -> bool:
    """Whether it compares candidates instead of deciding about one after the other."""
    return isinstance(policy.policy if isinstance(policy, Gated) else policy, ValuePolicy)


def most_demanding(policies: Iterable[AnyPolicy]) -> AnyPolicy:
    """Which of these an engine for all of them is to be made for: a plain one by itself would allow one
    candidate alone, one by value always as many as it compares."""
    return min(policies, key=lambda policy: 2 if isinstance(policy, str) else int(goes_by_value(policy)))


def critic_used_in(
    decoding: DecodingConfig, folder: Path, hidden_size: int, setting: str = "decoding.steering"
) -> TwinCritic | None:
    """The critic of the agent in ``folder``, on the CPU, where ``decoding`` steers by value (``setting``).

    Raises:
        UserError: it does, and the critic is missing, damaged or of an LLM of another hidden size.
    """
    if decoding.steering == "policy":
        return None
    return load_critic(folder, hidden_size, setting).requires_grad_(False)


def steered_by(
    agent: Agent, decoding: DecodingConfig, critic: TwinCritic | None = None
) -> Policy | ValuePolicy | Gated:
    """How ``agent`` is used once it is trained: greedy, with the gate of ``decoding`` if it has one.

    ``critic`` is the agent's; needed where ``decoding`` steers by value.
    """
    policy: Policy | ValuePolicy = AgentPolicy(agent, decoding.threshold)
    if decoding.steering == "value":
        assert critic is not None
        policy = ValuePolicy(critic, decoding.min_advantage)
    return policy if decoding.gate.is_open else Gated(policy, decoding.gate)


class Answer(NamedTuple):
    """What a policy says of one candidate."""

    accept: bool
    accept_logprob: float
    reject_logprob: float
    policy_version: int


def ask(
    policies: Sequence[Policy | ValuePolicy | Plain], states_ND: torch.Tensor, uniforms_N: torch.Tensor
) -> list[Answer]:
    """Each state's own policy decides about it; every policy is asked once for all of its states."""
    answers: list[Answer | None] = [None] * len(policies)
    for policy in {id(policy): policy for policy in policies}.values():
        assert not isinstance(policy, str | ValuePolicy)
        places = [place for place, other in enumerate(policies) if other is policy]
        is_all = len(places) == len(policies)
        some = slice(None) if is_all else torch.tensor(places)
        decisions = policy.decide(states_ND[some], uniforms_N[some])
        accepts = decisions.accept_B.tolist()
        accept_logprobs = decisions.accept_logprobs_B.tolist()
        reject_logprobs = decisions.reject_logprobs_B.tolist()
        for n, place in enumerate(places):
            answers[place] = Answer(
                accepts[n], accept_logprobs[n], reject_logprobs[n], decisions.policy_version
            )
    return [answer for answer in answers if answer is not None]
