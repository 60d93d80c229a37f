"""The two halves of a gradient step as CUDA graphs.

A step is some two hundred small kernels. Launched one by one they take longer than they run; a graph has them
all started by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch

from mara.common.contracts import TransitionBatch
from mara.common.cuda_graph import capture

if TYPE_CHECKING:
    from mara.learner.sac import Seen

Gradients = Callable[[TransitionBatch, bool], "Seen"]
Move = Callable[[bool], None]

_EAGER_STEPS = 3
"""Steps that moved the networks, on batches of one shape, before it is captured: were the moments of the
optimisers made during a capture, each replay would make them anew."""
_READ = (
    "states_BD",
    "next_states_BD",
    "actions_B",
    "rewards_B",
    "discounts_B",
    "forced_B",
    "next_forced_B",
    "weights_B",
)
"""What a gradient step reads of a batch."""


class StepGraphs:
    """Captures a step once batches of its shape have come a few times, and replays it from then on.

    Of one shape at a time: another begins anew, and runs kernel by kernel until then. A graph works on the
    memory it was captured with: the batch is copied there, and the next step overwrites what is returned.
    """

    def __init__(self, gradients: Gradients, move: Move, parameters: Iterable[torch.Tensor]) -> None:
        self._gradients = gradients
        self._move = move
        self._parameters = list(parameters)
        self._shape: tuple[object, ...] = ()
        self._num_eager = 0
        self._captured: _Captured | None = None

    def forget(self) -> None:
        """Begin anew, as one must where an optimiser got other memory."""
        self._shape, self._num_eager, self._captured = (), 0, None

    def halves(
        self, batch: TransitionBatch, policy_learns: bool
    ) -> tuple[Callable[[], Seen], Callable[[], None]]:
        """What finds the gradients of a step on ``batch``, and what moves the networks by them."""
        shape = (policy_learns, *((t.shape, t.dtype) for t in _read(batch)), batch.weights_B is None)
        if shape != self._shape:
            self.forget()
            self._shape = shape
        if self._num_eager < _EAGER_STEPS:
            return partial(self._gradients, batch, policy_learns), partial(self._move_eagerly, policy_learns)
        if self._captured is None:
            self._captured = _Captured(self._gradients, self._move, self._parameters, batch, policy_learns)
        return partial(self._captured.gradients, batch), self._captured.move

    def _move_eagerly(self, policy_learns: bool) -> None:
        # Counted here, as a step that was skipped has not given the optimisers their moments.
        self._move(policy_learns)
        self._num_eager += 1


class _Captured:
    """The graphs of one shape, and the memory they work on."""

    def __init__(
        self,
        gradients: Gradients,
        move: Move,
        parameters: list[torch.Tensor],
        batch: TransitionBatch,
        policy_learns: bool,
    ) -> None:
        own = {name: getattr(batch, name) for name in TransitionBatch.__slots__}
        own |= {name: own[name].clone() for name in _READ if own[name] is not None}
        self._batch = TransitionBatch(**own)
        self._gradients, self._seen = capture(
            partial(gradients, self._batch, policy_learns), batch.states_BD.device
        )
        # Both graphs know the gradients by their address: nothing else may get that memory.
        self._kept = [parameter.grad for parameter in parameters]
        # Not to be done before: it moves the networks.
        self._moves, _ = capture(partial(move, policy_learns), batch.states_BD.device, warm_ups=0)

    def gradients(self, batch: TransitionBatch) -> Seen:
        for own, new in zip(_read(self._batch), _read(batch), strict=True):
            own.copy_(new)
        self._gradients.replay()
        return self._seen

    def move(self) -> None:
        self._moves.replay()


def _read(batch: TransitionBatch) -> list[torch.Tensor]:
    return [tensor for name in _READ if (tensor := getattr(batch, name)) is not None]
