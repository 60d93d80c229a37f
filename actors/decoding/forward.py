"""One forward pass of the frozen LLM over rows of the slot cache.

Legend: B rows of the pass, Q tokens of each row, S slots that are read, D hidden size.

A token is described by three numbers: its ``position`` in the text, the ``slot`` that keeps it, and its
``base``, the number of slots from the front of the row that it sees. It also sees itself. So a prompt's token
at position p has slot p and base p, and the candidates of a row of n tokens all have position n and base n,
in slots n, n + 1, …: each sees the text before it and itself, and none sees another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mara.actors.decoding.slots import SlotCache
from mara.common.cuda_graph import CaptureError, GraphMemory, capture, graph_memory

logger = logging.getLogger(__name__)

SPAN_STEP = 256
"""With fixed shapes a pass reads a multiple of so many slots: each multiple is compiled or captured once."""


class Tokens(NamedTuple):
    """What one forward pass reads, int64 [B, Q] each; see the head of the module."""

    ids_BQ: torch.Tensor
    positions_BQ: torch.Tensor
    slots_BQ: torch.Tensor
    bases_BQ: torch.Tensor


class Windows(NamedTuple):
    """How far the LLM's layers look back."""

    full: bool
    """Some layers see everything."""
    sliding: int | None
    """The others see so many tokens, themselves included. None: there are no others."""


def attention_windows(text_config: Any) -> Windows:
    """Which windows the layers of a Hugging Face model attend to."""
    size = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None)
    if size is None or not getattr(text_config, "use_sliding_window", True):
        return Windows(full=True, sliding=None)
    if not kinds:
        return Windows(full=False, sliding=size)
    slides = [kind == "sliding_attention" for kind in kinds]
    return Windows(full=not all(slides), sliding=size if any(slides) else None)


class Forward:
    """Runs the LLM's body on chosen rows of the cache and counts what it ran.

    Args:
        model: a Hugging Face causal language model whose attention takes a 4-D mask.
        cache: its keys and values.
        backend: None runs the model as it is. Else passes that :meth:`fixed` is asked for go through
            ``torch.compile`` with this backend.
    """

    def __init__(self, model: Any, cache: SlotCache, backend: str | None = None) -> None:
        self.model = model
        self.cache = cache
        self.num_passes = 0
        """Forward passes so far, prompts included."""
        self.num_positions = 0
        """Tokens run through the LLM so far, padding included."""
        self._device = model.device
        text_config = model.config.get_text_config()
        self._windows = attention_windows(text_config)
        # Eager attention adds its mask; a boolean one would be wrong without a word.
        self._additive = text_config._attn_implementation == "eager"
        self._compiled = (
            None if backend is None else torch.compile(Forward._run, fullgraph=True, backend=backend)
        )
        self._fixed: dict[tuple[int, int, int], _FixedPass] = {}
        # What a pass returns is used up before the next one, so that graphs need one memory, not one each.
        self._graph_memory = graph_memory(self._device) if self._device.type == "cuda" else None

    def __call__(self, rows: slice, tokens: Tokens, span: int) -> torch.Tensor:
        """Hidden states [B, Q, D], after the final norm, of ``tokens`` in ``rows``; reads ``span`` slots."""
        self._count(tokens)
        on_device = Tokens(*(part.to(self._device) for part in tokens))
        self.cache.aim(rows, on_device.slots_BQ, span)
        return self._run(on_device, span)

    def fixed(self, tokens: Tokens, span: int) -> torch.Tensor:
        """The same for the first B rows of the cache, in shapes that repeat: on a GPU a CUDA graph for each.

        Where a pass cannot be captured, as the host waits for the GPU in it or memory is short, passes go
        without from then on, and that is logged. The result is overwritten by the next call.
        """
        self._count(tokens)
        span = min(-(-span // SPAN_STEP) * SPAN_STEP, self.cache.num_slots)
        key = (*tokens.ids_BQ.shape, span)
        is_new = key not in self._fixed
        if is_new:
            self._fixed[key] = _FixedPass(tokens, self._device)
        fixed = self._fixed[key]

        # Not kept by the pass: it would keep the cache alive in a circle.
        def run() -> torch.Tensor:
            self.cache.aim(slice(0, len(fixed.tokens.ids_BQ)), fixed.tokens.slots_BQ, span)
            return (Forward._run if self._compiled is None else self._compiled)(self, fixed.tokens, span)

        if is_new and self._graph_memory is not None:
            try:
                fixed.capture(run, self._graph_memory)
            except CaptureError as error:
                self._graph_memory = None
                logger.warning(
                    "the LLM runs kernel by kernel, more slowly: no CUDA graph can be made of a pass (%s)",
                    error,
                )
        return fixed.replay(run, tokens)

    def _count(self, tokens: Tokens) -> None:
        self.num_passes += 1
        self.num_positions += tokens.ids_BQ.numel()

    def _run(self, tokens: Tokens, span: int) -> torch.Tensor:
        return self.model.base_model(  # type: ignore[no-any-return]
            input_ids=tokens.ids_BQ,
            attention_mask=self._masks(tokens, span),
            position_ids=tokens.positions_BQ,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _masks(self, tokens: Tokens, span: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask [B, 1, Q, S] of all layers, or one for each kind of layer."""
        slots_S = torch.arange(span, device=tokens.slots_BQ.device)
        itself_BQS = slots_S == tokens.slots_BQ[..., None]
        seen_BQS = slots_S < tokens.bases_BQ[..., None]
        full, sliding = self._windows
        if sliding is None:
            return self._mask(seen_BQS | itself_BQS)
        near_BQS = seen_BQS & (slots_S > tokens.positions_BQ[..., None] - sliding)
        if not full:
            return self._mask(near_BQS | itself_BQS)
        return {
            "full_attention": self._mask(seen_BQS | itself_BQS),
            "sliding_attention": self._mask(near_BQS | itself_BQS),
        }

    def _mask(self, visible_BQS: torch.Tensor) -> torch.Tensor:
        if not self._additive:
            return visible_BQS[:, None]
        dtype = self.cache.keys_LRHSE.dtype
        mask_BQS = torch.zeros_like(visible_BQS, dtype=dtype)
        return mask_BQS.masked_fill(~visible_BQS, torch.finfo(dtype).min)[:, None]


class _FixedPass:
    """The inputs of a forward pass in buffers that stay, so that a CUDA graph can hold it, and that graph."""

    def __init__(self, tokens: Tokens, device: torch.device) -> None:
        # All inputs travel in one copy, from memory that the GPU can read by itself.
        self._host_4BQ = torch.stack(tokens)
        if device.type == "cuda":
            self._host_4BQ = self._host_4BQ.pin_memory()
        self._inputs_4BQ = self._host_4BQ.to(device, copy=True)
        self.tokens = Tokens(*self._inputs_4BQ)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, run: Callable[[], torch.Tensor], memory: GraphMemory) -> None:
        """Replay ``run``, which reads :attr:`tokens`, as a CUDA graph from now on.

        Raises:
            CaptureError: no graph can hold it.
        """
        self._graph, self._states_BQD = capture(run, self._inputs_4BQ.device, memory=memory)

    def replay(self, run: Callable[[], torch.Tensor], tokens: Tokens) -> torch.Tensor:
        """``run`` with other tokens."""
        # The last pass has been waited for, so its inputs have been read.
        torch.stack(tokens, out=self._host_4BQ)
        self._inputs_4BQ.copy_(self._host_4BQ, non_blocking=True)
        if self._graph is None:
            return run()
        self._graph.replay()
        return self._states_BQD
