"""The procedure of section 3.2 as its authors run it, for comparison: one row, one forward pass a candidate.

It shares the model, the candidate sets and the agent with the engine, keeps a cache, never reads a candidate
twice and takes the same decisions with the same draws: what differs is the way of decoding alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from mara.actors.config import DecodingConfig
from mara.actors.decoding.candidates import truncate
from mara.actors.decoding.generation import Generation, Request, Row
from mara.actors.decoding.logits import LogitHead
from mara.actors.decoding.policies import Policy


@dataclass(slots=True)
class Answer:
    """What the procedure said, and what it cost."""

    response_ids: list[int] = field(default_factory=list)
    num_passes: int = 0
    """Forward passes over candidates; that of the prompt is not counted."""


@torch.inference_mode()
def answer(
    model: Any,
    logit_head: LogitHead,
    eos_ids: Collection[int],
    config: DecodingConfig,
    policy: Policy,
    request: Request,
    every_candidate: bool,
) -> Answer:
    """Answer one prompt. ``config.fallback`` must be ``last``.

    Args:
        every_candidate: run all candidates of a position before deciding, as the authors' code does in
            training; else stop at the first that is accepted, as the paper words it.
    """
    found = Answer()
    draws = Row(Generation(request, 0.0), config.max_new_tokens, policy)
    cache = DynamicCache()

    def run(ids: list[int]) -> torch.Tensor:
        ids_BQ = torch.tensor([ids], device=model.device)
        states_BQD = model.base_model(
            input_ids=ids_BQ, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return states_BQD[:, -1]  # type: ignore[no-any-return]

    state_BD = run(request.prompt_ids)
    while len(found.response_ids) < config.max_new_tokens:
        candidates = truncate(logit_head(state_BD), config.truncation)
        ids = candidates.ids_BK[0, : int(candidates.num_B[0])].tolist()
        tried: list[tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = []
        taken: int | None = None
        for rank, token in enumerate(ids):
            state_BD = run([token])
            found.num_passes += 1
            tried.append((state_BD, _pop_last(cache)))
            if taken is None and (len(ids) == 1 or _accepts(policy, state_BD, draws, rank == len(ids) - 1)):
                taken = rank
                if not every_candidate:
                    break
        assert taken is not None, "the last candidate is accepted"
        state_BD, last = tried[taken]
        for layer, (keys, values) in enumerate(last):
            cache.update(keys, values, layer)
        found.response_ids.append(ids[taken])
        if ids[taken] in eos_ids:
            break
    return found


def _accepts(policy: Policy, state_BD: torch.Tensor, draws: Row, forced: bool) -> bool:
    uniforms_B = torch.tensor(draws.draws(1))
    draws.use_draws(1)
    return bool(policy.decide(state_BD, uniforms_B).accept_B[0]) or forced


def _pop_last(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Take the last token out of the cache; its keys and values, layer by layer."""
    last = [(layer.keys[..., -1:, :], layer.values[..., -1:, :]) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
    return last
