"""Settings of the replay log, its mirror and the reward shaping. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mara.common.config import LONGEST_S, Config

READ_BYTES = 32 << 20
"""Episodes in one reply of the store, about; the store holds such a reply whole in its memory."""
READ_AHEAD_BYTES = 64 << 20
"""Episodes that the learner's process has read and not yet taken in, about."""
APPEND_BYTES = 8 << 20
"""Episodes that an actor sends in one round trip, unless one alone is larger."""
QUARANTINE_ENTRIES = 64
"""Records kept of those that could not be decoded; the oldest go first."""
QUARANTINE_RECORD_BYTES = 64 << 10
"""What is kept of each. The hidden states come last in a record, so its start tells the most."""
_SMALLEST_LOG_BYTES = 1 << 14
_WEIGHTS_BYTES = 124 << 20
"""The published weights, and the new ones on their way: an agent of the paper's size takes 18 MB."""
NORMALISE_FROM_EPISODES = 16
"""Fewest episodes whose scores give a mean and deviation to divide by. From n scores a deviation is known to
about 1 in √(2 (n - 1)): 18 % at 16. That of two answers which happen to score alike is next to nothing, and
what is divided by it thousands of times too large."""


class ReplayConfig(Config):
    """Where episodes are kept on their way from the rollout actors to the learner."""

    redis_url: str | tuple[str, ...] | None = Field(default=None, repr=False)
    """Address of the Redis or Valkey server: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with user
    and password where it has them. A list of addresses makes as many shards of the log: actor i appends to
    shard i mod N, the learner reads all, and weights are on the first. A server may be named twice. None: a
    server of the run's own is started on this machine."""
    durable: bool = False
    """Whether the server of the run's own keeps an append-only file in ``RUN/replay/``, synced to the disk
    once a second, so that a crash of it loses a second or two of episodes instead of all unread ones. Of
    weights it keeps none; the learner publishes them again. Servers at ``redis_url`` have their own."""
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
    log_max_bytes: int = Field(default=1 << 30, ge=_SMALLEST_LOG_BYTES)
    """Bound on the episodes kept in the store, bytes; the oldest go first. It has to outlast the time in
    which the learner does not read. Each shard gets an equal part. Usual range 256 MiB – 64 GiB."""
    writer_buffer_bytes: int = Field(default=64 << 20, ge=_SMALLEST_LOG_BYTES)
    """Episodes a rollout actor keeps while the store is away or slow, bytes. Beyond it the oldest are dropped
    and counted (``replay/dropped``): an actor never waits for the store. Usual range 16 MiB – 1 GiB."""
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

    @field_validator("redis_url", mode="before")
    @classmethod
    def _addresses(cls, value: Any) -> Any:
        # One error for a wrong type, where a union would give one for each kind, with parts of the value.
        urls = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if value is not None and not all(isinstance(url, str) for url in urls):
            raise ValueError("replay.redis_url must be an address or a list of addresses")
        if not urls or (value is not None and not all(urls)):
            raise ValueError(
                "replay.redis_url is empty or has an empty entry; give addresses, or null for a server "
                "of the run's own"
            )
        return urls if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _durable_is_our_own(self) -> ReplayConfig:
        if self.durable and self.redis_url is not None:
            raise ValueError(
                "replay.durable is for the server that a run starts for itself; leave it out, and set "
                "'appendonly yes' on the server at replay.redis_url"
            )
        return self

    @model_validator(mode="after")
    def _shards_hold_something(self) -> ReplayConfig:
        if self.num_shards > 1 and self.shard_max_bytes < _SMALLEST_LOG_BYTES:
            raise ValueError(
                f"replay.log_max_bytes is {self.log_max_bytes}, {self.shard_max_bytes} for each of the "
                f"{self.num_shards} addresses of replay.redis_url; raise it to at least "
                f"{self.num_shards * _SMALLEST_LOG_BYTES}"
            )
        return self

    @property
    def redis_urls(self) -> tuple[str, ...]:
        """The address of each shard; none where the run starts a server of its own."""
        if self.redis_url is None:
            return ()
        return (self.redis_url,) if isinstance(self.redis_url, str) else self.redis_url

    @property
    def num_shards(self) -> int:
        """Parts of the log, at least 1."""
        return max(1, len(self.redis_urls))

    @property
    def shard_max_bytes(self) -> int:
        """Bound on the episodes kept in each shard, bytes."""
        return self.log_max_bytes // self.num_shards

    def store_max_bytes(self, num_actors: int, shards: Sequence[int] = (0,)) -> int:
        """Memory a server needs for ``shards`` of this log, in a run of ``num_actors`` actors, bytes.

        All that a server holds counts: its part of the log and a quarter more for its bookkeeping, the
        records set aside, the weights if it has the first shard, a reply on its way to the learner (twice,
        since sizes vary), and on each connection of an actor an append in several copies, or the weights,
        for which the actors of all shards come to the first.
        """
        log_bytes = len(shards) * (self.shard_max_bytes + self.shard_max_bytes // 4)
        num_writers = sum(actor % self.num_shards in shards for actor in range(num_actors))
        set_aside_bytes = QUARANTINE_ENTRIES * QUARANTINE_RECORD_BYTES
        weights_bytes = _WEIGHTS_BYTES if 0 in shards else 0
        num_connections = num_actors if 0 in shards else num_writers
        return (
            log_bytes + set_aside_bytes + weights_bytes + 2 * READ_BYTES + num_connections * 4 * APPEND_BYTES
        )


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
    """γ. The paper: 0.99. 1 keeps a late score in sight of early decisions; a short horizon
    keeps an agent from stock phrases (the quickstart has 0.75). Usual range 0.7–1."""
    discount_per: Literal["decision", "accepted_token"] = "decision"
    """What γ is applied for. With ``accepted_token`` a rejection costs no discount, so the return does not
    depend on how many candidates were turned down."""
