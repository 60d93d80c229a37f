"""The slot cache: keys and values of many rows, each at its own length.

Legend: B rows of one forward pass, Q new tokens of each row, R rows of the cache, H key-value heads,
S slots of each row, E head size.

A row's token at position p is kept in slot p. A forward pass writes its tokens into their slots; whether
they count is the caller's business: a rejected candidate is simply overwritten by the next one, because
the mask hides every slot past the row's length. Nothing is copied to drop it.

The rows of a pass are a contiguous range, so attention reads views of the cache, never copies.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache


class SlotCache(Cache):  # type: ignore[misc]
    """A preallocated cache for :func:`transformers` decoder models. Memory: rows × slots × bytes a token."""

    def __init__(
        self, model_config: Any, num_rows: int, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        text_config = model_config.get_text_config()
        heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
        size = (
            getattr(text_config, "head_dim", None)
            or text_config.hidden_size // text_config.num_attention_heads
        )
        shape = (text_config.num_hidden_layers, num_rows, heads, num_slots, size)
        self.keys_LRHSE = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LRHSE = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = slice(0, 0)
        self._row_index_BQ = torch.empty(0)
        self._positions_BQ = torch.empty(0)
        self._span = 0

    @property
    def num_rows(self) -> int:
        return self.keys_LRHSE.shape[1]

    @property
    def num_slots(self) -> int:
        return self.keys_LRHSE.shape[3]

    @property
    def nbytes(self) -> int:
        return 2 * self.keys_LRHSE.numel() * self.keys_LRHSE.element_size()

    def aim(self, rows: slice, positions_BQ: torch.Tensor, span: int) -> None:
        """Say where the next forward pass writes: ``rows``, at ``positions_BQ``; it reads ``span`` slots."""
        self._rows = rows
        self._positions_BQ = positions_BQ
        self._row_index_BQ = torch.arange(rows.start, rows.stop, device=positions_BQ.device)[
            :, None
        ].expand_as(positions_BQ)
        self._span = span

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` slots of row ``source`` to row ``target``."""
        self.keys_LRHSE[:, target, :, :length] = self.keys_LRHSE[:, source, :, :length]
        self.values_LRHSE[:, target, :, :length] = self.values_LRHSE[:, source, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H, Q, E] keys and values; return those of all ``span`` slots, [B, H, span, E]."""
        keys_RHSE, values_RHSE = self.keys_LRHSE[layer_idx], self.values_LRHSE[layer_idx]
        # Advanced indices around a slice put the indexed dimensions first: [B, Q, H, E].
        keys_RHSE[self._row_index_BQ, :, self._positions_BQ] = key_states.transpose(1, 2)
        values_RHSE[self._row_index_BQ, :, self._positions_BQ] = value_states.transpose(1, 2)
        return keys_RHSE[self._rows, :, : self._span], values_RHSE[self._rows, :, : self._span]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._span - self._positions_BQ.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._span, 0
