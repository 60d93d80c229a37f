"""Which of the candidates examined together is taken (section 3.2, steps 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from mara.actors.config import GateConfig

Fallback = Literal["last", "first"]


class Verdict(NamedTuple):
    """What a row's decisions of one forward pass come to."""

    num_asked: int
    """Decisions that count, from the first examined candidate on. What was computed beyond is as if never
    asked."""
    taken: int | None
    """Which of the examined candidates is taken, counted from the first of them. None: rejected, all of
    them."""


def examine(accepts: Sequence[bool], first_rank: int, num_candidates: int, fallback: Fallback) -> Verdict:
    """The first accepted candidate ends the position; those behind it are not asked about.

    ``accepts`` are the answers for the candidates ``first_rank``, ``first_rank + 1``, … of a set of
    ``num_candidates``. With ``fallback="last"`` the last of the set is taken whatever the answer; with
    ``"first"`` it may be rejected like any other.

    Example: ``examine([False, True, True], 0, 5, "last")`` asks two and takes the second;
    ``examine([False, False], 3, 5, "last")`` takes the fifth of the set, ``"first"`` none.
    """
    for index, accepted in enumerate(accepts):
        if accepted or (fallback == "last" and first_rank + index == num_candidates - 1):
            return Verdict(index + 1, index)
    return Verdict(len(accepts), None)


def may_ask(gate: GateConfig, first_logprob: float) -> bool:
    """Whether the agent is asked where the LLM gives the first candidate this log-probability."""
    return first_logprob <= math.log(gate.max_first_probability)


def may_reject(
    gate: GateConfig, reject_logprob: float, state_D: torch.Tensor, state_before_D: torch.Tensor
) -> bool:
    """Whether the agent's rejection of a first candidate counts.

    Args:
        reject_logprob: of that rejection, under the agent.
        state_D: the LLM's last hidden state at the candidate.
        state_before_D: the same at the token before it.
    """
    if math.exp(reject_logprob) < gate.min_confidence:
        return False
    if gate.min_salience == 0.0:
        return True
    cosine = torch.cosine_similarity(state_D.float(), state_before_D.float(), dim=0)
    return 1.0 - float(cosine) >= gate.min_salience
