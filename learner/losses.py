"""The losses of discrete soft actor-critic, as pure functions (Eq. 9–11).

Legend: B transitions, H the two critic heads, 2 actions (0 rejects, 1 accepts).

A forced decision is no choice: the last candidate is accepted whatever the policy says. It therefore
teaches the critic what accepting is worth, and is left out of the policy's and the temperature's loss;
the value of a forced state is that of accepting. Every function keeps the dtype of its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mara.common.agent import ACCEPT


def soft_value(
    q_HB2: torch.Tensor, logprobs_B2: torch.Tensor, alpha: torch.Tensor | float, forced_B: torch.Tensor
) -> torch.Tensor:
    """Return V [B], the soft value of each state: expected smaller Q plus α times the entropy.

    ``V(s) = sum_a pi(a|s) (min(Q1, Q2)(s, a) - alpha log pi(a|s))``, the inner part of Eq. 10, and
    ``min(Q1, Q2)(s, accept)`` where forced.

    Args:
        q_HB2: [2, B, 2] action values, head first.
        logprobs_B2: [B, 2] log-probabilities of the policy.
        alpha: the temperature, a scalar.
        forced_B: bool [B].

    Example: Q = (1, 3) in both heads, pi = (1/2, 1/2) and alpha = 0.1 give 2 + 0.1 ln 2 = 2.0693; forced, 3.
    """
    min_q_B2 = q_HB2.amin(dim=0)
    free_B = (logprobs_B2.exp() * (min_q_B2 - alpha * logprobs_B2)).sum(dim=-1)
    return torch.where(forced_B, min_q_B2[:, ACCEPT], free_B)


def td_target(
    rewards_B: torch.Tensor, discounts_B: torch.Tensor, next_values_B: torch.Tensor
) -> torch.Tensor:
    """Return the critic's target ``r + discount * V(s')`` [B] (Eq. 10).

    ``discounts_B`` is 0 at the end of an episode; the next value may then be anything, NaN included.
    """
    return rewards_B + torch.where(discounts_B > 0, discounts_B * next_values_B, 0.0)


def td_errors(q_HB2: torch.Tensor, actions_B: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
    """Return by how much each head misses the target at the action taken, [2, B]; see :func:`critic_loss`."""
    index_HB1 = actions_B.expand(q_HB2.shape[0], -1).unsqueeze(-1)
    return q_HB2.gather(-1, index_HB1).squeeze(-1) - targets_B.detach()


def critic_loss(
    q_HB2: torch.Tensor,
    actions_B: torch.Tensor,
    targets_B: torch.Tensor,
    weights_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of the action taken, averaged over rows and heads (Eq. 10), a scalar.

    Each head is fitted to the target by itself; Eq. 10 as printed fits the mean of the two, which leaves
    their difference, and so the minimum, undetermined.

    Args:
        q_HB2: [2, B, 2] action values, head first.
        actions_B: int64 [B].
        targets_B: [B], no gradient flows into them.
        weights_B: [B], what each row counts (Schaul et al. 2016, section 3.4). None: all the same.
    """
    squares_HB = td_errors(q_HB2, actions_B, targets_B).square()
    return squares_HB.mean() if weights_B is None else (weights_B * squares_HB).mean()


def policy_loss(
    logprobs_B2: torch.Tensor, q_HB2: torch.Tensor, alpha: torch.Tensor | float, forced_B: torch.Tensor
) -> torch.Tensor:
    """Return Eq. 9, a scalar: ``-(alpha H(pi) + sum_a pi(a) min(Q1, Q2)(a))``, mean over free decisions.

    The gradient flows into ``logprobs_B2`` [B, 2] only; ``q_HB2`` [2, B, 2] and ``alpha`` are constants.
    0 where every decision is forced.
    """
    min_q_B2 = q_HB2.detach().amin(dim=0)
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.detach()
    losses_B = (logprobs_B2.exp() * (alpha * logprobs_B2 - min_q_B2)).sum(dim=-1)
    return free_mean(losses_B, forced_B)


def temperature_loss(
    log_alpha: torch.Tensor, logprobs_B2: torch.Tensor, forced_B: torch.Tensor, target_entropy: float
) -> torch.Tensor:
    """Return Eq. 11, a scalar: ``alpha (H(pi) - target)``, mean over free decisions.

    The gradient flows into ``log_alpha`` only. Its descent lowers α while the entropy is above the target
    and raises it below. The expectation over actions is exact. 0 where every decision is forced.
    """
    surplus_B = entropy(logprobs_B2.detach()) - target_entropy
    return log_alpha.exp() * free_mean(surplus_B, forced_B)


def entropy(logprobs_B2: torch.Tensor) -> torch.Tensor:
    """Return the entropy [B] of each row of log-probabilities [B, 2], nats."""
    return -(logprobs_B2.exp() * logprobs_B2).sum(dim=-1)


def free_mean(values_B: torch.Tensor, forced_B: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``values_B`` over decisions that were not forced, or 0 if all were."""
    free_B = ~forced_B
    return torch.where(free_B, values_B, 0.0).sum() / free_B.sum().clamp(min=1)


@torch.no_grad()
def polyak_update(target: Iterable[torch.Tensor], online: Iterable[torch.Tensor], tau: float) -> None:
    """Move every target tensor towards its online one in place: ``target += tau (online - target)``."""
    for target_tensor, online_tensor in zip(target, online, strict=True):
        target_tensor.lerp_(online_tensor, tau)
