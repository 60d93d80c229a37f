"""How many candidates a row examines in a pass, learnt from the passes themselves.

A wider pass costs more and is less often rejected to its end. How much more depends on the processor, the
number of rows and the number format: on two CPU cores one row costs the same with one candidate as with four,
sixty-four rows cost nearly four times as much. Every width takes the same decisions, so they can be tried out
while decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from mara.actors.config import WIDEST_TUNED

WINDOWS = tuple(1 << power for power in range(WIDEST_TUNED.bit_length()))
TRIES = 3
"""Passes that a window is tried for."""
TRY_AGAIN = 512
"""Passes after which all windows are tried anew: the machine may have become busier, answers longer."""
FORGETTING = 0.999
"""What the ranks taken so far count one position later: agents change."""


class WindowTuner:
    """Chooses the window with the least expected time a token, apart for each order of magnitude of rows.

    Args:
        top_k: no row has more candidates.
    """

    def __init__(self, top_k: int) -> None:
        # All candidates at once is worth a try as well: then no position takes a second pass.
        self._windows = sorted({window for window in WINDOWS if window <= top_k} | {min(top_k, WIDEST_TUNED)})
        # Before anything is known, the first candidate is the likeliest.
        self._ranks = [2.0**-rank for rank in range(top_k)]
        self._costs: dict[int, _Costs] = {}

    def window(self, num_rows: int) -> int:
        """Candidates that each of ``num_rows`` rows should examine in the next pass, at most."""
        size = num_rows.bit_length()
        costs = self._costs.get(size)
        if costs is None or costs.age >= TRY_AGAIN:
            costs = self._costs[size] = _Costs()
        costs.age += 1
        best, least_s, last_s = self._windows[0], float("inf"), 0.0
        for window in self._windows:
            passes = self._passes_a_token(window)
            tried = costs.seconds.get(window, [])
            if len(tried) < TRIES:
                # A pass costs no less than one with fewer candidates: it is not tried where that is too much.
                if last_s * passes < least_s:
                    return window
                continue
            last_s = statistics.median(tried)
            if last_s * passes < least_s:
                best, least_s = window, last_s * passes
        return best

    def measured(self, num_rows: int, window: int, seconds: float) -> None:
        """A pass over ``num_rows`` rows with the ``window`` that was chosen for it took ``seconds``."""
        self._costs[num_rows.bit_length()].seconds.setdefault(window, []).append(seconds)

    def taken(self, ranks: Sequence[int]) -> None:
        """Candidates of these ranks were taken, one at each position."""
        kept = FORGETTING ** len(ranks)
        self._ranks = [weight * kept for weight in self._ranks]
        for rank in ranks:
            self._ranks[rank] += 1.0

    def _passes_a_token(self, window: int) -> float:
        passes = sum(weight * (rank // window + 1) for rank, weight in enumerate(self._ranks))
        return passes / sum(self._ranks)


@dataclass(slots=True)
class _Costs:
    """Seconds of passes by the window chosen for them."""

    age: int = 0
    """Passes so far."""
    seconds: dict[int, list[float]] = field(default_factory=dict)
