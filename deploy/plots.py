"""Pictures of a run, drawn from its record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from mara.deploy.recorder import EPISODES, METRICS_FILE
from mara.learner.statistics import NUM_RANKS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

REWARD_PLOT = "reward.png"
POSITION_PLOT = "accepted_positions.png"
CANDIDATES_PLOT = "accepted_positions_by_candidates.png"
POSITION_PREFIX = "episode/accepted_rank_"
SCORE_PREFIX = "episode/score/"
REWARD = "episode/reward"

LLM_ALONE = {"greedy": "--", "sampled": ":"}
"""How the LLM's own answers were drawn, by the names in a head's card, and the style of their line."""

Record = dict[str, float | None]
Levels = Mapping[str, Mapping[str, float]]
"""Metric → how the LLM's own answers were drawn → what they are worth on average."""


def draw_plots(folder: Path, top_k: int, levels: Levels = MappingProxyType({})) -> list[Path]:
    """Draw the reward curve and the accepted positions of the run in ``folder`` into it.

    ``top_k`` is the most candidates that a position of the run had, ``levels`` what the plain LLM reaches.
    Returns the files; none where the run ended before there was anything to draw.
    """
    records = [r for r in read_metrics(folder / METRICS_FILE) if r.get(REWARD) is not None]
    if not records:
        return []
    reward = _save(reward_curve(records, levels), folder / REWARD_PLOT)
    return [reward, _save(accepted_positions(records, top_k), folder / POSITION_PLOT)]


def read_metrics(path: Path) -> list[Record]:
    """The records of ``metrics.jsonl``, oldest first. A last line cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def llm_levels(base_scores: Levels, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What the plain LLM reaches in each panel of the reward curve.

    Args:
        base_scores: reward head → how the LLM's own answers were drawn → their mean score. The curve shows
            raw scores as well, whatever the learner makes of them.
        weights: of each reward head (Eq. 13). The reward is known where every head that counts is.
    """
    levels = {SCORE_PREFIX + name: dict(scores) for name, scores in base_scores.items()}
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    levels[REWARD] = {
        drawn: sum(weight * base_scores[name][drawn] for name, weight in counted.items())
        for drawn in LLM_ALONE
        if all(drawn in base_scores.get(name, {}) for name in counted)
    }
    return levels


def reward_curve(records: Sequence[Record], levels: Levels) -> Figure:
    """Reward (Eq. 13) and the raw score of each reward model against the episodes trained on.

    The lines of the plain LLM are those of the heads' fit: prompts, lengths and candidates were not quite
    those of the run, so they say where the run stands, not by how much it has won.
    """
    scores = sorted({name for record in records for name in record if name.startswith(SCORE_PREFIX)})
    figure = _figure(height=2.2 * (1 + len(scores)) + 0.6)
    panels = figure.subplots(1 + len(scores), 1, sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(panels, (REWARD, *scores), strict=True):
        points = [(r[EPISODES], r[name]) for r in records if r.get(name) is not None]
        episodes, values = (np.array(column) for column in zip(*points, strict=True))
        panel.plot(
            episodes,
            values,
            marker=".",
            linewidth=0.5,
            alpha=0.35,
            label="with the agent: mean of the answers in one report",
        )
        # A report has a few dozen answers, and answers differ much more than the policy moves in its time.
        panel.plot(
            episodes,
            _running_mean(values),
            linewidth=2,
            label="with the agent: running mean over a tenth of the run",
        )
        for drawn, style in LLM_ALONE.items():
            if (level := levels.get(name, {}).get(drawn)) is not None:
                label = f"the LLM alone, {drawn}: measured when the reward heads were fitted"
                panel.axhline(level, linestyle=style, color="dimgray", label=label)
        panel.set_ylabel(name.removeprefix("episode/").replace("score/", "score: "))
        panel.grid(alpha=0.3)
    _label_once(figure)
    panels[0].set_title("What the answers in training were worth")
    panels[-1].set_xlabel("episodes")
    return figure


def _label_once(figure: Figure, num_columns: int = 1) -> None:
    """One legend for all panels, below them: what is drawn in one panel only is in it as well."""
    handles: dict[str, Artist] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=num_columns,
        fontsize="small",
    )


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and those before it, as many as are a tenth of all."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - max(1, len(values) // 10))
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def accepted_positions(records: Sequence[Record], top_k: int) -> Figure:
    """Share of the acceptances by the candidate's place: in the first and the last quarter of the run.

    Places that no candidate can have, those beyond ``top_k``, are left out.
    """
    recorded = {name for record in records for name in record if name.startswith(POSITION_PREFIX)}
    names = sorted(name for name in recorded if _first_rank(name) < top_k)
    quarter = max(1, len(records) // 4)
    figure = _figure(height=3.5)
    panel = figure.subplots()
    for side, (label, part) in enumerate((("start", records[:quarter]), ("end", records[-quarter:]))):
        places = [index + (side - 0.5) * 0.4 for index in range(len(names))]
        panel.bar(places, [_mean(part, name) for name in names], width=0.4, label=f"{label} of the training")
    panel.set_xticks(range(len(names)), [_place(name) for name in names])
    panel.set_xlabel("place of the accepted candidate")
    panel.set_ylabel("share of the acceptances")
    panel.legend()
    return figure


def draw_positions_by_candidates(folder: Path, reports: Sequence[Path]) -> Path | None:
    """Draw into ``folder`` where the accepted candidates of evaluations stood, under each k and p (Figure 3).

    Args:
        reports: files of ``mara eval RUN``, oldest first. Drawn are those whose settings are the last one's
            but for ``top_k`` and ``top_p``, the last of each such pair.

    Returns the file; None where there is one pair alone, and nothing to compare.
    """
    shares: dict[tuple[int, float], list[float]] = {}
    alike = None
    for path in reversed(reports):
        try:
            report = json.loads(path.read_text())
            settings, ranks = report["settings"], report["accepted_ranks"]
            truncation = settings["decoding"]["truncation"]
            pair = int(truncation.pop("top_k")), float(truncation.pop("top_p"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # Somebody put something else there.
        alike = alike or settings
        if settings == alike:
            shares.setdefault(pair, ranks)
    if len(shares) < 2:
        return None
    return _save(positions_by_candidates(shares), folder / CANDIDATES_PLOT)


def positions_by_candidates(shares: Mapping[tuple[int, float], Sequence[float]]) -> Figure:
    """Share of the accepted candidates by their place: a panel for each p, in it bars for each k.

    ``shares`` maps k and p to the shares of the first places, of which the last is that of all later ones.
    """
    ks, ps = (sorted(set(values)) for values in zip(*shares, strict=True))
    figure = _figure(height=2.6)
    panels = figure.subplots(1, len(ps), sharey=True, squeeze=False)[0]
    width = 0.8 / len(ks)
    for panel, p in zip(panels, ps, strict=True):
        for number, k in enumerate(ks):
            if (k, p) not in shares:
                continue
            values = shares[k, p]
            left = (number - (len(ks) - 1) / 2) * width
            places = [place + left for place in range(len(values))]
            panel.bar(places, values, width=width, color=f"C{number}", label=f"k {k}")
        names = [str(rank + 1) for rank in range(NUM_RANKS)] + ["later"]
        panel.set_xticks(range(len(names)), names)
        panel.set_title(f"p {p:g}", fontsize="medium")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("share of the acceptances")
    panels[len(ps) // 2].set_xlabel("place of the accepted candidate")
    _label_once(figure, num_columns=len(ks))
    return figure


def _first_rank(name: str) -> int:
    """The least rank that a metric counts: its own, or the first of those that are counted together."""
    rank = name.removeprefix(POSITION_PREFIX)
    return int(rank) if rank.isdigit() else NUM_RANKS


def _place(name: str) -> str:
    rank = name.removeprefix(POSITION_PREFIX)
    return str(int(rank) + 1) if rank.isdigit() else "later"


def _mean(records: Sequence[Record], name: str) -> float:
    values = [value for record in records if (value := record.get(name)) is not None]
    return sum(values) / max(len(values), 1)


def _figure(height: float) -> Figure:
    # The object interface needs no display and keeps no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(7, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
