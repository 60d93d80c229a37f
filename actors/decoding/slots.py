"""The slot cache: keys and values of many rows, each at its own length.

Legend: L layers, B rows of one forward pass, Q new tokens of each row, R rows of the cache, H key-value
heads, S slots of each row, E head size, P slots of a prefix.

A row's token at position p is kept in slot p. A forward pass writes its tokens into slots of the caller's
choice; whether they count is the caller's business: a rejected candidate is simply overwritten by the next
one, because the mask hides every slot past the row's length. Nothing is copied to drop it.

The rows of a pass are a contiguous range, so attention reads views of the cache, never copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache

from mara.common.errors import UserError


class KeyShape(NamedTuple):
    """What one layer keeps of one token."""

    num_heads: int
    key_size: int
    value_size: int


@torch.inference_mode()
def probe_key_shape(model: Any) -> tuple[int, KeyShape, torch.dtype]:
    """Layers, what each keeps of a token, and in which number format: from the model itself, one token long.

    Raises:
        UserError: layers differ, or some keep nothing or something other than keys and values.
    """
    name = model.config.get_text_config().model_type
    cache = DynamicCache()
    ids_BQ = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.base_model(input_ids=ids_BQ, past_key_values=cache, use_cache=True)
    kept: list[tuple[Any, Any]] = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
    ]
    if len(kept) != model.config.get_text_config().num_hidden_layers or any(
        keys is None or values is None or keys.ndim != 4 or values.ndim != 4 for keys, values in kept
    ):
        raise UserError(
            f"llm.model: not every layer of {name} keeps keys and values of its own; use another model"
        )
    shapes = {KeyShape(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in kept}
    if len(shapes) != 1:
        raise UserError(
            f"llm.model: the layers of {name} keep keys of different shapes ({sorted(shapes)}); "
            "use another model"
        )
    return len(kept), shapes.pop(), kept[0][0].dtype


def _write_slots(
    kept_LRHSE: torch.Tensor,
    layer: int,
    rows_BQ: torch.Tensor,
    slots_BQ: torch.Tensor,
    states_BQHE: torch.Tensor,
) -> None:
    # Advanced indices around a slice put the indexed dimensions first: [B, Q, H, E].
    kept_LRHSE[layer][rows_BQ, :, slots_BQ] = states_BQHE


# The compiler would write into a copy of every layer's cache and copy all of them back at the end of the
# pass; an operator that it cannot look into writes where it is told to.
write_slots = torch.library.custom_op("mara::write_slots", _write_slots, mutates_args=("kept_LRHSE",))


@write_slots.register_fake
def _(*args: Any) -> None:
    return None


class SlotCache(Cache):  # type: ignore[misc]
    """A preallocated cache for the decoder ``model``. Memory: rows × slots × bytes a token.

    Raises:
        UserError: the layers keep what this cache cannot hold, or there is not enough memory.
    """

    def __init__(self, model: Any, num_rows: int, num_slots: int) -> None:
        super().__init__(layers=[])
        num_layers, shape, dtype = probe_key_shape(model)
        device = model.device
        self.nbytes_per_token = (
            num_layers * shape.num_heads * (shape.key_size + shape.value_size) * dtype.itemsize
        )
        try:
            self.keys_LRHSE, self.values_LRHSE = (
                torch.zeros(
                    num_layers, num_rows, shape.num_heads, num_slots, size, dtype=dtype, device=device
                )
                for size in (shape.key_size, shape.value_size)
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise UserError(
                f"rollout.rows: {num_rows} rows of {num_slots} tokens take "
                f"{num_rows * num_slots * self.nbytes_per_token / 2**30:.1f} GiB of keys and values, and "
                f"{device} has no room for them; lower rollout.rows, rollout.max_prompt_tokens or "
                "decoding.max_new_tokens"
            ) from error
        self._rows = slice(0, 0)
        self._row_index_BQ = torch.empty(0)
        self._slots_BQ = torch.empty(0)
        self._span = 0

    @property
    def device(self) -> torch.device:
        return self.keys_LRHSE.device

    @property
    def num_rows(self) -> int:
        return self.keys_LRHSE.shape[1]

    @property
    def num_slots(self) -> int:
        return self.keys_LRHSE.shape[3]

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.num_slots * self.nbytes_per_token

    def aim(self, rows: slice, slots_BQ: torch.Tensor, span: int) -> None:
        """Say where the next forward pass writes: ``rows``, into ``slots_BQ``; it reads ``span`` slots."""
        self._rows = rows
        self._slots_BQ = slots_BQ
        self._row_index_BQ = torch.arange(rows.start, rows.stop, device=slots_BQ.device)[:, None].expand_as(
            slots_BQ
        )
        self._span = span

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` slots of row ``source`` to row ``target``."""
        for kept in (self.keys_LRHSE, self.values_LRHSE):
            kept[:, target, :, :length] = kept[:, source, :, :length]

    def keep(self, rows_B: torch.Tensor, sources_B: torch.Tensor, targets_B: torch.Tensor) -> None:
        """In each of ``rows_B`` copy slot ``sources_B`` to slot ``targets_B``."""
        for kept in (self.keys_LRHSE, self.values_LRHSE):
            kept[:, rows_B, :, targets_B] = kept[:, rows_B, :, sources_B]

    def read_prefix(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the first ``length`` slots of ``row``: keys and values [L, H, P, E]."""
        return self.keys_LRHSE[:, row, :, :length].clone(), self.values_LRHSE[:, row, :, :length].clone()

    def write_prefix(self, rows: slice, prefix: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Put what :meth:`read_prefix` returned at the front of every row of ``rows``."""
        for kept, part_LHPE in zip((self.keys_LRHSE, self.values_LRHSE), prefix, strict=True):
            kept[:, rows, :, : part_LHPE.shape[2]] = part_LHPE[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, H, Q, E] keys and values; return those of all ``span`` slots, [B, H, span, E]."""
        write = write_slots if torch.compiler.is_compiling() else _write_slots
        for kept_LRHSE, states_BHQE in ((self.keys_LRHSE, key_states), (self.values_LRHSE, value_states)):
            write(kept_LRHSE, layer_idx, self._row_index_BQ, self._slots_BQ, states_BHQE.transpose(1, 2))
        return (
            self.keys_LRHSE[layer_idx][self._rows, :, : self._span],
            self.values_LRHSE[layer_idx][self._rows, :, : self._span],
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._span - self._slots_BQ.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._span, 0
