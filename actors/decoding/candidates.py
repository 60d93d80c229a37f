"""Which tokens are candidates at a position, and in which order (section 3.1, steps 1 and 2).

Legend: B rows, V vocabulary, K the most candidates (``top_k``), J one more than that, U rows in which the
K-th and the next logit are equal, E tokens with that logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mara.actors.config import TruncationConfig


class Candidates(NamedTuple):
    """Candidate sets of B rows, most probable first. Entries from ``num_B[b]`` on are meaningless."""

    ids_BK: torch.Tensor
    """int64 token ids."""
    num_B: torch.Tensor
    """int64 in [1, K]."""
    reference_logprobs_BK: torch.Tensor
    """float32; after the temperature, normalised over the set; -inf outside it."""
    full_logprobs_BK: torch.Tensor
    """float32; of the LLM itself: temperature 1, whole vocabulary."""


def truncate(logits_BV: torch.Tensor, config: TruncationConfig) -> Candidates:
    """Keep the ``top_k`` most probable tokens, of those the fewest that reach ``top_p``.

    top-p is taken of the distribution renormalised over the top-k, as chained samplers do. The
    temperature does not change the set. Of equal logits the lower token id comes first, and is in where not
    all of them fit: neither the set nor its order depends on the device.

    Example: probabilities 0.5, 0.3, 0.15, 0.05 with ``top_k=3, top_p=0.8``: the top three renormalise to
    0.526, 0.316, 0.158; two of them reach 0.8, so the set is the first two.
    """
    logits_BV = logits_BV.float()
    k = min(config.top_k, logits_BV.shape[-1])
    logits_BK, ids_BK = _most_probable(logits_BV, k)
    order_BK = torch.argsort(ids_BK, dim=-1)
    order_BK = order_BK.gather(
        -1, torch.argsort(logits_BK.gather(-1, order_BK), dim=-1, descending=True, stable=True)
    )
    logits_BK, ids_BK = logits_BK.gather(-1, order_BK), ids_BK.gather(-1, order_BK)

    probabilities_BK = torch.softmax(logits_BK, dim=-1)
    before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
    inside_BK = before_BK < config.top_p
    inside_BK[:, 0] = True
    cooled_BK = (logits_BK / config.temperature).masked_fill(~inside_BK, -torch.inf)
    return Candidates(
        ids_BK=ids_BK,
        num_B=inside_BK.sum(dim=-1),
        reference_logprobs_BK=torch.log_softmax(cooled_BK, dim=-1),
        full_logprobs_BK=logits_BK - torch.logsumexp(logits_BV, dim=-1, keepdim=True),
    )


def _most_probable(logits_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k greatest logits of each row and their token ids, both [B, K], in no promised order.

    Which of equal ones ``topk`` takes is an accident of its kernel. In 16 bit the k-th and the next logit are
    often equal: then the ids that have this logit are looked for, and the lowest of them are taken.
    """
    if k == logits_BV.shape[-1]:
        return logits_BV.topk(k, dim=-1)
    best_BJ, ids_BJ = logits_BV.topk(k + 1, dim=-1)
    logits_BK, ids_BK = best_BJ[:, :k], ids_BJ[:, :k]
    tied_U = (best_BJ[:, k - 1] == best_BJ[:, k]).nonzero()[:, 0]
    if len(tied_U):
        border_U1, ids_UK = best_BJ[tied_U, k:], ids_BK[tied_U]
        rows_E, equal_ids_E = (logits_BV[tied_U] == border_U1).nonzero(as_tuple=True)  # by row, then by id
        places_UK = logits_BK[tied_U] == border_U1
        firsts_U = torch.searchsorted(rows_E, torch.arange(len(tied_U), device=rows_E.device))
        order_E = torch.arange(len(rows_E), device=rows_E.device) - firsts_U[rows_E]
        ids_UK[places_UK] = equal_ids_E[order_E < places_UK.sum(dim=-1)[rows_E]]
        ids_BK[tied_U] = ids_UK
    return logits_BK, ids_BK
