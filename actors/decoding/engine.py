"""The decoding engine: many prompts at once, one forward pass a candidate, no row ever waits for another.

Legend: B active rows, D hidden size, K candidates, V vocabulary.

The forward pass that reads a candidate's hidden state also gives the logits of the position after it. So
an accepted token costs one pass and every rejected candidate one more. A row is always at one candidate:

    propose ──► forward pass ──► decide ──► accepted: keep, propose the first candidate of the next position
                    ▲                  └──► rejected: propose the next candidate of the same position
                    └──────────────────────────┘

Rows are independent: each has its own position, its own random stream and its own end. Active rows fill
the front of the cache; a row that ends is replaced by the last one, and new prompts enter at the back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mara.actors.config import DecodingConfig
from mara.actors.decoding.candidates import truncate
from mara.actors.decoding.logits import make_logit_head
from mara.actors.decoding.policies import Plain, Policy
from mara.actors.decoding.slots import SlotCache
from mara.common.agent import ACCEPT
from mara.common.episode import FinishReason
from mara.common.errors import UserError


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to answer."""

    prompt_ids: list[int]
    """At least one token."""
    seed: int = 0
    """Of this answer's own random stream: the answer depends on no other row."""
    tag: Any = None
    """Handed back with the answer."""


@dataclass(slots=True)
class Decision:
    """One accept-or-reject decision, as in :class:`mara.common.episode.Episode`."""

    state_D: torch.Tensor
    action: int
    rank: int
    num_candidates: int
    position: int
    forced: bool
    reference_logprob: float
    accept_logprob: float
    reject_logprob: float
    policy_version: int


@dataclass(slots=True)
class Generation:
    """An answer, and how it came about."""

    request: Request
    started_at_s: float
    response_ids: list[int] = field(default_factory=list)
    """With the end-of-sequence token if one was taken."""
    token_states: list[torch.Tensor] = field(default_factory=list)
    """[D] each: the hidden state at every token of the answer."""
    token_logprobs: list[float] = field(default_factory=list)
    """Log-probability of every token under the LLM itself (temperature 1, whole vocabulary)."""
    decisions: list[Decision] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    finished_at_s: float = 0.0


class _Row:
    """A slot's current answer: the candidate set at its position and the candidate under question."""

    __slots__ = (
        "full_logprobs",
        "generation",
        "ids",
        "length",
        "num",
        "rank",
        "rng",
        "reference_logprobs",
        "retaken",
    )

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.rng = np.random.default_rng(generation.request.seed)
        self.length = len(generation.request.prompt_ids)
        self.ids: list[int] = []
        self.reference_logprobs: list[float] = []
        self.full_logprobs: list[float] = []
        self.num = 0
        self.rank = 0
        self.retaken = False

    @property
    def undecided(self) -> bool:
        """Whether anybody is to be asked about the candidate."""
        return self.num > 1 and not self.retaken


class Engine:
    """Decodes with accept and reject on a frozen Hugging Face decoder-only model.

    Args:
        model: the causal language model, in evaluation mode.
        eos_ids: tokens that end an answer.
        config: truncation, length limit and fallback.
        policy: who decides; a :class:`Policy`, or ``"greedy"`` / ``"sample"`` for the plain LLM.
        num_rows: prompts decoded at the same time.
        max_prompt_tokens: the longest prompt that will be submitted.

    Memory: the cache holds ``num_rows * (max_prompt_tokens + config.max_new_tokens)`` tokens.

    Raises:
        UserError: the engine cannot drive the model's attention, or does not know how it makes its logits.
    """

    def __init__(
        self,
        model: Any,
        eos_ids: Iterable[int],
        config: DecodingConfig,
        policy: Policy | Plain,
        num_rows: int,
        max_prompt_tokens: int,
    ) -> None:
        self.model = model
        self.config = config
        self.policy = policy
        self.num_rows = num_rows
        self.max_prompt_tokens = max_prompt_tokens
        self._eos_ids = frozenset(eos_ids)
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        num_slots = max_prompt_tokens + config.max_new_tokens
        _check_supported(model.config.get_text_config(), num_slots)
        self._logit_head = make_logit_head(model)
        self._cache = SlotCache(model.config, num_rows, num_slots, self._dtype, self._device)
        self._rows: list[_Row] = []
        self.num_passes = 0
        """Forward passes so far, prefills included."""
        self.num_positions = 0
        """Tokens run through the LLM so far: prompt tokens and candidates."""

    @property
    def num_active(self) -> int:
        return len(self._rows)

    @property
    def num_free(self) -> int:
        return self.num_rows - len(self._rows)

    @property
    def cache_nbytes(self) -> int:
        return self._cache.nbytes

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Answer all ``requests``, yielding each answer when it is finished, in no fixed order."""
        waiting = iter(requests)
        exhausted = False
        while True:
            # A prefill of a few prompts costs little more than one of a single prompt.
            if not exhausted and self.num_free >= max(1, self.num_rows // 8):
                batch = [request for _, request in zip(range(self.num_free), waiting, strict=False)]
                exhausted = len(batch) < self.num_free
                self.admit(batch)
            if not self._rows:
                return
            yield from self.step()

    @torch.inference_mode()
    def admit(self, requests: list[Request]) -> None:
        """Put prompts into free rows and propose the first candidate of each.

        Raises:
            ValueError: more requests than free rows, or a prompt that is empty or too long.
        """
        if not requests:
            return
        if len(requests) > self.num_free:
            raise ValueError(f"{len(requests)} requests for {self.num_free} free rows")
        lengths = [len(request.prompt_ids) for request in requests]
        if min(lengths) < 1 or max(lengths) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt lengths must be within 1 and {self.max_prompt_tokens}, got {sorted(lengths)}"
            )
        started_at_s = time.time()
        # Equal prompts run through the LLM once; the others get a copy of the row.
        firsts: dict[tuple[int, ...], int] = {}
        sources = [firsts.setdefault(tuple(request.prompt_ids), len(firsts)) for request in requests]
        states_UD = self._prefill([list(ids) for ids in firsts])
        # From the back: a copy's source stands before it, and no source is overwritten before it was copied.
        begin = len(self._rows)
        for offset, source in reversed(list(enumerate(sources))):
            if offset != source:
                self._cache.move_row(begin + source, begin + offset, len(requests[offset].prompt_ids))
        new_rows = [_Row(Generation(request, started_at_s)) for request in requests]
        self._rows.extend(new_rows)
        self._propose(new_rows, states_UD[torch.tensor(sources)])

    def _prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Run U prompts into the first free rows; return the hidden state at the end of each, [U, D]."""
        lengths = [len(ids) for ids in prompts]
        begin, longest = len(self._rows), max(lengths)
        ids_BQ = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, ids in enumerate(prompts):
            ids_BQ[row, : lengths[row]] = torch.tensor(ids)
        # Padding lies behind each prompt, in slots that the answer overwrites before it reads them.
        positions_BQ = torch.arange(longest).expand(len(prompts), -1)
        states_BQD = self._forward(slice(begin, begin + len(prompts)), ids_BQ, positions_BQ, longest)
        return states_BQD[torch.arange(len(prompts)), torch.tensor(lengths) - 1]

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """One forward pass over the current candidate of every active row; returns finished answers."""
        rows = self._rows
        if not rows:
            return []
        ids_BQ = torch.tensor([[row.ids[row.rank]] for row in rows])
        positions_BQ = torch.tensor([[row.length] for row in rows])
        span = max(row.length for row in rows) + 1
        states_BD = self._forward(slice(0, len(rows)), ids_BQ, positions_BQ, span)[:, 0]
        taken = self._decide(rows, states_BD)
        finished: list[int] = []
        going_on: list[int] = []
        for index, row in enumerate(rows):
            if not taken[index]:
                self._next_candidate(row)
            elif self._take(row, states_BD[index]):
                finished.append(index)
            else:
                going_on.append(index)
        if going_on:
            self._propose([rows[index] for index in going_on], states_BD[torch.tensor(going_on)])
        return self._release(finished)

    def _forward(
        self, rows: slice, ids_BQ: torch.Tensor, positions_BQ: torch.Tensor, span: int
    ) -> torch.Tensor:
        """Hidden states [B, Q, D] of ``ids_BQ`` at ``positions_BQ``; each sees the slots up to its own."""
        positions_BQ = positions_BQ.to(self._device)
        self._cache.aim(rows, positions_BQ, span)
        visible_B1QS = torch.arange(span, device=self._device) <= positions_BQ[:, None, :, None]
        if self.model.config._attn_implementation == "eager":
            # Eager attention adds its mask; a boolean one would be wrong without a word.
            blocked = torch.finfo(self._dtype).min
            visible_B1QS = torch.zeros_like(visible_B1QS, dtype=self._dtype).masked_fill(
                ~visible_B1QS, blocked
            )
        self.num_passes += 1
        self.num_positions += ids_BQ.numel()
        return self.model.base_model(  # type: ignore[no-any-return]
            input_ids=ids_BQ.to(self._device),
            attention_mask=visible_B1QS,
            position_ids=positions_BQ,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state

    def _propose(self, rows: list[_Row], states_BD: torch.Tensor) -> None:
        """Give every row the candidate set of its next position, from the state before it."""
        candidates = truncate(self._logit_head(states_BD), self.config.truncation)
        # One transfer for all rows; from here on a row is plain Python.
        ids, nums = candidates.ids_BK.tolist(), candidates.num_B.tolist()
        reference, full = candidates.reference_logprobs_BK.tolist(), candidates.full_logprobs_BK.tolist()
        for index, row in enumerate(rows):
            num = nums[index]
            row.num, row.rank, row.retaken = num, 0, False
            row.ids = ids[index][:num]
            row.reference_logprobs = reference[index][:num]
            row.full_logprobs = full[index][:num]
            if self.policy == "sample":
                weights = np.exp(np.array(row.full_logprobs))
                row.rank = int(row.rng.choice(num, p=weights / weights.sum()))

    def _decide(self, rows: list[_Row], states_BD: torch.Tensor) -> list[bool]:
        """Whether each row's candidate is taken; records the decisions."""
        if isinstance(self.policy, str):
            return [True] * len(rows)
        taken = [True] * len(rows)
        for index, row in enumerate(rows):
            if row.retaken:
                self._record_fallback(row, states_BD[index])
        asked = [index for index, row in enumerate(rows) if row.undecided]
        if not asked:
            return taken
        uniforms_B = torch.tensor([rows[index].rng.random(dtype=np.float32) for index in asked])
        decisions = self.policy.decide(states_BD[torch.tensor(asked)], uniforms_B)
        accepts = decisions.accept_B.tolist()
        accept_logprobs, reject_logprobs = (
            decisions.accept_logprobs_B.tolist(),
            decisions.reject_logprobs_B.tolist(),
        )
        for place, index in enumerate(asked):
            row = rows[index]
            forced = self.config.fallback == "last" and row.rank == row.num - 1
            taken[index] = forced or accepts[place]
            row.generation.decisions.append(
                Decision(
                    state_D=states_BD[index],
                    action=int(taken[index]),
                    rank=row.rank,
                    num_candidates=row.num,
                    position=len(row.generation.response_ids),
                    forced=forced,
                    reference_logprob=row.reference_logprobs[row.rank],
                    accept_logprob=0.0 if forced else accept_logprobs[place],
                    reject_logprob=-np.inf if forced else reject_logprobs[place],
                    policy_version=decisions.policy_version,
                )
            )
        return taken

    def _record_fallback(self, row: _Row, state_D: torch.Tensor) -> None:
        """The first candidate is taken because all were rejected: a decision that nobody was asked about."""
        decisions = row.generation.decisions
        decisions.append(
            Decision(
                state_D=state_D,
                action=ACCEPT,
                rank=0,
                num_candidates=row.num,
                position=len(row.generation.response_ids),
                forced=True,
                reference_logprob=row.reference_logprobs[0],
                accept_logprob=0.0,
                reject_logprob=-np.inf,
                # The rejection that left nothing else decided this.
                policy_version=decisions[-1].policy_version,
            )
        )

    def _next_candidate(self, row: _Row) -> None:
        """After a rejection: the next candidate, or the first once more when all were rejected."""
        row.rank += 1
        if row.rank == row.num:
            row.rank = 0
            row.retaken = True

    def _take(self, row: _Row, state_D: torch.Tensor) -> bool:
        """Append the row's candidate to its answer; returns whether the answer ends with it."""
        generation, token = row.generation, row.ids[row.rank]
        generation.response_ids.append(token)
        generation.token_states.append(state_D)
        generation.token_logprobs.append(row.full_logprobs[row.rank])
        row.length += 1
        if token in self._eos_ids:
            generation.finish_reason = "eos"
            return True
        return len(generation.response_ids) >= self.config.max_new_tokens

    def _release(self, finished: list[int]) -> list[Generation]:
        """Take finished rows out, the last active row moving into each gap."""
        now_s = time.time()
        generations = []
        for index in reversed(finished):
            row = self._rows[index]
            row.generation.finished_at_s = now_s
            generations.append(row.generation)
            last = len(self._rows) - 1
            if index != last:
                self._cache.move_row(last, index, self._rows[last].length)
                self._rows[index] = self._rows[last]
            self._rows.pop()
        return generations


def _check_supported(text_config: Any, num_slots: int) -> None:
    """Refuse by name what would be silently wrong."""
    name = text_config.model_type
    if text_config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"llm.model: {name} runs with {text_config._attn_implementation!r} attention, which takes no "
            "4-D mask; load it with sdpa or eager attention"
        )
    window = getattr(text_config, "sliding_window", None)
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"llm.model: {name} has layers of the kind {sorted(kinds)}; only attention is supported"
        )
    uses_window = getattr(text_config, "use_sliding_window", True) and (
        not kinds or "sliding_attention" in kinds
    )
    if window is not None and uses_window and num_slots > window:
        raise UserError(
            f"llm.model: {name} attends to {window} tokens only, prompt and answer may have {num_slots}; "
            "lower rollout.max_prompt_tokens or decoding.max_new_tokens"
        )
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and num_slots > longest:
        raise UserError(
            f"llm.model: {name} has {longest} positions, prompt and answer may have {num_slots}; "
            "lower rollout.max_prompt_tokens or decoding.max_new_tokens"
        )
