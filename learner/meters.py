"""Metrics gathered between two rows of the record."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch


class Window:
    """Means and peaks of what was put in since it was last emptied. A name never put in does not appear."""

    def __init__(self) -> None:
        self._sums: dict[str, float | torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._peaks: dict[str, float] = {}

    def average(self, values: Mapping[str, float | torch.Tensor], prefix: str = "") -> None:
        """Count each value into the mean of its name; names get ``prefix``.

        A tensor without dimensions stays where it is until it is taken, so that nobody waits for its device.
        """
        for name, value in values.items():
            name = prefix + name
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def peak(self, name: str, value: float) -> None:
        """Keep the largest value under ``name``."""
        self._peaks[name] = max(value, self._peaks.get(name, value))

    def take(self) -> dict[str, float]:
        """Return the means and peaks by name, and begin anew."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        row = means | self._peaks
        for kept in (self._sums, self._counts, self._peaks):
            kept.clear()
        return row


class Clock:
    """Time since it was made, how much of that was idle, and what the learner's counters were then."""

    def __init__(self, gradient_steps: int, inserted: int, sampled: int, seconds: float = 0.0) -> None:
        """``seconds`` have passed already, for what goes on from a checkpoint."""
        self.gradient_steps = gradient_steps
        self.inserted = inserted
        """Transitions read by then."""
        self.sampled = sampled
        """Transitions sampled by then."""
        self.idle_s = 0.0
        """Seconds spent waiting since then; its owner adds to it."""
        self.held_back_s = 0.0
        """Seconds since then in which episodes had to wait for the learner; its owner adds to it."""
        self._began = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def idle_ratio(self) -> float:
        return self.idle_s / max(self.seconds, 1e-9)

    @property
    def held_back_ratio(self) -> float:
        return self.held_back_s / max(self.seconds, 1e-9)
