"""Settings of the replay log, its mirror and the reward shaping. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mara.common.config import LONGEST_S, Config

READ_BYTES = 32 << 20
"""Episodes in one reply of the store, about; the store holds such a reply whole in its memory."""
READ_AHEAD_BYTES = 64 << 20
"""Episodes that the learner's process has read and not yet taken in, about."""
APPEND_BYTES = 8 << 20
"""Episodes that an actor sends in one round trip, unless one alone is larger."""
_WEIGHTS_BYTES = 128 << 20
"""The published weights, and the new ones on their way: an agent of the paper's size takes 18 MB."""
NORMALISE_FROM_EPISODES = 16
"""Fewest episodes whose scores give a mean and deviation to divide by. From n scores a deviation is known to
about 1 in √(2 (n - 1)): 18 % at 16. That of two answers which happen to score alike is next to nothing, and
what is divided by it thousands of times too large."""


class ReplayConfig(Config):
    """Where episodes are kept on their way from the rollout actors to the learner."""

    redis_url: str | None = Field(default=None, repr=False)
    """Address of the Redis or Valkey server: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with user
    and password where it has them. None: a server of the run's own is started on this machine."""
    from_run: Path | None = Field(default=None, alias="from")
    """Folder of a finished run to train from: its episodes, in their order, instead of new ones; with
    ``rollout.num_actors`` 0. That run must have kept them, by ``durable`` or at a ``redis_url``, which is
    given again where it needs a password. Relative to the current folder. None: rollout actors make them."""
    capacity_transitions: int = Field(default=1_000_000, ge=2)
    """Transitions the learner keeps; the oldest episodes make room. Usual range 20 thousand – 1 million (the
    paper). Memory grows with the filling, up to capacity × (2 × hidden size + 22) bytes, 26 with
    ``sampling`` "prioritised"."""
    sampling: Literal["uniform", "recency", "prioritised"] = "uniform"
    """How a batch is drawn from them. ``uniform`` (the paper): all alike. ``recency``: the older, the
    rarer, see ``half_life_transitions``. ``prioritised``: by what the critic gets wrong (Schaul et al.
    2016)."""
    half_life_transitions: float = Field(default=50_000.0, gt=0)
    """With ``recency``: of two transitions so far apart, the older one is drawn half as often. Usual range a
    twentieth to all of the capacity."""
    priority_exponent: float = Field(default=0.6, ge=0, le=2)
    """With ``prioritised``: the chance of a transition grows with its error to this power; 0 is uniform.
    Usual range 0.4–0.7."""
    importance_exponent: float = Field(default=0.4, ge=0, le=1)
    """With ``prioritised``: how far the critic's loss makes up for drawing some more often than others; 1
    does so wholly. Usual range 0.4–1."""
    log_max_bytes: int = Field(default=1 << 30, ge=1 << 14)
    """Bound on the episodes kept in the store, bytes; the oldest go first. It has to outlast the time in
    which the learner does not read. Usual range 256 MiB – 64 GiB."""
    connect_timeout_s: float = Field(default=5.0, gt=0, le=LONGEST_S)
    """How long the store may take to accept a connection or to answer, seconds. Usual range 1–30."""
    retry_first_s: float = Field(default=0.05, gt=0, le=LONGEST_S)
    """Pause before the second attempt when the store is away, seconds; it doubles at each further one."""
    retry_longest_s: float = Field(default=2.0, gt=0, le=LONGEST_S)
    """Bound on the pause between two attempts, seconds. Usual range 1–10."""
    max_outage_s: float = Field(default=60.0, gt=0, le=LONGEST_S)
    """How long the store may be away before its users give up, seconds. Usual range 10–600."""

    @model_validator(mode="after")
    def _pauses_grow(self) -> ReplayConfig:
        if self.retry_first_s > self.retry_longest_s:
            raise ValueError(
                f"replay.retry_first_s is {self.retry_first_s}, more than replay.retry_longest_s "
                f"{self.retry_longest_s}; lower the first or raise the second"
            )
        return self

    def store_max_bytes(self, num_actors: int) -> int:
        """Memory a store needs for this log and ``num_actors`` rollout actors, bytes.

        All that a server holds counts: the log and a quarter more for its bookkeeping, the weights, a reply
        on its way to the learner (twice, since sizes vary), and on each actor's connection an append in
        several copies, or the weights.
        """
        log_bytes = self.log_max_bytes + self.log_max_bytes // 4
        return log_bytes + _WEIGHTS_BYTES + 2 * READ_BYTES + num_actors * 4 * APPEND_BYTES


class ShapingConfig(Config):
    """How an episode's raw scores and log-probabilities become rewards and discounts (Eq. 8 and 13).

    Applied when the learner reads, so that one log can be read again with other settings.
    """

    score_weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each reward model by name (Eq. 13); negative for a cost. The paper: reward 1 or 2, cost
    -1. Scores without a weight are ignored."""
    normalise: Literal["none", "running"] = "none"
    """``running``: each reward model's scores are standardised by their running mean and deviation before
    they are weighted, so that the weights compare. An episode counts first and is standardised then; the
    first 16 wait until all of them have counted. ``none`` (the paper): raw scores."""
    normalise_episodes: int = Field(default=256, ge=NORMALISE_FROM_EPISODES)
    """The running mean and deviation are frozen after this many episodes: rewards that drift with the policy
    would hide its progress. Usual range 64–1024."""
    baseline: Literal["none", "prompt"] = "none"
    """``prompt``: the mean of the weighted scores seen earlier for the same prompt is subtracted; of all
    prompts, where this one is new. Prompts that are easy to answer well then teach nothing by that alone."""
    terminal: Literal["last", "spread", "progress", "postback"] = "last"
    """Where the weighted score is paid. ``last`` (the paper): at the last decision. ``spread``: evenly over
    the acceptances. ``progress``: each acceptance gets what it added to n/N × the score of the first n of
    the N tokens, which sums to the score; it needs reward models that judge unfinished answers, as reward
    heads do, and tells good tokens from bad ones within one answer. ``postback`` (the released code): at
    every decision, discounted once per accepted token from there to the end; it pays for making more
    decisions whenever the score is positive."""
    kl_weight: float = Field(default=0.1, ge=0)
    """λ of Eq. 8. Usual range 0.01–0.5."""
    kl_estimator: Literal["accepted_log_ratio", "pointwise", "reference_only", "none"] = "accepted_log_ratio"
    """Which per-decision penalty stands for the KL term; π is Eq. 6, both sides over the candidate set.

    - ``accepted_log_ratio``: -λ (log π(t) - log π_ref(t)) once per token, at its acceptance (a forced one
      too). Unbiased for the KL divergence of the answer.
    - ``pointwise``: at every decision -λ π(t_k) (log π(t_k) - log π_ref(t_k)), Eq. 8 to the letter; where all
      candidates were asked about, those of a position sum to its whole divergence. A first candidate that
      is retaken is one term all the same: its second record holds the difference to the first.
    - ``reference_only``: λ log π_ref(t) at the acceptance. With ``returns`` "bootstrapped" the other half of
      the divergence is the entropy bonus with α = λ, exactly: by Eq. 6, log π(t) is the sum over its
      decisions. With "monte_carlo" the entropy of later decisions is in no target, and the two halves do
      not make up the divergence: likely tokens are paid for beyond it.
    - ``none``: no penalty."""
    returns: Literal["bootstrapped", "monte_carlo"] = "bootstrapped"
    """What the critic learns. ``bootstrapped`` (the paper): a reward and the target network's value of the
    next state. ``monte_carlo``: the discounted sum of the rewards to the end of the episode, as the policy
    of that time made it: no waiting until value has travelled back through hundreds of updates, but blind
    to how the policy changed since, and without the entropy bonus of later decisions."""
    discount: float = Field(default=0.99, ge=0, le=1)
    """γ. The paper: 0.99. 1 keeps a late score in sight of early decisions. Usual range 0.95–1."""
    discount_per: Literal["decision", "accepted_token"] = "decision"
    """What γ is applied for. With ``accepted_token`` a rejection costs no discount, so the return does not
    depend on how many candidates were turned down."""
