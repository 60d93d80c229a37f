"""The contracts between the parts of the system.

::

    prompts ──► rollout actor (xN) ── Episode ──► EpisodeSink        EpisodeSource ──► mirror
                frozen LLM                          │    replay log    ▲                 │
                decoding engine                     └──────────────────┘          TransitionBatch
                agent ◄── WeightSource                                                   │
                              ▲               weight channel                             ▼
                              └──────────────────────────────────── WeightSink ◄── learner (x1)

Every arrow is one protocol below. Nobody on the left waits for anybody on the right: a sink accepts
or drops, a source returns what there is, a weight source answers "nothing newer".

Each protocol has two implementations in :mod:`mara.buffer`: one on Redis and one in the memory of the
process. The second is the fake for tests, the single-process mode and the specification; one contract
suite runs against both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from mara.common.episode import Episode


class EpisodeSink(Protocol):
    """Where a rollout actor puts finished episodes. Called from one thread."""

    def append(self, episodes: Sequence[Episode]) -> None:
        """Store the episodes in order; :class:`~mara.common.errors.ReplayUnavailable` if only a prefix was.

        Appending an episode whose ``uid`` is already stored changes nothing, so a caller that lost
        the reply may simply append again. Blocks for one round trip at most, never for the learner; a sink
        with a buffer of its own returns at once, stores later, and raises at the next call.
        """
        ...


class ReadCounts(NamedTuple):
    """What a reader of the replay log met in it beside episodes. All 0 where nothing went wrong."""

    num_malformed: int = 0
    """Records skipped because they could not be decoded."""
    num_quarantined: int = 0
    """How many of those the store has copied, with the reason, for somebody to look at: fewer where it was
    away or full, since nothing waits for a copy."""
    num_trimmed_unread: int = 0
    """Episodes that went to make room in the log before the reader came to them."""
    num_duplicates: int = 0
    """Episodes appended although they were stored, by all sinks, as far as the reader knows."""


class EpisodeSource(Protocol):
    """Where the learner reads the replay log. Called from one thread; each reader has its own cursor."""

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        """Return up to ``max_episodes`` (>= 1) episodes after the cursor, oldest first.

        Waits at most ``timeout_s`` (>= 0) for the first one; an empty list means nothing came.
        Records that cannot be decoded are skipped and counted in :attr:`counts`.
        """
        ...

    @property
    def counts(self) -> ReadCounts:
        """What was met in the log beside episodes, since this reader began."""
        ...

    @property
    def waited_s(self) -> float:
        """Seconds in which :meth:`read` has waited for an episode to come, those of decoding left out."""
        ...


class LogReader(EpisodeSource, Protocol):
    """A source that can say where it stands, so that a checkpoint can."""

    @property
    def cursor(self) -> str:
        """Behind the last episode that was returned; a new reader that starts there goes on from it."""
        ...

    def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode] | None:
        """Return up to ``max_episodes`` episodes from before where this reader began, newest first.

        Each call goes further back; an empty list means that there are no older ones. None: there was no
        answer within ``timeout_s`` (≥ 0), ask again. With ``max_episodes`` 0 the caller wants no more. Does
        not move the cursor.
        """
        ...

    def at_end(self) -> bool:
        """Whether nothing is left after the cursor. May wait as long as a store may be away."""
        ...


class VersionedWeights(NamedTuple):
    """One published set of agent weights."""

    version: int
    """The learner's gradient step at publication; grows strictly."""
    published_at_s: float
    """Unix time of publication, for the publish-to-applied latency."""
    tensors: dict[str, torch.Tensor]
    """A ``state_dict`` on the CPU."""
    agent_digest: str = ""
    """:func:`mara.common.agent.agent_digest` of the agent they are for."""


class WeightSink(Protocol):
    """Where the learner publishes. Called from one thread."""

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Make ``tensors`` the latest weights. ``version`` must exceed that of this agent's stored before.

        Weights of another agent, which somebody has published under this run's name, are replaced.
        Returns whether they are taken: stored, or on their way until they are or a later version has come.
        Weights that are not taken nobody has seen, and the same version may be published again.
        A reader sees either the previous version whole or this one whole. Never waits for the store.
        """
        ...

    def holds(self, version: int) -> bool:
        """Whether weights of ``version`` or later are stored still or on their way, as far as anybody knows.

        False once the store has lost them; the same version may then be published again.
        """
        ...


class WeightSource(Protocol):
    """Where a rollout actor looks for newer weights between two decoding steps."""

    def fetch_newer(self, than: int, skip: int | None = None) -> VersionedWeights | None:
        """Return the latest weights if their version exceeds ``than`` and is not ``skip``, else ``None``.

        Never waits. They are finite; whether they fit is for the caller to check
        (:func:`mara.common.agent.why_unfit`).

        Raises:
            DamagedWeights: they cannot be read or are not finite; ask again with their version as ``skip``.
        """
        ...


class Conversation(NamedTuple):
    """What a reward model judges."""

    prompt: str
    response: str


class RewardModel(Protocol):
    """Scores whole answers. Higher is better; a cost is turned round by a negative weight.

    Called from one thread. Blocks until the scores are there.
    """

    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return float32 [B] on the CPU, one score for each conversation; a failed one is not finite.

        Raises an exception where none of them could be scored.
        """
        ...


@dataclass(frozen=True, slots=True)
class TransitionBatch:
    """B transitions, gathered for one gradient step. Shapes: B transitions, D hidden size.

    A transition is one accept-or-reject decision. Its next state is the candidate of the following
    decision of the same episode (the next candidate at this position after a rejection, the first
    candidate of the next undecided position after an acceptance, Eq. 5).
    """

    states_BD: torch.Tensor
    """The LLM's last hidden state at the candidate, 16-bit float as it is stored, or as the sample asked."""
    next_states_BD: torch.Tensor
    """The same for the next decision; unspecified values where ``discounts_B`` is 0."""
    actions_B: torch.Tensor
    """int64; 1 accepts, 0 rejects."""
    rewards_B: torch.Tensor
    """float32; Eq. 8 with Eq. 13 as configured when the learner read the episode."""
    discounts_B: torch.Tensor
    """float32 in [0, 1]; what the value of the next state counts: 0 at the end of an episode."""
    forced_B: torch.Tensor
    """bool; the last candidate, which cannot be rejected: no decision to learn from."""
    next_forced_B: torch.Tensor
    """bool; the same for the next decision."""
    behaviour_logprobs_B: torch.Tensor
    """float32; log-probability of the action under the policy that took it (0 where forced)."""
    policy_versions_B: torch.Tensor
    """int64; the version of the weights that decided."""
    places_B: torch.Tensor | None = None
    """int64; names each transition for as long as the mirror runs. None in a batch made without a mirror."""
    weights_B: torch.Tensor | None = None
    """float32 in (0, 1]; what each row counts in the critic's loss. None: all count the same."""

    def __len__(self) -> int:
        return int(self.actions_B.shape[0])

    def to(self, device: torch.device | str) -> TransitionBatch:
        """The same batch on ``device``; returns itself if it is there already."""
        if self.states_BD.device == torch.device(device):
            return self
        moved: dict[str, Any] = {}
        for name in self.__slots__:
            column = getattr(self, name)
            moved[name] = None if column is None else column.to(device, non_blocking=True)
        return TransitionBatch(**moved)
