"""Settings that more than one part needs, and the base of all settings. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

LONGEST_S = 7 * 86400.0
"""Bound on settings in seconds: operating systems refuse to wait for absurdly long."""


class Config(BaseModel):
    """Frozen; unknown keys are errors; the text under each field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class AgentConfig(Config):
    """The accept-reject network: LayerNorm(d) → Linear → ReLU → Linear → ReLU → Linear 2 (section 3.2)."""

    widths: tuple[PositiveInt, PositiveInt] = (1024, 256)
    """Units of the two hidden layers. Usual range 64–2048."""
    accept_bias: float = Field(default=0.0, ge=-10, le=10)
    """Initial log-odds of acceptance. The paper starts at 0 (a coin flip), which makes the untrained
    agent reject half of what the LLM prefers; 1–3 starts close to the LLM. Usual range 0–3."""
    max_log_odds: float | None = Field(default=None, gt=0)
    """Bound on the acceptance log-odds, applied as c·tanh(x/c), which keeps the policy from saturating
    before the critic has learnt anything. None (the paper): no bound. Usual range 4–10."""
