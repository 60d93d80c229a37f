"""Which models the engine can drive: refused by name what it cannot, and checked by computing twice.

Legend: B rows, Q tokens of each row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from mara.actors.decoding.forward import Forward, Tokens
from mara.actors.decoding.logits import make_logit_head
from mara.actors.decoding.slots import SlotCache
from mara.common.errors import UserError

LAYER_KINDS = {"full_attention", "sliding_attention"}
CHECK_LENGTHS = (9, 4)
"""Tokens of the prompts that the self-check reads, in two rows."""
CHECK_WIDTH = 3
"""Candidates of each row in its wide step."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Largest relative difference of states by number format. A wrong mask or position is off by tenths."""
TOLERANCE_16_BIT = 0.15

_checked: weakref.WeakSet[Any] = weakref.WeakSet()


def check_supported(model: Any, num_tokens: int) -> None:
    """Refuse by name what would be silently wrong, or too short for ``num_tokens`` of prompt and answer.

    Raises:
        UserError: the attention takes no 4-D mask, layers are of an unknown kind, or positions are too few.
    """
    text_config = model.config.get_text_config()
    name = text_config.model_type
    if text_config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"llm.model: {name} runs with {text_config._attn_implementation!r} attention, which takes no "
            "4-D mask; load it with sdpa or eager attention"
        )
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if kinds - LAYER_KINDS:
        raise UserError(
            f"llm.model: {name} has layers of the kind {sorted(kinds)}; only attention is supported"
        )
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and num_tokens > longest:
        raise UserError(
            f"llm.model: {name} has {longest} positions, prompt and answer may have {num_tokens}; "
            "lower rollout.max_prompt_tokens or decoding.max_new_tokens"
        )


def self_check(model: Any) -> None:
    """Compare wide steps in the slot cache with a full recompute, once for each loaded model.

    Two prompts of different length are read into two rows; three candidates of each go through one pass, the
    second is kept, and another step follows. Every hidden state, and the logits made of it, must be those
    that the model gives for the whole text without a cache.

    Raises:
        UserError: they differ, or the model fails on the mask or the cache; names the model.
    """
    if model in _checked:
        return
    name = model.config.get_text_config().model_type
    try:
        difference = _largest_difference(model)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"llm.model: {name} cannot be driven with a cache and a mask of our own ({reason}); "
            "use another model"
        ) from error
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE_16_BIT)
    if not difference <= tolerance:
        raise UserError(
            f"llm.model: {name} computes other states with a cache and a mask of our own than without "
            f"(relative difference {difference:.2g}, allowed {tolerance:.2g}); use another model"
        )
    _checked.add(model)


@torch.inference_mode()
def _largest_difference(model: Any) -> float:
    """Largest relative difference of a state or its logits between the slot cache and a full recompute."""
    text_config = model.config.get_text_config()
    draws = torch.Generator().manual_seed(0)
    longest = max(CHECK_LENGTHS)
    texts = torch.randint(0, text_config.vocab_size, (2, longest + 2 * CHECK_WIDTH), generator=draws)
    forward = Forward(model, SlotCache(model, len(CHECK_LENGTHS), longest + 2 * CHECK_WIDTH))
    rows = slice(0, len(CHECK_LENGTHS))
    positions_BQ = torch.arange(longest).expand(2, -1)
    forward(rows, Tokens(texts[:, :longest], positions_BQ, positions_BQ, positions_BQ), longest)

    lengths_B = torch.tensor(CHECK_LENGTHS)
    kept: list[list[int]] = [texts[row, :length].tolist() for row, length in enumerate(CHECK_LENGTHS)]
    worst = 0.0
    logit_head = make_logit_head(model)
    for step in range(2):
        ids_BQ = texts[:, longest + step * CHECK_WIDTH :][:, :CHECK_WIDTH]
        lengths_BQ = lengths_B[:, None].expand(-1, CHECK_WIDTH)
        slots_BQ = lengths_BQ + torch.arange(CHECK_WIDTH)
        span = int(slots_BQ.max()) + 1
        states_BQD = forward(rows, Tokens(ids_BQ, lengths_BQ, slots_BQ, lengths_BQ), span)
        for row in range(len(kept)):
            for place, token in enumerate(ids_BQ[row].tolist()):
                plain = model(
                    torch.tensor([[*kept[row], token]], device=model.device),
                    output_hidden_states=True,
                    use_cache=False,
                )
                state_D = states_BQD[row, place]
                worst = max(
                    worst,
                    _difference(state_D, plain.hidden_states[-1][0, -1]),
                    _difference(logit_head(state_D[None])[0], plain.logits[0, -1]),
                )
        # The second candidate is kept: it moves to the front of its row's free slots.
        index_B = torch.arange(len(kept), device=model.device)
        lengths = lengths_B.to(model.device)
        forward.cache.keep(index_B, lengths + 1, lengths)
        for row in range(len(kept)):
            kept[row].append(int(ids_BQ[row, 1]))
        lengths_B = lengths_B + 1
    return worst


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the expected length; NaN where either is not a number."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))
