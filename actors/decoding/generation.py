"""What goes into the decoding engine and what comes out. Legend: D hidden size, K candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mara.actors.config import GateConfig
from mara.actors.decoding.policies import AnyPolicy, Gated, Plain, Policy, ValuePolicy
from mara.common.episode import FinishReason

DRAWS_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to answer."""

    prompt_ids: list[int]
    """At least one token."""
    seed: int = 0
    """Of this answer's own random stream: the answer depends on no other row."""
    tag: Any = None
    """Handed back with the answer."""
    max_new_tokens: int | None = None
    """Longest answer; at most the engine's own limit, which None stands for."""
    policy: AnyPolicy | None = None
    """Who decides about this answer. None: the engine's own."""


@dataclass(slots=True)
class Decision:
    """One accept-or-reject decision, as in :class:`mara.common.episode.Episode`."""

    state_D: torch.Tensor
    """Empty of a candidate that was compared by value."""
    action: int
    rank: int
    num_candidates: int
    position: int
    forced: bool
    reference_logprob: float
    accept_logprob: float
    reject_logprob: float
    policy_version: int


@dataclass(slots=True)
class Generation:
    """An answer, and how it came about.

    States stay on the LLM's device, and share memory with those of the rows decoded beside it: copy what is
    kept longer than the answer takes, as an episode does.
    """

    request: Request
    started_at_s: float
    response_ids: list[int] = field(default_factory=list)
    """With the end-of-sequence token if one was taken."""
    token_states: list[torch.Tensor] = field(default_factory=list)
    """[D] each: the hidden state at every token of the answer."""
    token_logprobs: list[float] = field(default_factory=list)
    """Log-probability of every token under the LLM itself (temperature 1, whole vocabulary)."""
    decisions: list[Decision] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    finished_at_s: float = 0.0


class Row:
    """A slot's current answer: the candidate set at its position and the candidate under question."""

    __slots__ = (
        "_draws",
        "full_logprobs",
        "gate",
        "generation",
        "ids",
        "is_closed",
        "length",
        "limit",
        "misses",
        "num_examined",
        "num",
        "policy",
        "rank",
        "reference_logprobs",
        "retaken",
        "rng",
        "state_before_D",
    )

    def __init__(self, generation: Generation, limit: int, policy: AnyPolicy) -> None:
        self.generation = generation
        self.policy: Policy | ValuePolicy | Plain
        self.gate: GateConfig | None
        self.policy, self.gate = policy if isinstance(policy, Gated) else (policy, None)
        self.limit = limit
        """Longest answer, tokens."""
        self.rng = np.random.default_rng(generation.request.seed)
        self._draws: list[float] = []
        self.length = len(generation.request.prompt_ids)
        """Tokens of prompt and answer."""
        self.ids: list[int] = []
        self.reference_logprobs: list[float] = []
        self.full_logprobs: list[float] = []
        self.num = 0
        """Candidates at this position."""
        self.rank = 0
        """The first candidate that has not been rejected."""
        self.is_closed = False
        """The gate leaves this position to the LLM."""
        self.state_before_D: torch.Tensor | None = None
        """The hidden state before this position, where there is a gate."""
        self.retaken = False
        """All were rejected, and the first is taken in their place."""
        self.num_examined = 1
        """Candidates that the current pass examines, from ``rank`` on."""
        self.misses = 0
        """Passes at this position in which all examined candidates were rejected."""

    @property
    def undecided(self) -> bool:
        """Whether anybody is to be asked about the candidate."""
        return self.num > 1 and not (self.retaken or self.is_closed or self.is_plain)

    @property
    def is_plain(self) -> bool:
        return isinstance(self.policy, str)

    @property
    def goes_by_value(self) -> bool:
        """Its candidates are compared, not asked about one after the other."""
        return isinstance(self.policy, ValuePolicy)

    def draws(self, num: int) -> list[float]:
        """The next ``num`` uniform draws of the row's own stream, float32 in [0, 1), without using them
        up."""
        while len(self._draws) < num:
            self._draws += self.rng.random(DRAWS_AT_A_TIME, dtype=np.float32).tolist()
        return self._draws[:num]

    def use_draws(self, num: int) -> None:
        """Go past ``num`` draws: one for each decision, however many were examined in a pass."""
        del self._draws[:num]
