"""Which of the candidates examined together is taken (section 3.2, steps 3 and 4), or by value which is best.

Legend: B rows of a pass, Q candidates that it examines of each, D hidden size, N candidates of any rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from mara.actors.config import GateConfig
from mara.actors.decoding.generation import Decision, Row
from mara.actors.decoding.policies import Answer, ValuePolicy, ask

Fallback = Literal["last", "first"]

CERTAIN = Answer(accept=True, accept_logprob=0.0, reject_logprob=-math.inf, policy_version=0)
"""Of a candidate that is taken without any chance in it; the other of one that is not."""
NO_STATE = torch.empty(0)
"""Nothing is trained on what was compared by value, and the states of all candidates would fill a GPU."""
REFUSED = Answer(accept=False, accept_logprob=-math.inf, reject_logprob=0.0, policy_version=0)


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


def decide(rows: Sequence[Row], states_BQD: torch.Tensor, fallback: Fallback) -> list[int | None]:
    """Which of the examined candidates each row takes, None where all were rejected; records the decisions.

    Args:
        states_BQD: the LLM's last hidden states at the examined candidates, from each row's rank on.
    """
    taken: list[int | None] = [0] * len(rows)
    for index, row in enumerate(rows):
        if row.retaken:
            _record_fallback(row, states_BQD[index, 0])
    undecided = [(index, row) for index, row in enumerate(rows) if row.undecided]
    _compare([(index, row) for index, row in undecided if row.goes_by_value], states_BQD, taken)
    _ask([(index, row) for index, row in undecided if not row.goes_by_value], states_BQD, taken, fallback)
    return taken


def _ask(
    rows: Sequence[tuple[int, Row]],
    states_BQD: torch.Tensor,
    taken: list[int | None],
    fallback: Fallback,
) -> None:
    """Put what the ``rows`` take, whose policies decide about candidate after candidate, into ``taken``."""
    if not rows:
        return
    asked = [(row, q) for _, row in rows for q in range(row.num_examined)]
    states_ND = _states_of(rows, states_BQD)
    draws = [draw for _, row in rows for draw in row.draws(row.num_examined)]
    answers = ask([row.policy for row, _ in asked], states_ND, torch.tensor(draws))
    accepts = [
        answer.accept or _is_overruled(row, q, answer, states_ND[place])
        for place, ((row, q), answer) in enumerate(zip(asked, answers, strict=True))
    ]
    verdicts: list[tuple[int, Row, int, Verdict]] = []
    begin = 0
    for index, row in rows:
        end = begin + row.num_examined
        verdict = examine(accepts[begin:end], row.rank, row.num, fallback)
        verdicts.append((index, row, begin, verdict))
        begin = end
    # What was examined beyond a row's decision is dropped here: records keep what they point into alive.
    used = [begin + offset for _, _, begin, verdict in verdicts for offset in range(verdict.num_asked)]
    used_ND = states_ND if len(used) == len(asked) else states_ND[_index(used, states_ND)]
    states = iter(used_ND.unbind())
    for index, row, begin, verdict in verdicts:
        row.use_draws(verdict.num_asked)
        for offset in range(verdict.num_asked):
            rank = row.rank + offset
            answer = answers[begin + offset]
            if forced := fallback == "last" and rank == row.num - 1:
                answer = CERTAIN._replace(policy_version=answer.policy_version)
            _record(row, next(states), rank, offset == verdict.taken, forced, answer)
        taken[index] = verdict.taken
        if verdict.taken is None:
            taken[index] = _reject(row, states_BQD[index, 0])


def _compare(rows: Sequence[tuple[int, Row]], states_BQD: torch.Tensor, taken: list[int | None]) -> None:
    """Put what the ``rows`` take, whose policies compare the candidates, into ``taken``; records them all."""
    of_critics: dict[int, list[tuple[int, Row, ValuePolicy]]] = {}
    for index, row in rows:
        assert isinstance(row.policy, ValuePolicy)
        of_critics.setdefault(id(row.policy.critic), []).append((index, row, row.policy))
    for own in of_critics.values():
        *_, policy = own[0]
        values = iter(policy.values(_states_of([(index, row) for index, row, _ in own], states_BQD)))
        for index, row, policy in own:
            best = policy.choose([next(values) for _ in range(row.num_examined)])
            if best > 0 and row.gate is not None and row.state_before_D is not None:
                best *= may_reject(row.gate, 0.0, states_BQD[index, 0], row.state_before_D)
            taken[index] = best
            for rank in range(row.num_examined):
                _record(row, NO_STATE, rank, rank == best, False, CERTAIN if rank == best else REFUSED)


def _states_of(rows: Sequence[tuple[int, Row]], states_BQD: torch.Tensor) -> torch.Tensor:
    """[N, D]: the states at all examined candidates of the ``rows``, one row after the other."""
    places = [(index, q) for index, row in rows for q in range(row.num_examined)]
    return states_BQD[
        _index([index for index, _ in places], states_BQD), _index([q for _, q in places], states_BQD)
    ]


def _index(numbers: list[int], beside: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=beside.device)


def _is_overruled(row: Row, q: int, answer: Answer, state_D: torch.Tensor) -> bool:
    """Whether the row's gate takes the first candidate although the policy has rejected it."""
    if row.gate is None or row.state_before_D is None or row.rank + q > 0:
        return False
    return not may_reject(row.gate, answer.reject_logprob, state_D, row.state_before_D)


def _record(row: Row, state_D: torch.Tensor, rank: int, taken: bool, forced: bool, answer: Answer) -> None:
    row.generation.decisions.append(
        Decision(
            state_D=state_D,
            action=int(taken),
            rank=rank,
            num_candidates=row.num,
            position=len(row.generation.response_ids),
            forced=forced,
            reference_logprob=row.reference_logprobs[rank],
            accept_logprob=answer.accept_logprob,
            reject_logprob=answer.reject_logprob,
            policy_version=answer.policy_version,
        )
    )


def _reject(row: Row, first_state_D: torch.Tensor) -> int | None:
    """All examined candidates were rejected: go on to the next ones, more of them at a time.

    When all of the set were rejected, the first is taken in their place. If it was among those examined,
    whose states are ``first_state_D`` and so on, that is done at once (0 is returned), else in the next
    pass.
    """
    began_at = row.rank
    row.rank += row.num_examined
    row.misses += 1
    if row.rank < row.num:
        return None
    row.rank, row.retaken = 0, True
    if began_at > 0:
        return None
    _record_fallback(row, first_state_D)
    return 0


def _record_fallback(row: Row, state_D: torch.Tensor) -> None:
    """The first candidate is taken because all were rejected: a decision that nobody was asked about."""
    # The rejection that left nothing else decided this.
    version = row.generation.decisions[-1].policy_version
    _record(row, state_D.clone(), 0, True, True, CERTAIN._replace(policy_version=version))
