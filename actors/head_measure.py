"""Measuring a reward head: accuracy on held-out pairs, and what it makes of broken texts.

Legend: T texts, R texts cut to a limit, C comparisons.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch

from mara.actors.head_config import FitConfig, FitReport, Share
from mara.actors.head_material import (
    BROKEN_TEXT,
    CUT,
    OFF_TOPIC,
    OWN,
    PREFERENCE,
    SALAD,
    SAMPLED,
    Material,
)
from mara.actors.heads import RewardHead
from mara.common.errors import UserError

PREFIXES = (24, 40)
"""Tokens to which both answers of a pair are cut as well."""


def in_share(places_T: torch.Tensor, config: FitConfig) -> torch.Tensor:
    """bool [T]: the text's prompt is fitted to."""
    position_T = (places_T - config.held_out) / (1 - config.held_out)
    low, high = config.share
    return (position_T >= max(low, 0)) & (position_T < high)


class ComparisonTable:
    """Texts, each cut to a limit, and weighted comparisons between them."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], int] = {}
        self.better: list[int] = []
        self.worse: list[int] = []
        self.kinds: list[str] = []

    def row(self, text: int, limit: int) -> int:
        return self._rows.setdefault((text, limit), len(self._rows))

    def add(self, better: tuple[int, int], worse: tuple[int, int], kind: str) -> None:
        self.better.append(self.row(*better))
        self.worse.append(self.row(*worse))
        self.kinds.append(kind)

    @property
    def texts_and_limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor(list(self._rows), dtype=torch.long)
        return rows[:, 0], rows[:, 1]


def comparison_table(material: Material, used_T: torch.Tensor, config: FitConfig) -> ComparisonTable:
    """All comparisons of the used texts: as they stand, between prefixes, and with their own prefixes."""
    table = ComparisonTable()
    whole = config.max_answer_tokens
    real: set[int] = set()
    for better, worse, kind in material.comparisons:
        if not used_T[better]:
            continue
        table.add((better, whole), (worse, whole), kind)
        if kind == PREFERENCE:
            for limit in PREFIXES:
                table.add((better, limit), (worse, limit), f"{PREFERENCE} {limit}")
        if kind == PREFERENCE or material.kinds_T[better] in OWN:
            real.add(better)
    for text in sorted(real):
        if (count := int(material.counts_T[text])) >= 10:
            for kind, share in CUT.items():
                table.add((text, whole), (text, max(2, int(count * share))), kind)
    return table


@torch.no_grad()
def score_texts(
    head: RewardHead, material: Material, texts_R: torch.Tensor, limits_R: torch.Tensor
) -> torch.Tensor:
    """Scores [R] of texts, each cut to its limit."""
    parts = [
        head(*material.take(texts_R[part], limits_R[part]))
        for part in torch.split(torch.arange(len(texts_R)), 512)
    ]
    return torch.cat(parts)


def texts_of(material: Material, kind: str) -> torch.Tensor:
    """Indices of the texts of a kind."""
    return torch.tensor([t for t, k in enumerate(material.kinds_T) if k == kind], dtype=torch.long)


def measure(head: RewardHead, material: Material, config: FitConfig) -> FitReport:
    """Accuracy and robustness on the held-out prompts."""
    held_out_T = material.places_T < config.held_out
    table = comparison_table(material, held_out_T, config)
    scores_R = score_texts(head, material, *table.texts_and_limits)
    right_C = (scores_R[table.better] > scores_R[table.worse]).numpy()
    by_kind: dict[str, list[int]] = {}
    for number, kind in enumerate(table.kinds):
        by_kind.setdefault(kind, []).append(number)
    pairs = by_kind.get(PREFERENCE, [])
    if not pairs:
        raise UserError(f"pairs: no pair of {config.pairs} falls into the held-out part; give more pairs")
    texts_R = table.texts_and_limits[0]
    groups = material.places_T[texts_R[torch.tensor(table.better)[pairs]]].numpy()
    low, high = wilson_interval(right_C[pairs], groups)
    used_T = in_share(material.places_T, config)
    shares = (*SALAD, *BROKEN_TEXT, *CUT, OFF_TOPIC)
    return FitReport(
        name=config.name,
        llm="",
        pairs=config.pairs,
        num_pairs=0,
        num_shared_answers=0,
        num_too_long=material.num_too_long,
        num_fit=sum(c.kind == PREFERENCE and bool(used_T[c.better]) for c in material.comparisons),
        num_held_out=len(pairs),
        accuracy=float(right_C[pairs].mean()),
        accuracy_low=low,
        accuracy_high=high,
        prefix_accuracy={n: float(right_C[by_kind[f"{PREFERENCE} {n}"]].mean()) for n in PREFIXES},
        robustness={
            kind: Share(share=float(right_C[by_kind[kind]].mean()), num=len(by_kind[kind]))
            for kind in shares
            if kind in by_kind
        },
        base_scores=_base_scores(head, material),
        length_slope=_length_slope(head, material),
        seconds=0,
    )


def wilson_interval(right_C: np.ndarray, groups_C: np.ndarray) -> tuple[float, float]:
    """95 % interval of the share of ``right_C``, bool [C] (Wilson's), whose ends are not the share itself
    where all are right or all wrong.

    Comparisons of one group, which are of one prompt, are alike: they count for as many as would, being
    independent, vary as much as the groups do. Where nothing varies a group counts for one.
    """
    share, num = float(right_C.mean()), len(right_C)
    names, members_C = np.unique(groups_C, return_inverse=True)
    num_groups = len(names)
    if 0 < share < 1 and num_groups > 1:
        over_G = np.bincount(members_C, weights=right_C - share)
        variance = num_groups / (num_groups - 1) * float(over_G @ over_G) / num**2
        num_effective = min(num, share * (1 - share) / variance) if variance > 0 else num
    else:
        num_effective = num_groups
    squared = NormalDist().inv_cdf(0.975) ** 2 / num_effective
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    return max(0.0, middle - half), min(1.0, middle + half)


def _base_scores(head: RewardHead, material: Material) -> dict[str, float]:
    means = {}
    for kind in (*OWN, *SALAD):
        texts_R = texts_of(material, kind)
        if len(texts_R):
            scores_R = score_texts(head, material, texts_R, material.counts_T[texts_R])
            means[kind] = round(float(scores_R.mean()), 3)
    return means


def _length_slope(head: RewardHead, material: Material) -> float:
    texts_R = texts_of(material, SAMPLED)
    counts_R = material.counts_T[texts_R]
    whole_R = score_texts(head, material, texts_R, counts_R)
    half_R = score_texts(head, material, texts_R, (counts_R // 2).clamp(min=1))
    return round(float((half_R - whole_R).mean()), 3)
