"""Attention without copies of keys and values, where several queries share a head of them.

Legend: B rows, H query heads, K key-value heads, G query heads that share one, Q tokens, S slots, E head
size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "mara_grouped_sdpa"
"""The name under which transformers knows :func:`grouped_attention`."""

SPECIAL = ("position_bias", "softcap", "s_aux", "cache")
"""What some families ask for beside; their tokens attend as transformers has it."""

MOST_TOKENS = 32
"""With more the mask, said once for each of the queries, costs more than copies of keys and values would."""


def group_heads(model: Any) -> bool:
    """Have ``model`` attend by :func:`grouped_attention` where it would by transformers' own "sdpa".

    Returns whether it does.
    """
    attention = model.config.get_text_config()._attn_implementation
    if attention == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(GROUPED)
    return bool(model.config.get_text_config()._attn_implementation == GROUPED)


def repeat_heads(model: Any) -> None:
    """Take :func:`group_heads` back."""
    model.set_attn_implementation("sdpa")


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention as transformers' "sdpa" has it, [B, Q, H, E] of queries [B, H, Q, E].

    Where keys [B, K, S, E] have fewer heads than queries, transformers repeats keys and values for each of
    the G that share them as soon as there is a mask. A pass that decodes reads every slot for a few tokens,
    so that those copies are most of what attention costs. Here the tokens of all G queries are put behind one
    another as if they were tokens of one head, with the mask [B, 1, Q, S] said G times. The sums are the
    same.
    """
    B, H, Q, E = query.shape
    K = key.shape[1]
    is_special = any(others.get(name) is not None for name in SPECIAL)
    if H == K or Q > MOST_TOKENS or attention_mask is None or attention_mask.shape[1] != 1 or is_special:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    G = H // K
    mask_B1QS = attention_mask.expand(B, 1, Q, -1)
    found = functional.scaled_dot_product_attention(
        query.reshape(B, K, G * Q, E),
        key,
        value,
        attn_mask=mask_B1QS.repeat(1, 1, G, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    return found.reshape(B, H, Q, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
