"""Who waits for whom: how many gradient steps the learner may do, and when it takes in the next episode."""

from __future__ import annotations

import math


class RateLimiter:
    """Gradient steps earned by episodes and not done yet, and how often a transition may be sampled.

    Every episode earns ``steps_per_episode``. What is owed is bounded in one of two ways:

    - ``max_backlog_episodes`` given: at most that many episodes' worth of steps are owed; the rest is dropped
      and counted in :attr:`num_dropped`. The learner keeps to its ratio while it is fast enough, trains on
      fresh data at its own pace while it is not, and after a stall goes on at the usual pace instead of in a
      burst. Nobody waits for the learner.
    - ``None``: nothing is dropped. Whoever takes in episodes does so only while no step is allowed, so that
      the episodes wait: right where the log is finished.

    ``max_samples_per_transition`` bounds ``sampled / inserted``, the mean number of times that a transition
    was in a batch. At the bound the learner waits for new data, whatever is owed.

    Example: 2.5 steps an episode. The first episode allows 2 steps, the second 3. With batches of 100, a
    bound of 4 and 60 transitions an episode, the first allows 2 (200 ≤ 4 × 60 < 300), both together 4.
    """

    def __init__(
        self,
        steps_per_episode: float,
        max_backlog_episodes: int | None,
        max_samples_per_transition: float | None = None,
    ) -> None:
        self.steps_per_episode = steps_per_episode
        self.max_owed = math.inf
        if max_backlog_episodes is not None:
            # A whole step at the least, or a low ratio could never reach one.
            self.max_owed = max(1.0, steps_per_episode * max_backlog_episodes)
        self.max_samples_per_transition = max_samples_per_transition or math.inf
        self.owed = 0.0
        """Steps earned and not done, a fraction included."""
        self.num_dropped = 0.0
        """Steps dropped so far because the backlog was full."""

    def allows_step(self, num_sampled: int, num_inserted: int) -> bool:
        """Whether a gradient step may be done now.

        Args:
            num_sampled: transitions that will have been in batches, those of this step included.
            num_inserted: transitions that have come.
        """
        return self.owed >= 1 and num_sampled <= self.max_samples_per_transition * num_inserted

    def earn(self, num_episodes: int) -> None:
        """Add what ``num_episodes`` episodes are worth."""
        earned = self.owed + num_episodes * self.steps_per_episode
        self.owed = min(earned, self.max_owed)
        self.num_dropped += earned - self.owed

    def spend(self) -> None:
        """Take off one gradient step."""
        self.owed -= 1

    def state_dict(self) -> dict[str, float]:
        return {"owed": self.owed, "num_dropped": self.num_dropped}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.owed = min(state["owed"], self.max_owed)
        self.num_dropped = state["num_dropped"]
