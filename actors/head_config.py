"""Settings of reward heads and of fitting them. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mara.common.config import Config


class HeadShape(Config):
    """What a reward head computes; stored in its ``head.json``."""

    hidden_size: int = Field(ge=1)
    """Hidden size D of the LLM it belongs to."""
    pools: tuple[Literal["mean", "deviation", "last"], ...] = Field(default=("mean",), min_length=1)
    """How the states of an answer's tokens become features; several are put side by side."""
    width: int = Field(default=0, ge=0)
    """Units of the hidden layer. 0: linear. Usual range 0–128."""
    members: int = Field(default=1, ge=1)
    """Networks fitted to different parts of the pairs. Usual range 1–8."""
    pessimism: float = Field(default=0.0, ge=0)
    """How many deviations over the members are taken off their mean. Usual range 0–1."""
