"""Signs that training has gone wrong, and what is kept of a batch that broke it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from mara.common.agent import not_finite
from mara.common.contracts import TransitionBatch
from mara.common.files import replacing

BATCH_FILE = "not-finite-batch.safetensors"
MOST_TIMES_RETURN = 3.0
"""Action values beyond so many times the largest return cannot be mere overestimation."""
LEAST_RETURN = 0.01
"""Returns count as no less: an untrained critic's values are not 0 either."""
LEAST_ENTROPY = 0.05
"""A policy with less than this fraction of its target entropy has collapsed."""


def return_bound(largest_return: float, temperature: float, longest_episode: int) -> float:
    """No true soft value exceeds this by its amount: all rewards, and α ln 2 for each decision at most.

    Args:
        largest_return: sum of the absolute rewards of an episode, the largest there is.
        temperature: α.
        longest_episode: decisions of the longest episode.
    """
    return max(LEAST_RETURN, largest_return + temperature * math.log(2) * longest_episode)


def signs(row: Mapping[str, float], bound: float) -> dict[str, float]:
    """Return 1 for each sign that one row of the record shows, else 0, by the name of its metric.

    ``row`` has means of the gradient steps (``sac/…``), ``bound`` is that of :func:`return_bound`. Empty
    where there was no gradient step.
    """
    if "sac/q_mean" not in row:
        return {}
    largest = max(abs(row["sac/q_mean"]), abs(row["sac/target_mean"]))
    return {
        "health/q_exploding": float(largest > MOST_TIMES_RETURN * bound),
        "health/entropy_collapsed": float(row["sac/entropy"] < LEAST_ENTROPY * row["sac/target_entropy"]),
    }


def messages(row: Mapping[str, float]) -> dict[str, str]:
    """Return what to tell of one row of the record, by kind: what it shows, and what may help."""
    told: dict[str, str] = {}
    if row.get("health/q_exploding"):
        value = max(row["sac/q_mean"], row["sac/target_mean"], key=abs)
        told["q_exploding"] = (
            f"the critic's values explode: {value:.3g} on average, and no answer in the replay is worth more "
            f"than {row['replay/return_bound']:.3g}; lower learner.sac.critic_learning_rate, "
            "learner.sac.polyak or shaping.discount"
        )
    if row.get("health/entropy_collapsed"):
        told["entropy_collapsed"] = (
            f"the policy's entropy has collapsed to {row['sac/entropy']:.3g} nats (target "
            f"{row['sac/target_entropy']:.3g}): it explores no more; raise "
            "learner.sac.initial_temperature or learner.sac.temperature_learning_rate, or lower "
            "learner.sac.policy_learning_rate"
        )
    if row.get("learner/steps_skipped"):
        told["steps_skipped"] = (
            f"{row['learner/steps_skipped']:.0f} gradient steps were skipped so far: a loss or a gradient "
            "was not finite"
        )
    return told


def save_batch(path: Path, batch: TransitionBatch, why: str) -> None:
    """Write the columns of ``batch`` as safetensors, by their names, with ``why`` in the metadata.

    Raises:
        OSError: there is no room for them, or no folder.
    """
    columns = {name: getattr(batch, name) for name in TransitionBatch.__slots__}
    tensors = {name: column.cpu().contiguous() for name, column in columns.items() if column is not None}
    bad = not_finite({name: column for name, column in tensors.items() if column.is_floating_point()})
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"why": why, "not_finite": ", ".join(bad)})
