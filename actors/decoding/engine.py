"""The decoding engine: many prompts at once, no row ever waits for another.

Legend: B active rows, Q candidates examined in one pass, D hidden size, K candidates, V vocabulary, N
decisions.

The forward pass that reads a candidate's hidden state also gives the logits of the position after it. So an
accepted token costs one pass, and a rejected candidate one more or none, by how many are examined together:

    propose ──► forward pass ──► decide ──► accepted: keep, propose the candidates of the next position
                    ▲                  └──► all rejected: go on to the next candidates of the same position
                    └───────────────────────────┘

*Lazy* examines one candidate of every row in a pass: the fewest operations, best where arithmetic is dear.
*Wide* examines several; each sees the text and itself. Where all of them are rejected the row widens. Both
take the same decisions, with the same draws. A row whose candidates are compared by value examines all of
these in one pass, and takes one.

Rows are independent: each has its own position, its own random stream and its own end. Active rows fill
the front of the cache; a row that ends is replaced by the last one, and new prompts enter at the back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mara.actors.config import DecodingConfig
from mara.actors.decoding.acceptance import decide, may_ask
from mara.actors.decoding.candidates import truncate
from mara.actors.decoding.forward import Forward, Tokens
from mara.actors.decoding.generation import Generation, Request, Row
from mara.actors.decoding.logits import make_logit_head
from mara.actors.decoding.policies import AnyPolicy, goes_by_value
from mara.actors.decoding.prefill import PASS_OVERHEAD_TOKENS, group_by_length
from mara.actors.decoding.slots import SlotCache
from mara.actors.decoding.support import check_supported, prepare
from mara.actors.decoding.tuning import WindowTuner
from mara.actors.packing import is_packed

COMPILER = "inductor"
"""Backend of torch.compile for passes with fixed shapes."""

REFILL_SHARE = 8
"""New prompts are read where one in so many rows is free: a pass that reads a few costs little more than one
that reads a single one."""

ROWS_STEP = 4
"""Where passes have fixed shapes and fewer rows are left than this fraction of them, a pass has only that."""


def repeats_shapes(model: Any) -> bool:
    """Whether passes should have few shapes, as CUDA graphs start the kernels of such a pass all at once: a
    GPU works them off faster than a host starts them one by one."""
    return bool(model.device.type == "cuda")


class Engine:
    """Decodes with accept and reject on a frozen Hugging Face decoder-only model.

    Args:
        model: the causal language model, in evaluation mode.
        eos_ids: tokens that end an answer.
        config: truncation, length limit, fallback and mode.
        policy: who decides where a request does not say: a :class:`Policy` or :class:`ValuePolicy`, which may
            be :class:`Gated`, or ``"greedy"`` or ``"sample"``, the plain LLM.
        num_rows: prompts decoded at the same time.
        max_prompt_tokens: the longest prompt that will be submitted.
        shared_prefix: tokens that most prompts begin with, such as a chat template's system message. They are
            read once; prompts that begin otherwise, or have nothing else, are answered as well.

    Memory: the cache holds ``num_rows * (max_prompt_tokens + config.max_new_tokens)`` tokens and,
    where several candidates share a pass, those; see :attr:`cache_nbytes`.

    Raises:
        UserError: the engine cannot drive the model's attention, does not know how it makes its logits,
            computes other states than the model by itself, or there is no memory for the cache.
        ValueError: ``config.compile`` with a model whose layers are packed.
    """

    def __init__(
        self,
        model: Any,
        eos_ids: Iterable[int],
        config: DecodingConfig,
        policy: AnyPolicy,
        num_rows: int,
        max_prompt_tokens: int,
        shared_prefix: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.config = config
        self.policy = policy
        self.num_rows = num_rows
        self.max_prompt_tokens = max_prompt_tokens
        self._eos_ids = frozenset(eos_ids)
        self._device = model.device
        self._num_compared = min(config.num_compared, config.truncation.top_k)
        if isinstance(policy, str):  # It asks nobody: one candidate is enough.
            self._window, self._most_asked, self._widest = 1, 1, 1
        elif goes_by_value(policy):
            self._window = self._most_asked = self._widest = self._num_compared
        else:
            self._window, self._most_asked = config.candidates_a_pass
            self._widest = max(self._most_asked, self._num_compared)  # Requests may go by value.
        tunes = config.tunes_window and not (isinstance(policy, str) or goes_by_value(policy))
        self._tuner = WindowTuner(config.truncation.top_k) if tunes else None
        if config.compile and is_packed(model):
            raise ValueError("packed layers cannot be compiled; load the LLM with pack=False")
        num_tokens = max_prompt_tokens + config.max_new_tokens
        check_supported(model, num_tokens)
        self._logit_head = make_logit_head(model)
        prepare(model, num_tokens)
        self._cache = SlotCache(model, num_rows, num_tokens + self._widest - 1)
        self._forward = Forward(model, self._cache, COMPILER if config.compile else None)
        self._fixed = config.compile or repeats_shapes(model)
        self._shared_prefix = tuple(shared_prefix)
        self._prefix_cache: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rows: list[Row] = []
        self._decoding_work = (0, 0)

    @property
    def num_passes(self) -> int:
        """Forward passes so far, those that read prompts included."""
        return self._forward.num_passes

    @property
    def num_positions(self) -> int:
        """Tokens run through the LLM so far: prompt tokens, candidates, padding."""
        return self._forward.num_positions

    @property
    def decoding_work(self) -> tuple[int, int]:
        """Passes so far, counted once for every row in them, and candidates run through the LLM, those that
        only fill a shape included. The reading of prompts is not in it."""
        return self._decoding_work

    @property
    def num_active(self) -> int:
        return len(self._rows)

    @property
    def num_free(self) -> int:
        return self.num_rows - len(self._rows)

    @property
    def wants_prompts(self) -> bool:
        """Whether so many rows are free that reading new prompts pays."""
        return self.num_free >= max(1, self.num_rows // REFILL_SHARE)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values; the only memory that grows with rows and lengths."""
        return self._cache.nbytes

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Answer all ``requests``, yielding each answer when it is finished, in no fixed order."""
        waiting = iter(requests)
        exhausted = False
        while True:
            if not exhausted and self.wants_prompts:
                batch = [request for _, request in zip(range(self.num_free), waiting, strict=False)]
                exhausted = len(batch) < self.num_free
                self.admit(batch)
            if not self._rows:
                return
            yield from self.step()

    @torch.inference_mode()
    def admit(self, requests: list[Request]) -> None:
        """Put prompts into free rows and propose the first candidates of each.

        Raises:
            ValueError: more requests than free rows, a prompt that is empty or too long, or a limit above the
                engine's own.
        """
        if not requests:
            return
        self._check_requests(requests)
        started_at_s = time.time()
        # Equal prompts run through the LLM once; the others get a copy of the row.
        firsts: dict[tuple[int, ...], int] = {}
        for request in requests:
            firsts.setdefault(tuple(request.prompt_ids), len(firsts))
        prompts, states_UD = self._read(list(firsts))
        order = {ids: place for place, ids in enumerate(prompts)}
        sources = [order[tuple(request.prompt_ids)] for request in requests]
        # Rows of the same prompt: the first to ask gets the row that was read, the others the rows behind.
        begin, copies = len(self._rows), len(prompts)
        placed: list[Request | None] = [None] * len(requests)
        for request, source in zip(requests, sources, strict=True):
            if placed[source] is None:
                placed[source] = request
            else:
                self._cache.move_row(begin + source, begin + copies, len(request.prompt_ids))
                placed[copies] = request
                copies += 1
        new_rows = [self._new_row(request, started_at_s) for request in placed if request is not None]
        self._rows.extend(new_rows)
        states_BD = states_UD[
            self._index([order[tuple(row.generation.request.prompt_ids)] for row in new_rows])
        ]
        self._propose(new_rows, states_BD)

    def _check_requests(self, requests: Sequence[Request]) -> None:
        if len(requests) > self.num_free:
            raise ValueError(f"{len(requests)} requests for {self.num_free} free rows")
        by_value = [request for request in requests if request.policy and goes_by_value(request.policy)]
        if by_value and self._widest < self._num_compared:
            raise ValueError("the engine was made for a plain policy: its passes have no room to compare in")
        lengths = [len(request.prompt_ids) for request in requests]
        if min(lengths) < 1 or max(lengths) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt lengths must be within 1 and {self.max_prompt_tokens}, got {sorted(lengths)}"
            )
        limits = [request.max_new_tokens for request in requests if request.max_new_tokens is not None]
        if limits and (min(limits) < 1 or max(limits) > self.config.max_new_tokens):
            raise ValueError(
                f"max_new_tokens must be within 1 and {self.config.max_new_tokens}, got {sorted(limits)}"
            )

    def _new_row(self, request: Request, started_at_s: float) -> Row:
        limit = request.max_new_tokens or self.config.max_new_tokens
        policy = self.policy if request.policy is None else request.policy
        return Row(Generation(request, started_at_s), limit, policy)

    def _read(self, prompts: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        """Read U different prompts into the first free rows: those prompts in the rows' order, and the hidden
        state at the end of each, [U, D]."""
        prefix = self._shared_prefix
        shared = [ids for ids in prompts if len(ids) > len(prefix) and ids[: len(prefix)] == prefix]
        others = [ids for ids in prompts if not (len(ids) > len(prefix) and ids[: len(prefix)] == prefix)]
        overhead = PASS_OVERHEAD_TOKENS.get(self._device.type, PASS_OVERHEAD_TOKENS["cpu"])
        order: list[tuple[int, ...]] = []
        states: list[torch.Tensor] = []
        for some, start in ((shared, len(prefix)), (others, 0)):
            for group in group_by_length([len(ids) - start for ids in some], overhead):
                batch = [some[index] for index in group]
                states.append(self._read_together(batch, len(self._rows) + len(order), start))
                order += batch
        return order, torch.cat(states)

    def _read_together(self, prompts: list[tuple[int, ...]], begin: int, start: int) -> torch.Tensor:
        """Read the prompts from token ``start`` on, in one pass, into the rows from ``begin`` on."""
        rows = slice(begin, begin + len(prompts))
        if start:
            if self._prefix_cache is None:
                self._read_together([self._shared_prefix], begin, 0)
                self._prefix_cache = self._cache.read_prefix(begin, start)
            self._cache.write_prefix(rows, self._prefix_cache)
        longest = max(map(len, prompts))
        ids_BQ = torch.zeros(len(prompts), longest - start, dtype=torch.long)
        for row, ids in enumerate(prompts):
            ids_BQ[row, : len(ids) - start] = torch.tensor(ids[start:])
        # Padding lies behind each prompt, in slots that the answer overwrites before it reads them.
        slots_BQ = torch.arange(start, longest).expand(len(prompts), -1)
        states_BQD = self._forward(rows, Tokens(ids_BQ, slots_BQ, slots_BQ, slots_BQ), longest)
        last_B = self._index([len(ids) - start - 1 for ids in prompts])
        return states_BQD[torch.arange(len(prompts), device=self._device), last_B]

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """One forward pass over the current candidates of every active row; returns finished answers."""
        rows = self._rows
        if not rows:
            return []
        started_s = time.perf_counter()
        compares = any(row.goes_by_value and row.undecided and row.num - row.rank > 1 for row in rows)
        if self._tuner is not None:
            # Beside rows that compare a pass is as wide as that anyhow.
            self._window = self._num_compared if compares else self._tuner.window(len(rows))
        for row in rows:
            row.num_examined = min(self._width(row), row.num - row.rank) if row.undecided else 1
        num_rows, num_Q = len(rows), max(row.num_examined for row in rows)
        states_BQD = self._examine(rows, num_Q)
        taken = decide(rows, states_BQD, self.config.fallback)
        kept = [(index, place) for index, place in enumerate(taken) if place is not None]
        self._keep(rows, kept)
        taken_BD = states_BQD[
            self._index([index for index, _ in kept]), self._index([place for _, place in kept])
        ]
        finished: list[int] = []
        going_on: list[tuple[Row, int]] = []
        ranks: list[int] = []
        for number, (index, place) in enumerate(kept):
            row = rows[index]
            row.rank += place
            if not (row.is_plain or row.is_closed or row.goes_by_value):
                ranks.append(row.rank)
            if self._take(row, taken_BD[number]):
                finished.append(index)
            else:
                going_on.append((row, number))
        if going_on:
            numbers = [number for _, number in going_on]
            states_BD = taken_BD if len(numbers) == len(kept) else taken_BD[self._index(numbers)]
            self._propose([row for row, _ in going_on], states_BD)
        if self._tuner is not None:
            self._tuner.taken(ranks)
        if self._tuner is not None and not compares:
            self._tuner.measured(num_rows, self._window, time.perf_counter() - started_s)
        return self._release(finished)

    def _width(self, row: Row) -> int:
        """Candidates that an undecided row examines, if it has so many."""
        if row.goes_by_value:
            return self._num_compared
        return self._window if self._tuner is not None else min(self._window << row.misses, self._most_asked)

    def _examine(self, rows: list[Row], num_Q: int) -> torch.Tensor:
        """Hidden states [B, Q, D] of Q candidates of each row, from its own rank on."""
        num_idle = 0
        if self._fixed:
            num_rows, num_Q = self._shape(len(rows), num_Q)
            num_idle = num_rows - len(rows)
        # Rows with fewer candidates left repeat their last one; with fixed shapes, free rows read a dummy.
        ids = [[row.ids[min(row.rank + q, row.num - 1)] for q in range(num_Q)] for row in rows]
        lengths = [row.length for row in rows]
        ids += [[0] * num_Q] * num_idle
        lengths += [0] * num_idle
        lengths_BQ = torch.tensor(lengths)[:, None].expand(-1, num_Q)
        tokens = Tokens(torch.tensor(ids), lengths_BQ, lengths_BQ + torch.arange(num_Q), lengths_BQ)
        span = max(lengths) + num_Q
        passes, candidates = self._decoding_work
        self._decoding_work = passes + len(rows), candidates + tokens.ids_BQ.numel()
        if self._fixed:
            return self._forward.fixed(tokens, span)
        return self._forward(slice(0, len(rows)), tokens, span)

    def _shape(self, num_rows: int, num_Q: int) -> tuple[int, int]:
        """The fixed shape, rows and candidates, that has room for these."""
        rows, width = self.num_rows, self._window
        # The compiler takes minutes for each shape: one is enough unless rows by value are among others.
        while not self.config.compile and rows // ROWS_STEP >= num_rows:
            rows //= ROWS_STEP
        if goes_by_value(self.policy) and not self.config.compile:
            width = 1 if num_Q == 1 else self._widest  # One where plain answers are all that is left.
        while width < num_Q:
            width *= 2
        return rows, min(width, self._widest)

    def _propose(self, rows: list[Row], states_BD: torch.Tensor) -> None:
        """Give every row the candidate set of its next position, from the state before it."""
        candidates = truncate(self._logit_head(states_BD), self.config.truncation)
        # One transfer for all rows (float64 holds ids and float32 exactly); from here on, plain Python.
        parts = (candidates.num_B[:, None], *candidates[:1], *candidates[2:])
        table = torch.cat([part.double() for part in parts], dim=1).tolist()
        num_K = candidates.ids_BK.shape[1]
        for number, (row, numbers) in enumerate(zip(rows, table, strict=True)):
            num = int(numbers[0])
            row.num, row.rank, row.retaken, row.misses = num, 0, False, 0
            row.ids = [int(number) for number in numbers[1 : 1 + num]]
            row.reference_logprobs = numbers[1 + num_K : 1 + num_K + num]
            row.full_logprobs = numbers[1 + 2 * num_K : 1 + 2 * num_K + num]
            if row.gate is not None:
                row.is_closed = not may_ask(row.gate, row.full_logprobs[0])
                row.state_before_D = states_BD[number]
            if row.policy == "sample":
                weights = np.exp(np.array(row.full_logprobs))
                row.rank = int(row.rng.choice(num, p=weights / weights.sum()))

    def _keep(self, rows: list[Row], kept: list[tuple[int, int]]) -> None:
        """Move the keys and values of taken candidates to the slot behind the row's text."""
        moved = [(index, rows[index].length, place) for index, place in kept if place > 0]
        if moved:
            lengths_B = self._index([length for _, length, _ in moved])
            places_B = self._index([place for _, _, place in moved])
            self._cache.keep(self._index([index for index, _, _ in moved]), lengths_B + places_B, lengths_B)

    def _take(self, row: Row, state_D: torch.Tensor) -> bool:
        """Append the row's candidate to its answer; returns whether the answer ends with it."""
        generation, token = row.generation, row.ids[row.rank]
        generation.response_ids.append(token)
        generation.token_states.append(state_D)
        generation.token_logprobs.append(row.full_logprobs[row.rank])
        row.length += 1
        if token in self._eos_ids:
            generation.finish_reason = "eos"
            return True
        return len(generation.response_ids) >= row.limit

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

    def _index(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)
