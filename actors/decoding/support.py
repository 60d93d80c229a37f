"""Which models the engine can drive: refused by name what it cannot, and checked by computing twice.

Legend: B rows, Q tokens of each row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from mara.actors.decoding.attention import GROUPED, group_heads, repeat_heads
from mara.actors.decoding.forward import Forward, Tokens
from mara.actors.decoding.logits import make_logit_head
from mara.actors.decoding.slots import SlotCache
from mara.common.errors import UserError

LAYER_KINDS = {"full_attention", "sliding_attention"}
LOCAL_ATTENTION = ("attention_types", "attention_layers")
"""Settings of GPT-Neo's kind of local attention, which counts from the end of the cache, not of the row."""
CHECK_LENGTHS = (9, 4)
"""Tokens of the prompts that the self-check reads, in two rows; the first is longer where a window is."""
CHECK_WIDTH = 3
"""Candidates of each row in its wide step."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Largest relative difference of states by number format. A wrong mask or position is off by 0.3 and more in
a trained model; in one of random weights positions hardly matter, and 16 bit hides a wrong one."""
TOLERANCE_16_BIT = 0.15
TOLERANCE_8_BIT_WEIGHTS = 0.25
"""bitsandbytes looks for outliers in the whole batch, so that rows depend a little on their neighbours."""

_checked: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def check_supported(model: Any, num_tokens: int) -> None:
    """Refuse by name what would be silently wrong, or too short for ``num_tokens`` of prompt and answer.

    Raises:
        UserError: the attention takes no 4-D mask, layers are of an unknown kind, or positions are too few.
    """
    text_config = model.config.get_text_config()
    name = text_config.model_type
    if text_config._attn_implementation not in ("sdpa", GROUPED, "eager"):
        raise UserError(
            f"llm.model: {name} runs with {text_config._attn_implementation!r} attention, which takes no "
            "4-D mask; load it with sdpa or eager attention"
        )
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if kinds - LAYER_KINDS:
        raise UserError(
            f"llm.model: {name} has layers of the kind {sorted(kinds)}; only attention is supported"
        )
    if any("local" in str(getattr(text_config, setting, "")) for setting in LOCAL_ATTENTION):
        raise UserError(
            f"llm.model: {name} has local attention without a mask of its own, which is not supported; "
            "use another model"
        )
    _check_positions(text_config, num_tokens)


def _check_positions(text_config: Any, num_tokens: int) -> None:
    name, lower = text_config.model_type, "lower rollout.max_prompt_tokens or decoding.max_new_tokens"
    longest = getattr(text_config, "max_position_embeddings", None) or -1
    if 0 < longest < num_tokens:
        raise UserError(
            f"llm.model: {name} has {longest} positions, prompt and answer may have {num_tokens}; {lower}"
        )
    rope = getattr(text_config, "rope_parameters", None) or {}
    # By kind of layer, or one for all.
    for settings in rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]:
        short = settings.get("original_max_position_embeddings") or longest
        if settings.get("rope_type") == "longrope" and 0 < short < num_tokens:
            raise UserError(
                f"llm.model: {name} turns its positions otherwise for all rows when one has more than "
                f"{short} tokens, and prompt and answer may have {num_tokens}; {lower}"
            )


def prepare(model: Any, num_tokens: int) -> None:
    """Have ``model`` attend without copies of keys and values where it can, and check it.

    Raises:
        UserError: as :func:`self_check` does.
    """
    is_grouped = group_heads(model)
    try:
        self_check(model, num_tokens)
    except UserError:
        if not is_grouped:
            raise
        repeat_heads(model)
        self_check(model, num_tokens)


def self_check(model: Any, num_tokens: int) -> None:
    """Compare wide steps in the slot cache with a full recompute, once for each loaded model.

    Two prompts of different length are read into two rows; three candidates of each go through one pass, the
    second is kept, and another step follows. Every hidden state, and the logits made of it, must be those
    that the model gives for the whole text without a cache. Where the model has a window shorter than the
    ``num_tokens`` that rows may have, the longer prompt is longer than the window.

    Raises:
        UserError: they differ, or the model fails on the mask or the cache; names the model.
    """
    text_config = model.config.get_text_config()
    length = max([CHECK_LENGTHS[0], *(size + CHECK_LENGTHS[0] for size in _windows(text_config, num_tokens))])
    state = (length, model.dtype, text_config._attn_implementation)
    if _checked.get(model) == state:
        return
    name = text_config.model_type
    try:
        difference = _largest_difference(model, (length, CHECK_LENGTHS[1]))
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        at_fault, remedy = _at_fault(model, name)
        raise UserError(
            f"{at_fault} cannot be driven with a cache and a mask of our own ({reason}); {remedy}"
        ) from error
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE_16_BIT)
    if getattr(model, "is_loaded_in_8bit", False):
        tolerance = TOLERANCE_8_BIT_WEIGHTS
    if not difference <= tolerance:
        at_fault, remedy = _at_fault(model, name)
        raise UserError(
            f"{at_fault} computes other states with a cache and a mask of our own than without "
            f"(relative difference {difference:.2g}, allowed {tolerance:.2g}); {remedy}"
        )
    _checked[model] = state


def _at_fault(model: Any, name: str) -> tuple[str, str]:
    """What is most likely why ``model``, of the family ``name``, fails the self-check, and the remedy.

    Where the weights are in fewer bits it is those: the model without them has not been looked at.
    """
    for bits in ("8bit", "4bit"):
        if getattr(model, f"is_loaded_in_{bits}", False):
            others = "none" if bits == "4bit" else "4bit or none"
            return f"llm.quantization={bits}: {name} in {bits[0]} bits", f"use llm.quantization={others}"
    return f"llm.model: {name}", "use another model"


def _windows(text_config: Any, num_tokens: int) -> list[int]:
    """Every setting that sounds like a window shorter than ``num_tokens``, whatever the family calls it."""
    return [
        value
        for name, value in text_config.to_dict().items()
        if "window" in name and type(value) is int and 0 < value < num_tokens and "layers" not in name
    ]


@torch.inference_mode()
def _largest_difference(model: Any, prompt_lengths: tuple[int, int]) -> float:
    """Largest relative difference of a state or its logits between the slot cache and a full recompute.

    NaN if any of them is.
    """
    text_config = model.config.get_text_config()
    draws = torch.Generator().manual_seed(0)
    longest = max(prompt_lengths)
    texts = torch.randint(0, text_config.vocab_size, (2, longest + 2 * CHECK_WIDTH), generator=draws)
    forward = Forward(model, SlotCache(model, 2, longest + 2 * CHECK_WIDTH))
    rows = slice(0, 2)
    positions_BQ = torch.arange(longest).expand(2, -1)
    forward(rows, Tokens(texts[:, :longest], positions_BQ, positions_BQ, positions_BQ), longest)

    lengths_B = torch.tensor(prompt_lengths)
    kept: list[list[int]] = [texts[row, :length].tolist() for row, length in enumerate(prompt_lengths)]
    differences: list[float] = []
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
                differences += [
                    _difference(state_D, plain.hidden_states[-1][0, -1]),
                    _difference(logit_head(state_D[None])[0], plain.logits[0, -1]),
                ]
        # The second candidate is kept: it moves to the front of its row's free slots.
        index_B = torch.arange(len(kept), device=model.device)
        lengths = lengths_B.to(model.device)
        forward.cache.keep(index_B, lengths + 1, lengths)
        for row in range(len(kept)):
            kept[row].append(int(ids_BQ[row, 1]))
        lengths_B = lengths_B + 1
    # Python's max would pass over a NaN.
    return float(torch.tensor(differences, dtype=torch.float64).max())


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the expected length; NaN where either is not a number."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))
