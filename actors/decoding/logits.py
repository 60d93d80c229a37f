"""From hidden states to the LLM's own logits: the output embedding, and what some families do to its result.

Legend: B rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from mara.common.errors import UserError

FAMILIES = {
    "logit_scale": ("cohere",),
    "logits_scaling": ("granite",),
    "final_logit_softcapping": ("gemma", "vaultgemma", "nanochat"),
}
"""Settings that are applied here, and how the names of the model types begin that mean by them what we do.
Others give the same name another meaning: HyperCLOVA X multiplies by ``logits_scaling``."""

_ABOUT_LOGITS = re.compile(
    r"(final_|output_)?(logits?|lm_head|output)_(\w+_)?(scale|scaling|multiplier|(soft_?)?cap(ping)?)"
)


@dataclass(frozen=True, slots=True)
class LogitHead:
    """Turns last hidden states into the logits that ``model(...).logits`` would give, bit for bit."""

    embedding: Any
    """The output embedding, D → V."""
    factor: float | None = None
    """Cohere: multiplies the logits."""
    divisor: float | None = None
    """Granite: divides them."""
    cap: float | None = None
    """Gemma 2 and later: bounds them, c·tanh(x/c)."""

    def __call__(self, states_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of states [B, D], in the model's dtype."""
        logits_BV: torch.Tensor = self.embedding(states_BD)
        if self.factor is not None:
            logits_BV = logits_BV * self.factor
        if self.divisor is not None:
            logits_BV = logits_BV / self.divisor
        if self.cap is not None:
            logits_BV = torch.tanh(logits_BV / self.cap) * self.cap
        return logits_BV


def make_logit_head(model: Any) -> LogitHead:
    """The logit head of a Hugging Face causal language model.

    Raises:
        UserError: the model's configuration says something about logits that is not known here; named.
    """
    config = model.config.get_text_config()
    names = {*FAMILIES, *filter(_ABOUT_LOGITS.fullmatch, config.to_dict())}
    settings = {name: getattr(config, name, None) for name in sorted(names)}
    # A factor of 1 changes nothing, and a setting that is None is none.
    settings = {name: value for name, value in settings.items() if value is not None and value != 1}
    for name, value in settings.items():
        if not config.model_type.startswith(FAMILIES.get(name, ())):
            raise UserError(
                f"llm.model: {config.model_type} has {name}={value!r}, and what that does to its logits is "
                "not known; use another model"
            )
    return LogitHead(
        model.get_output_embeddings(),
        factor=settings.get("logit_scale"),
        divisor=settings.get("logits_scaling"),
        cap=settings.get("final_logit_softcapping"),
    )
