"""Settings of reward heads and of fitting them, and the report of a fit. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mara.common.config import Config


class HeadShape(Config):
    """What a reward head computes; stored in its ``head.json``."""

    hidden_size: int = Field(ge=1, le=1 << 20)
    """Hidden size D of the LLM it belongs to."""
    width: int = Field(default=64, ge=0, le=1 << 16)
    """Units of the token network that recognises broken text. 0: none. Usual range 32–128."""
    sound_weight: float = Field(default=1.0, ge=0)
    """What the log-probability of the text being sound counts. Usual range 0.5–2."""
    length_weight: float = Field(default=0.3, ge=0)
    """What the logarithm of the number of tokens counts, in units of the preference's log-odds: a half of
    an answer must not score like the whole. Usual range 0–0.5."""


class FitConfig(Config):
    """How a reward head is fitted: `mara reward fit`."""

    pairs: str
    """JSON or JSONL file with preference pairs, or the name of a Hugging Face Hub data set."""
    pairs_split: str = "train"
    """Part of a Hub data set."""
    prompts: Path | None = None
    """Prompts (JSONL or text) to which the LLM's own answers, good and broken, are sampled. They should
    resemble those of the training run. None: the pairs' own prompts."""
    name: str = "reward"
    """What the head measures, such as ``helpful``; for its card."""
    data_licence: str = "not stated"
    """Licence of the pairs; for its card."""
    seed: int = 0
    """Draws the LLM's answers, the broken texts and the networks' first weights."""
    held_out: float = Field(default=0.15, gt=0, lt=1)
    """Share of the prompts that is kept for measuring. Which ones, does not depend on ``seed``."""
    share: tuple[float, float] = (0.0, 1.0)
    """The part of the other prompts to fit to. Heads with parts that do not overlap, such as (0, 0.65) and
    (0.65, 1), have no prompt in common, so that one can judge an agent trained with the other."""
    max_prompt_tokens: int = Field(default=128, ge=16)
    """Longer conversations lose their oldest turns; a pair whose last turn is longer still is left out."""
    max_answer_tokens: int = Field(default=64, ge=8)
    """Answers are cut to this. Set it near the answers of the training run. Usual range 48–256."""
    num_own_prompts: int = Field(default=400, ge=10)
    """Prompts whose answers by the LLM are sampled, eight to each."""
    own_tokens: int = Field(default=48, ge=4)
    """Longest answer that is sampled."""
    num_broken_prompts: int = Field(default=350, ge=10)
    """Pairs of which one text is also broken in every way."""
    penalty: Literal["features", "noise"] = "features"
    """What ``ridge`` keeps small. ``features``: the preference weights, in units of standardised features.
    ``noise``: how much the preference varies from token to token within an answer. Heads so fitted to other
    pairs agree with it more, so that an agent gains less that other heads do not see, and gains it slower:
    give it more answers."""
    ridge: float | None = Field(default=None, ge=0)
    """Strength of the penalty. Usual range 1e-4–3e-3 for ``features``, 1e-3–3e-2 for ``noise``. None: 3e-4
    and 1e-2."""
    width: int = Field(default=64, ge=1, le=1 << 16)
    """See ``HeadShape.width``."""
    steps: int = Field(default=1200, ge=1)
    """Gradient steps of the token network, 160 texts each."""
    sound_weight: float = Field(default=1.0, ge=0)
    """See ``HeadShape.sound_weight``."""
    length_weight: float = Field(default=0.3, ge=0)
    """See ``HeadShape.length_weight``."""
    max_batch_tokens: int = Field(default=4096, ge=64)
    """Tokens passed through the LLM at a time. More is faster on a GPU."""

    @property
    def ridge_used(self) -> float:
        if self.ridge is not None:
            return self.ridge
        return 3e-4 if self.penalty == "features" else 1e-2

    @model_validator(mode="after")
    def _share_is_a_part(self) -> FitConfig:
        check_share(self.share)
        return self


def check_share(share: tuple[float, float]) -> None:
    """The ends of a part of the prompts.

    Raises:
        ValueError: they are not two rising numbers from 0 to 1.
    """
    low, high = share
    if not 0 <= low < high <= 1:
        raise ValueError(f"share={share} must be two rising numbers from 0 to 1, such as (0, 0.65)")


class Share(Config):
    """How often the better of two texts was scored higher."""

    share: float = Field(ge=0, le=1)
    num: int = Field(ge=0)
    """Comparisons."""


class FitReport(Config):
    """What a fit gave, measured on held-out prompts."""

    name: str
    llm: str
    pairs: str
    num_pairs: int
    """Pairs read."""
    num_shared_answers: int
    """Pairs left out because one answer is given to more than two different prompts."""
    num_too_long: int
    """Pairs left out because of ``max_prompt_tokens``."""
    num_fit: int
    """Pairs fitted to."""
    num_held_out: int
    """Pairs of held-out prompts."""
    accuracy: float
    """Share of held-out pairs in which the chosen answer scores higher."""
    accuracy_low: float
    """Lower end of the 95 % interval (Wilson's, with pairs of one prompt taken together)."""
    accuracy_high: float
    prefix_accuracy: dict[int, float]
    """The same with both answers cut to so many tokens."""
    robustness: dict[str, Share]
    """By kind of broken text: how often the real text scores higher."""
    base_scores: dict[str, float]
    """Mean score of the LLM's own answers by how they were drawn; ``sampled`` defines 0."""
    length_slope: float
    """Change of the score of the LLM's sampled answers when they are cut to half, in deviations."""
    seconds: float
