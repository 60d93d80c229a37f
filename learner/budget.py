"""The replay ratio: how many gradient steps the learner may do."""

from __future__ import annotations


class StepBudget:
    """Gradient steps earned by episodes and not done yet.

    Every episode earns ``steps_per_episode``. At most ``max_backlog_episodes`` times that are owed at any
    time; the rest is dropped and counted in :attr:`num_dropped`. The learner thus keeps to its ratio while
    it is fast enough, trains on fresh data at its own pace while it is not, and after a stall goes on at the
    usual pace instead of in a burst.

    Example: 2.5 steps an episode. The first episode allows 2 steps, the second 3.
    """

    def __init__(self, steps_per_episode: float, max_backlog_episodes: int) -> None:
        self.steps_per_episode = steps_per_episode
        # A whole step at the least, or a low ratio could never reach one.
        self.max_owed = max(1.0, steps_per_episode * max_backlog_episodes)
        self.owed = 0.0
        """Steps earned and not done, a fraction included."""
        self.num_dropped = 0.0
        """Steps dropped so far because the backlog was full."""

    @property
    def allows_step(self) -> bool:
        """Whether a gradient step may be done now."""
        return self.owed >= 1

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
