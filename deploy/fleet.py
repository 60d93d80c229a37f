"""The metrics of all rollout actors as one set."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

RATE_WINDOW_S = 10.0
COUNTS = ("_total", "_failed", "/dropped", "/refused")
"""How the names of metrics end that only ever grow."""


def fleet_metrics(
    live: Sequence[dict[str, float]], retired: Sequence[dict[str, float]] = ()
) -> dict[str, float]:
    """Put the actors' metrics together by name.

    Counts (:data:`COUNTS`) are summed, those of ``retired`` actors included, so that they never fall. Seconds
    (``…_s``) take the longest and policy versions the oldest: the actor that lags behind is the one to see.
    Everything else is the mean.
    """
    merged: dict[str, float] = {}
    for name in sorted({name for metrics in (*live, *retired) for name in metrics}):
        values = [metrics[name] for metrics in live if name in metrics]
        if name.endswith(COUNTS):
            merged[name] = sum(values) + sum(metrics.get(name, 0.0) for metrics in retired)
        elif not values:
            continue
        elif name.endswith("policy_version"):
            merged[name] = min(values)
        elif name.endswith("_s") and not name.endswith("_per_s"):
            merged[name] = max(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged


class Rates:
    """Growth of counts over the last seconds.

    None is told of a count until it has grown for a whole window: what comes first comes in one wave.
    """

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, dict[str, float]]] = deque()
        self._grows_since: dict[str, float] = {}

    def update(
        self, metrics: dict[str, float], names: Sequence[str], now_s: float | None = None
    ) -> dict[str, float]:
        """Return ``NAME_per_s`` for each count ``NAME_total``: its growth in the window, per second."""
        now_s = time.monotonic() if now_s is None else now_s
        counts = {name: metrics.get(f"{name}_total", 0.0) for name in names}
        self._seen.append((now_s, counts))
        for name in names:
            if counts[name] > 0:
                self._grows_since.setdefault(name, now_s)
        while len(self._seen) > 2 and now_s - self._seen[0][0] > self._window_s:
            self._seen.popleft()
        then_s, then = self._seen[0]
        passed_s = now_s - then_s
        known = [name for name in names if now_s - self._grows_since.get(name, now_s) >= self._window_s]
        return {f"{name}_per_s": (counts[name] - then[name]) / passed_s for name in known}
