"""The learner's own copy of the newest transitions: a preallocated ring that batches are drawn from.

Legend: C capacity, B rows of a batch, T decisions of an episode, D hidden size of the LLM.

::

    slot   0 … ………… tail ─────────────── head … C-1        (both wrap round)
               free │ episode │ episode │ episode │ free

An episode lies in consecutive slots, so the next state of a transition is the state of the following slot
and states are stored once. Whole episodes leave at the tail before a new one is written at the head: what
lies between is valid throughout, no transition ever points into a half-overwritten episode, and a sample is
an offset from the tail (:mod:`mara.buffer.sampling`). Tail and head count on and on; modulo C they are
slots.

Where scores are standardised, the first few episodes are held back outside the ring until their mean and
deviation mean something, and are then written in the order in which they came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.sampling import make_sampling
from mara.buffer.shaping import ScoreNormaliser, shape_episode
from mara.common.agent import ACCEPT
from mara.common.contracts import TransitionBatch
from mara.common.episode import Episode
from mara.common.errors import UserError

_PART_BYTES = 1 << 18
"""Of states that are gathered before they are converted: with the result a part of a core's second-level
cache."""


class _Held(NamedTuple):
    """An episode in the ring."""

    uid: str
    num_decisions: int
    score: float
    """r(x, y) as shaping saw it."""


class _Remembered(NamedTuple):
    """What a ring that is filled again knows of an episode that it held before."""

    score: float
    rewards_T: torch.Tensor
    sampling: dict[str, torch.Tensor]
    """As :meth:`mara.buffer.sampling.Sampling.state_dict` has it for the episode's places."""


class Mirror:
    """Holds up to C transitions on one device. Not thread-safe.

    The ring takes C × (2 D + 22) bytes of address space at the first episode (26 with priorities). On the
    CPU, Linux gives it real memory only as it fills; on a GPU all of it is taken at once.
    """

    def __init__(
        self,
        hidden_size: int,
        replay: ReplayConfig,
        shaping: ShapingConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self._hidden_size = hidden_size
        self._capacity = replay.capacity_transitions
        self._shaping = shaping
        self._device = torch.device(device)
        self._normaliser = ScoreNormaliser(shaping)
        self._sampling = make_sampling(replay, self._device)
        self._states_dtype: torch.dtype | None = None  # that of the first decisions that came
        self._states_CD: torch.Tensor | None = None  # made by the first episode written
        self._actions_C = self._column(torch.uint8)
        self._rewards_C = self._column(torch.float32)
        self._discounts_C = self._column(torch.float32)
        self._forced_C = self._column(torch.bool)
        self._behaviour_logprobs_C = self._column(torch.float32)
        self._policy_versions_C = self._column(torch.int64)
        self._tail = 0  # place of the oldest transition; its slot is this modulo C
        self._size = 0
        self._held: deque[_Held] = deque()  # oldest first
        self._remembered: dict[str, _Remembered] = {}
        self._has_evicted = False
        self._held_back: list[Episode] = []  # counted, but neither shaped nor written
        self._batch_states: dict[tuple[int, torch.dtype], deque[torch.Tensor]] = {}
        self._part_states: torch.Tensor | None = None
        self.num_batches_kept = 1
        """Samples of one size whose states are there at once: 2 for who draws the next one ahead."""
        self._total_transitions = 0
        self._total_episodes = 0
        self._num_without_decisions = 0

    def add(self, episodes: Sequence[Episode]) -> None:
        """Shape the episodes and write their transitions, the oldest episodes making room.

        An episode without decisions teaches nothing: it is counted and skipped. With ``normalise`` "running"
        the first :data:`~mara.buffer.config.NORMALISE_FROM_EPISODES` are written together, when the last of
        them comes.

        Raises:
            UserError: an episode does not fit: other hidden size or dtype, more decisions than the
                capacity, a score is missing.
        """
        for episode in episodes:
            self._check(episode)
            self._normaliser.count(episode)
            self._total_episodes += 1
            self._num_without_decisions += episode.num_decisions == 0
            self._held_back.append(episode)
            if self._normaliser.is_ready:
                for ready in self._held_back:
                    score = self._normaliser.score(ready)
                    if ready.num_decisions > 0:
                        self._write(ready, score)
                self._held_back.clear()

    def prepend(self, episode: Episode) -> bool:
        """Put an episode that was added before, to a mirror whose state this one has, below the oldest held.

        For a ring that is filled again after a restart, newest episodes first. The episode is counted
        nowhere again: not in the totals, nor in the normaliser. It gets the rewards that it had
        (:meth:`load_ring_state`); one that was not in the ring then is scored by the present means. One that
        was held back when the state was saved is held back again.

        Returns whether it found room. Once one did not, or an episode has left, the ring holds the newest
        there are, and stays as it is.

        Raises:
            UserError: the episode does not fit, as for :meth:`add`.
        """
        self._check(episode)
        if self._has_evicted or self._capacity - self._size < episode.num_decisions:
            return False
        if not self._normaliser.is_ready:
            self._held_back.insert(0, episode)
        elif episode.num_decisions > 0:
            known = self._remembered.pop(episode.uid, None)
            score = self._normaliser.score(episode, remember=False) if known is None else known.score
            self._tail -= episode.num_decisions
            self._fill(self._tail, episode, score, known)
            self._held.appendleft(_Held(episode.uid, episode.num_decisions, score))
        return True

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        states_dtype: torch.dtype | None = None,
    ) -> TransitionBatch:
        """Return ``batch_size`` transitions drawn as ``replay.sampling`` says, with replacement, on its
        device.

        States come in ``states_dtype``; None: as they are stored, in 16 bit. The two state tensors are
        overwritten by a later sample of the same size and dtype, the one ``num_batches_kept`` after this:
        clone them to keep them (fresh memory for every batch would cost several times the copy itself). The
        next state of a last decision is its own state: finite, and worth nothing by its discount.

        Raises:
            ValueError: there are no transitions yet.
        """
        if self._size == 0 or self._states_CD is None:
            raise ValueError("the mirror is empty; add episodes before sampling")
        draw = self._sampling.draw(self._tail, self._size, batch_size, generator)
        places_B = draw.offsets_B + self._tail
        slots_B = places_B % self._capacity
        discounts_B = self._discounts_C[slots_B]
        next_slots_B = torch.where(discounts_B > 0, (slots_B + 1) % self._capacity, slots_B)
        states_BD, next_states_BD = self._batch_buffers(batch_size, states_dtype or self._states_CD.dtype)
        self._gather(self._states_CD, slots_B, next_slots_B, states_BD, next_states_BD)
        return TransitionBatch(
            states_BD=states_BD,
            next_states_BD=next_states_BD,
            actions_B=self._actions_C[slots_B].long(),
            rewards_B=self._rewards_C[slots_B],
            discounts_B=discounts_B,
            forced_B=self._forced_C[slots_B],
            next_forced_B=self._forced_C[next_slots_B],
            behaviour_logprobs_B=self._behaviour_logprobs_C[slots_B],
            policy_versions_B=self._policy_versions_C[slots_B],
            places_B=places_B,
            weights_B=draw.weights_B,
        )

    def learnt(self, batch: TransitionBatch, errors_B: torch.Tensor) -> None:
        """Tell what the critic got wrong on a sample: the next ones go by it, if ``replay.sampling`` does.

        ``errors_B`` [B] are temporal differences; their sign does not matter. Transitions that have made room
        since they were sampled are passed over.
        """
        assert batch.places_B is not None, "the batch is a sample of this mirror"
        self._sampling.learnt(batch.places_B, errors_B, self._tail)

    @property
    def num_transitions(self) -> int:
        """Transitions held now."""
        return self._size

    @property
    def num_episodes(self) -> int:
        """Episodes held now."""
        return len(self._held)

    @property
    def total_transitions(self) -> int:
        """Transitions ever written; those held back are not."""
        return self._total_transitions

    @property
    def total_episodes(self) -> int:
        """Episodes ever added, with those that had no decisions."""
        return self._total_episodes

    @property
    def num_without_decisions(self) -> int:
        """Episodes skipped because the LLM left nothing to decide."""
        return self._num_without_decisions

    @property
    def mean_score(self) -> float:
        """Mean of r(x, y), as shaping saw it, over the episodes held; 0 where there are none."""
        return sum(held.score for held in self._held) / max(1, len(self._held))

    @property
    def largest_return(self) -> float:
        """No return of the episodes held exceeds this by its amount: discounts are at most 1.

        The largest sum of absolute rewards of an episode; with Monte-Carlo returns, which are what the ring
        then has as rewards, the largest of these.
        """
        if self._size == 0:
            return 0.0
        sizes_E = torch.tensor([held.num_decisions for held in self._held])
        rewards = self._rewards_C[self._places() % self._capacity].abs().cpu()
        if self._shaping.returns == "monte_carlo":
            return float(rewards.max())
        episodes = torch.repeat_interleave(torch.arange(len(sizes_E)), sizes_E)
        return float(torch.zeros(len(sizes_E)).index_add_(0, episodes, rewards).max())

    @property
    def longest_episode(self) -> int:
        """Decisions of the longest episode held."""
        return max((held.num_decisions for held in self._held), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the transitions held."""
        columns = sum(column.element_size() for column in self._columns())
        return self._size * (2 * self._hidden_size + columns + self._sampling.bytes_per_transition)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the memory of the score normaliser, in plain types; not the transitions.

        Episodes held back at that moment are no transitions yet: they have been counted, and come back only
        with :meth:`prepend`.
        """
        return {
            "normaliser": self._normaliser.state_dict(),
            "total_transitions": self._total_transitions,
            "total_episodes": self._total_episodes,
            "num_without_decisions": self._num_without_decisions,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; the ring keeps what it holds."""
        self._normaliser.load_state_dict(state["normaliser"])
        self._total_transitions = state["total_transitions"]
        self._total_episodes = state["total_episodes"]
        self._num_without_decisions = state["num_without_decisions"]

    def ring_state(self) -> dict[str, Any]:
        """What the ring knows of its episodes beyond what the log has: their rewards, scores and priorities.

        Scores that are standardised depend on what had come when the episode did, so they could not be made
        again. Text, numbers and tensors on the CPU; 4 bytes a transition (8 with priorities).
        """
        places = self._places()
        return {
            "head": self._tail + self._size,
            "uids": [held.uid for held in self._held],
            "num_decisions": torch.tensor([held.num_decisions for held in self._held], dtype=torch.int64),
            "scores": torch.tensor([held.score for held in self._held], dtype=torch.float64),
            "rewards": self._rewards_C[places % self._capacity].cpu(),
            "sampling": self._sampling.state_dict(places),
        }

    def load_ring_state(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`ring_state`, before anything is added: :meth:`prepend` goes by it.

        The same episodes then lie in the same slots with the same rewards and priorities as they did.
        """
        assert self._size == 0, "only an empty ring can be filled again"
        self._tail = state["head"]
        self._sampling.load_state_dict(state["sampling"])
        sizes, scores = state["num_decisions"].tolist(), state["scores"].tolist()
        columns = {"rewards": state["rewards"], **state["sampling"]}
        columns = {name: column.split(sizes) for name, column in columns.items() if column.dim() == 1}
        for index, (uid, score) in enumerate(zip(state["uids"], scores, strict=True)):
            own = {name: parts[index] for name, parts in columns.items()}
            self._remembered[uid] = _Remembered(score, own.pop("rewards"), own)

    def _places(self) -> torch.Tensor:
        """The place of each transition held, oldest first: int64 [size]."""
        return torch.arange(self._tail, self._tail + self._size, device=self._device)

    def _write(self, episode: Episode, score: float) -> None:
        """Put the episode at the head; the oldest make room."""
        num_decisions = episode.num_decisions
        while self._capacity - self._size < num_decisions:
            evicted = self._held.popleft().num_decisions
            self._sampling.freed(self._tail, evicted)
            self._tail += evicted
            self._size -= evicted
            self._has_evicted = True
        self._fill(self._tail + self._size, episode, score)
        self._held.append(_Held(episode.uid, num_decisions, score))
        self._total_transitions += num_decisions

    def _fill(self, place: int, episode: Episode, score: float, known: _Remembered | None = None) -> None:
        """Shape the episode and put it into the free slots from ``place`` on: they join the ring."""
        if self._states_CD is None:
            self._states_CD = torch.empty(
                (self._capacity, self._hidden_size), dtype=self._states_dtype, device=self._device
            )
        needs_prefixes = self._shaping.terminal == "progress"
        prefix_scores_N = self._normaliser.prefix_scores(episode) if needs_prefixes else None
        shaped = shape_episode(episode, self._shaping, score, prefix_scores_N)
        behaviour_T = np.where(
            episode.actions_T == ACCEPT, episode.accept_logprobs_T, episode.reject_logprobs_T
        )
        first = place % self._capacity
        self._put(self._states_CD, first, episode.states_TD)
        self._put(self._actions_C, first, _tensor(episode.actions_T))
        self._put(self._rewards_C, first, _tensor(shaped.rewards_T) if known is None else known.rewards_T)
        self._put(self._discounts_C, first, _tensor(shaped.discounts_T))
        self._put(self._forced_C, first, _tensor(episode.forced_T))
        self._put(self._behaviour_logprobs_C, first, _tensor(np.where(episode.forced_T, 0.0, behaviour_T)))
        self._put(self._policy_versions_C, first, _tensor(episode.policy_versions_T))
        if known is None:
            self._sampling.written(place, episode.num_decisions)
        else:
            self._sampling.rewritten(place, episode.num_decisions, known.sampling)
        self._size += episode.num_decisions

    def _put(self, ring: torch.Tensor, first: int, rows: torch.Tensor) -> None:
        """Copy ``rows`` into consecutive slots from ``first`` on, wrapping round once."""
        before_end = min(len(rows), self._capacity - first)
        ring[first : first + before_end].copy_(rows[:before_end])
        ring[: len(rows) - before_end].copy_(rows[before_end:])

    def _check(self, episode: Episode) -> None:
        states = episode.states_TD
        if states.shape[-1] != self._hidden_size:
            raise UserError(
                f"replay: episode {episode.uid} has hidden size {states.shape[-1]}, the run's LLM has "
                f"{self._hidden_size}; do not mix LLMs in one run"
            )
        if len(states) > 0:  # the dtype of no states says nothing
            self._states_dtype = self._states_dtype or states.dtype
            if states.dtype != self._states_dtype:
                raise UserError(
                    f"replay: episode {episode.uid} has {states.dtype} states, earlier ones "
                    f"{self._states_dtype}; give every rollout actor the same llm.dtype"
                )
        if episode.num_decisions > self._capacity:
            raise UserError(
                f"replay.capacity_transitions is {self._capacity}, less than the {episode.num_decisions} "
                f"decisions of one episode; raise it"
            )

    def _batch_buffers(self, batch_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if (batch_size, dtype) not in self._batch_states:
            shape = (self.num_batches_kept, 2, batch_size, self._hidden_size)
            self._batch_states[batch_size, dtype] = deque(
                torch.empty(shape, dtype=dtype, device=self._device)
            )
        kept = self._batch_states[batch_size, dtype]
        kept.rotate()
        return kept[0][0], kept[0][1]

    def _gather(
        self,
        states_CD: torch.Tensor,
        slots_B: torch.Tensor,
        next_slots_B: torch.Tensor,
        states_BD: torch.Tensor,
        next_states_BD: torch.Tensor,
    ) -> None:
        """Fill the two batches with the states of their slots, converted to their dtype."""
        if states_BD.dtype == states_CD.dtype:
            torch.index_select(states_CD, 0, slots_B, out=states_BD)
            torch.index_select(states_CD, 0, next_slots_B, out=next_states_BD)
            return
        # On the CPU a part at a time: what was gathered is still in the core's cache when it is converted,
        # and next states lie beside states that were just read.
        num_rows = len(slots_B) if states_CD.is_cuda else max(1, _PART_BYTES // states_CD[0].nbytes)
        if self._part_states is None or len(self._part_states) < num_rows:
            self._part_states = states_CD.new_empty((num_rows, self._hidden_size))
        for first in range(0, len(slots_B), num_rows):
            rows = slice(first, first + num_rows)
            part = self._part_states[: len(slots_B[rows])]
            states_BD[rows].copy_(torch.index_select(states_CD, 0, slots_B[rows], out=part))
            next_states_BD[rows].copy_(torch.index_select(states_CD, 0, next_slots_B[rows], out=part))

    def _column(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self._capacity, dtype=dtype, device=self._device)

    def _columns(self) -> tuple[torch.Tensor, ...]:
        return (
            self._actions_C,
            self._rewards_C,
            self._discounts_C,
            self._forced_C,
            self._behaviour_logprobs_C,
            self._policy_versions_C,
        )


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor with a copy of the array, which may be read-only."""
    return torch.tensor(array)
