"""Which transitions of the ring a batch takes: uniform, recent ones first, or by what the critic gets wrong.

Legend: C capacity, B rows of a batch, N blocks, S slots of a block (N × S ≥ C).

A transition is named by its *place*: places count the transitions as they are written and are never given
twice. The ring holds the places from its tail to its head, each in the slot ``place mod C``, so a place below
the tail is known to be gone though its slot is in use again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from mara.buffer.config import ReplayConfig

_SMALLEST_ERROR = 1e-6
"""Added to every error, so that a transition without one is drawn again some day."""
_BLOCK_SLOTS = 32
"""About √(C / B) at a million transitions and batches of a thousand."""


class Draw(NamedTuple):
    """What a batch takes."""

    offsets_B: torch.Tensor
    """int64 [B], each in [0, size): places counted from the tail, on the ring's device."""
    weights_B: torch.Tensor | None
    """float32 [B] in (0, 1]: importance weights. None where every transition counts the same."""


class Sampling(Protocol):
    """Draws transitions with replacement. The mirror calls it, and tells it of all that happens to its
    slots."""

    def draw(self, tail: int, size: int, batch_size: int, generator: torch.Generator | None = None) -> Draw:
        """Draw from the ``size`` (≥ 1) places from ``tail`` on."""
        ...

    def written(self, place: int, num: int) -> None:
        """``num`` transitions have been written at ``place`` and the places after it."""
        ...

    def freed(self, place: int, num: int) -> None:
        """The ``num`` places from ``place`` on hold nothing any more."""
        ...

    def learnt(self, places_B: torch.Tensor, errors_B: torch.Tensor, tail: int) -> None:
        """The critic was wrong by ``errors_B`` at ``places_B``; places below ``tail`` are gone."""
        ...

    def state_dict(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is known of the transitions at ``places`` (int64 [n]), and of all together; on the CPU."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what a :meth:`state_dict` knew of all transitions together."""
        ...

    def rewritten(self, place: int, num: int, state: Mapping[str, torch.Tensor]) -> None:
        """As :meth:`written`, by transitions of which ``state`` is the :meth:`state_dict`."""
        ...

    @property
    def bytes_per_transition(self) -> int:
        """Bytes kept for each slot of the ring, blocks left out."""
        ...


def make_sampling(config: ReplayConfig, device: torch.device) -> Sampling:
    """The scheme that ``replay.sampling`` names, for a ring on ``device``."""
    if config.sampling == "prioritised":
        return PrioritisedSampling(
            config.capacity_transitions, config.priority_exponent, config.importance_exponent, device
        )
    if config.sampling == "recency":
        return RecencySampling(config.half_life_transitions, device)
    return UniformSampling(device)


class UniformSampling:
    """Every transition alike."""

    bytes_per_transition = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def draw(self, tail: int, size: int, batch_size: int, generator: torch.Generator | None = None) -> Draw:
        draws_on = self._device if generator is None else generator.device
        offsets_B = torch.randint(size, (batch_size,), generator=generator, device=draws_on)
        return Draw(_send(offsets_B, self._device), None)

    def written(self, place: int, num: int) -> None:
        pass

    def freed(self, place: int, num: int) -> None:
        pass

    def learnt(self, places_B: torch.Tensor, errors_B: torch.Tensor, tail: int) -> None:
        pass

    def state_dict(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        pass

    def rewritten(self, place: int, num: int, state: Mapping[str, torch.Tensor]) -> None:
        pass


class RecencySampling(UniformSampling):
    """A transition that is ``half_life`` transitions older is half as likely. No correction by weights.

    With age a (0 is the newest) of n transitions and q = 2^(-1/half_life), ``P(a) = q^a (1 - q) / (1 -
    q^n)``, drawn by inverting ``P(age < a) = (1 - q^a) / (1 - q^n)``."""

    def __init__(self, half_life: float, device: torch.device) -> None:
        super().__init__(device)
        self._half_life = half_life

    def draw(self, tail: int, size: int, batch_size: int, generator: torch.Generator | None = None) -> Draw:
        log_q = -math.log(2) / self._half_life
        uniform_B = _uniform((batch_size,), generator, self._device)
        ages_B = torch.log1p(uniform_B * math.expm1(size * log_q)).div_(log_q).long()
        return Draw((size - 1 - ages_B).clamp_(0, size - 1), None)  # rounding may reach one beyond


class PrioritisedSampling:
    """Proportional prioritised replay (Schaul et al. 2016, section 3.3): P(i) = p_i / Σ p.

    ``p = (|error| + 1e-6)^priority_exponent``; what the critic has not seen yet gets the largest p so far.
    The importance weights ``(n P(i))^-importance_exponent`` are divided by the largest of the batch, in
    which n and Σ p cancel.

    A table of two levels instead of a tree: priorities lie in N blocks of S slots, and the sum of each
    block is kept. A draw picks a block by the sums and a slot within it, for all rows at once: C / S + B ×
    S additions, least at S = √(C / B), and no loop in Python. Sums are made afresh from their blocks, in
    float64, so nothing drifts."""

    bytes_per_transition = 4

    def __init__(
        self, capacity: int, priority_exponent: float, importance_exponent: float, device: torch.device
    ) -> None:
        self._capacity = capacity
        self._priority_exponent = priority_exponent
        self._importance_exponent = importance_exponent
        self._device = device
        num_blocks = -(-capacity // _BLOCK_SLOTS)
        self._priorities_NS = torch.zeros((num_blocks, _BLOCK_SLOTS), device=device)
        self._priorities = self._priorities_NS.view(-1)
        """The same by slot; 0 for a free one and for those that fill the last block."""
        self._sums_N = self._priorities_NS.sum(dim=1, dtype=torch.float64)
        self._largest = torch.ones((), device=device)

    def draw(self, tail: int, size: int, batch_size: int, generator: torch.Generator | None = None) -> Draw:
        uniform_2B = _uniform((2, batch_size), generator, self._device)
        blocks_B = _invert(self._sums_N.cumsum(0), uniform_2B[0])
        within_BS = self._priorities_NS[blocks_B].cumsum(1, dtype=torch.float64)
        columns_B = _invert(within_BS, uniform_2B[1])
        slots_B = blocks_B * _BLOCK_SLOTS + columns_B
        # Free slots have priority 0; a parallel sum on a GPU may be off by its last bit all the same, and
        # then the draw falls on the neighbour that is held.
        offsets_B = ((slots_B - tail) % self._capacity).clamp_(max=size - 1)
        priorities_B = self._priorities[(offsets_B + tail) % self._capacity]
        weights_B = (priorities_B / priorities_B.min()).pow_(-self._importance_exponent)
        return Draw(offsets_B, weights_B)

    def written(self, place: int, num: int) -> None:
        self._fill(place, num, self._largest)

    def freed(self, place: int, num: int) -> None:
        self._fill(place, num, torch.zeros_like(self._largest))

    def learnt(self, places_B: torch.Tensor, errors_B: torch.Tensor, tail: int) -> None:
        new_B = (errors_B.detach().abs().float() + _SMALLEST_ERROR).pow_(self._priority_exponent)
        self._largest = torch.maximum(self._largest, new_B.max())
        slots_B = places_B % self._capacity
        # The places of one batch lie within C of each other: no two different ones share a slot.
        self._priorities[slots_B] = torch.where(places_B >= tail, new_B, self._priorities[slots_B])
        torch.sum(self._priorities_NS, dim=1, dtype=torch.float64, out=self._sums_N)

    def state_dict(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        priorities = self._priorities[places.to(self._device) % self._capacity]
        return {"largest": self._largest.cpu(), "priorities": priorities.cpu()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._largest = state["largest"].to(self._device)

    def rewritten(self, place: int, num: int, state: Mapping[str, torch.Tensor]) -> None:
        self._fill(place, num, state["priorities"].to(self._device))

    def _fill(self, place: int, num: int, values: torch.Tensor) -> None:
        """Give ``num`` priorities, or one to all of them, to the slots from that of ``place`` on."""
        first = place % self._capacity
        before_end = min(num, self._capacity - first)
        values = values.expand(num)
        for start, stop, given in (
            (first, first + before_end, values[:before_end]),
            (0, num - before_end, values[before_end:]),
        ):
            if stop > start:
                self._priorities[start:stop] = given
                blocks = slice(start // _BLOCK_SLOTS, (stop - 1) // _BLOCK_SLOTS + 1)
                self._sums_N[blocks] = self._priorities_NS[blocks].sum(dim=1, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """float64 in [0, 1) on ``device``, drawn where the generator is: 32 bit do not tell a million apart."""
    draws_on = device if generator is None else generator.device
    return _send(torch.rand(shape, generator=generator, device=draws_on, dtype=torch.float64), device)


def _send(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``drawn`` on ``device``. From ordinary memory a GPU would have to finish all its work first."""
    if device.type == "cuda" and drawn.device.type == "cpu":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def _invert(cumulative: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The first column whose cumulative sum exceeds the uniform part of the whole: int64 [B].

    ``cumulative`` is [K], or [B, K] with one sum for each row.
    """
    total = cumulative[..., -1]
    # Rounded up to the whole, it would point behind the last column.
    wanted_B = torch.minimum(uniform_B * total, torch.nextafter(total, torch.zeros_like(total)))
    if cumulative.dim() == 1:
        return torch.searchsorted(cumulative, wanted_B, right=True)
    return torch.searchsorted(cumulative, wanted_B.unsqueeze(1), right=True).squeeze(1)
