"""Which tokens are candidates at a position, and in which order (section 3.1, steps 1 and 2).

Legend: B rows, V vocabulary, N blocks of it, K the most candidates (``top_k``), J one more than that, U rows
in which the K-th and the next logit are equal, E tokens with that logit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mara.actors.config import TruncationConfig

_BLOCK = 64
"""Neighbouring tokens of which the greatest logit is looked at first."""
_CACHED = 1 << 20
"""Logits that a CPU looks at together: few enough to stay in its cache from one operation to the next."""


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
    k = min(config.top_k, logits_BV.shape[-1])
    maxima_BN, totals_B = _survey(logits_BV)
    logits_BK, ids_BK = _most_probable(logits_BV, maxima_BN, k)
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
        full_logprobs_BK=logits_BK - totals_B[:, None],
    )


def log_totals(logits_BV: torch.Tensor) -> torch.Tensor:
    """Log of the sum of exp over the vocabulary, float32 [B]."""
    return _survey(logits_BV)[1]


def _survey(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the whole vocabulary is looked at for, once: float32 [B, N], the greatest logit of each whole
    block, and float32 [B], log of the sum of exp.

    On a CPU some rows at a time: with all of them memory would be what limits it.
    """
    num_rows, size = logits_BV.shape
    at_once = num_rows if logits_BV.is_cuda else max(1, _CACHED // size)
    surveyed = [_survey_rows(part_BV) for part_BV in torch.split(logits_BV, at_once)]
    maxima, totals = zip(*surveyed, strict=True)
    return torch.cat(maxima), torch.cat(totals)


def _survey_rows(logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits_BV = logits_BV.to(torch.float32, copy=True)
    size = logits_BV.shape[-1] // _BLOCK * _BLOCK
    maxima_BN = logits_BV[:, :size].view(len(logits_BV), size // _BLOCK, _BLOCK).amax(-1)
    greatest_B1 = torch.cat((maxima_BN, logits_BV[:, size:]), dim=-1).amax(-1, keepdim=True)
    sums_B = logits_BV.sub_(greatest_B1).exp_().sum(-1)
    return maxima_BN, sums_B.log_() + greatest_B1[:, 0]


def _greatest(logits_BV: torch.Tensor, maxima_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k greatest logits of each row, float32, descending, and their token ids, both [B, k].

    They are in the k blocks with the greatest maxima, or in what is left behind the last whole block.
    """
    num_rows, num_blocks = maxima_BN.shape
    if k >= num_blocks:
        logits_BK, ids_BK = logits_BV.topk(k, dim=-1)
        return logits_BK.float(), ids_BK
    blocks_BK = maxima_BN.topk(k, dim=-1).indices
    within = torch.arange(_BLOCK, device=logits_BV.device)
    ids = (blocks_BK[:, :, None] * _BLOCK + within).flatten(1)
    rest = torch.arange(num_blocks * _BLOCK, logits_BV.shape[-1], device=logits_BV.device)
    ids = torch.cat((ids, rest.expand(num_rows, -1)), dim=-1)
    logits_BK, places_BK = logits_BV.gather(-1, ids).float().topk(k, dim=-1)
    return logits_BK, ids.gather(-1, places_BK)


def _most_probable(
    logits_BV: torch.Tensor, maxima_BN: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k greatest logits of each row, float32, and their token ids, both [B, K], in no promised order.

    Which of equal ones ``topk`` takes is an accident of its kernel. In 16 bit the k-th and the next logit are
    often equal: then the ids that have this logit are looked for, and the lowest of them are taken.
    """
    if k == logits_BV.shape[-1]:
        return _greatest(logits_BV, maxima_BN, k)
    best_BJ, ids_BJ = _greatest(logits_BV, maxima_BN, k + 1)
    logits_BK, ids_BK = best_BJ[:, :k], ids_BJ[:, :k]
    tied_U = (best_BJ[:, k - 1] == best_BJ[:, k]).nonzero()[:, 0]
    if len(tied_U):
        border_U1, ids_UK = best_BJ[tied_U, k:], ids_BK[tied_U]
        are_equal_UV = logits_BV[tied_U] == border_U1.to(logits_BV.dtype)
        rows_E, equal_ids_E = are_equal_UV.nonzero(as_tuple=True)  # by row, then by id
        places_UK = logits_BK[tied_U] == border_U1
        firsts_U = torch.searchsorted(rows_E, torch.arange(len(tied_U), device=rows_E.device))
        order_E = torch.arange(len(rows_E), device=rows_E.device) - firsts_U[rows_E]
        ids_UK[places_UK] = equal_ids_E[order_E < places_UK.sum(dim=-1)[rows_E]]
        ids_BK[tied_U] = ids_UK
    return logits_BK, ids_BK
