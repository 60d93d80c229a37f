"""Hidden states of answers, read or sampled, with each prompt passed through the LLM once.

Legend: P prompts, B answers, L padded length, N answer tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mara.actors.decoding.candidates import log_totals
from mara.actors.llm import LLM

Ids = Sequence[int]


class Answer(NamedTuple):
    """Tokens of an answer and what the LLM's last layer says at each."""

    ids: tuple[int, ...]
    """Token ids; an end-of-sequence token, if there is one, is the last."""
    states_ND: torch.Tensor
    """Last hidden states after the final norm, in the LLM's dtype, on the CPU."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """How one kind of answer is drawn from the LLM's next-token distribution.

    The candidates are the ``top_k`` most probable tokens, cut at the smallest set that reaches ``top_p``.
    With probability ``slip`` a position takes a candidate other than the first, each equally likely (or
    always the last one, if ``slip_to_last``); otherwise it draws at ``temperature``, and 0 takes the first.
    """

    top_k: int = 40
    top_p: float = 0.95
    temperature: float = 1.0
    slip: float = 0.0
    slip_to_last: bool = False

    def draw(self, values_K: torch.Tensor, probs_K: torch.Tensor, generator: torch.Generator) -> int:
        """Place of the drawn token among the most probable ones.

        ``values_K`` are their logits and ``probs_K`` their probabilities, float32 [>= top_k], descending.
        """
        values_K, probs_K = values_K[: self.top_k], probs_K[: self.top_k]
        size = int((torch.cumsum(probs_K, 0) - probs_K < self.top_p).sum())
        if size > 1 and self.slip and float(torch.rand((), generator=generator)) < self.slip:
            return size - 1 if self.slip_to_last else int(torch.randint(1, size, (), generator=generator))
        if self.temperature == 0 or size == 1:
            return 0
        weights = torch.softmax(values_K[:size] / self.temperature, 0)
        return int(torch.multinomial(weights, 1, generator=generator))


def read_answers(
    llm: LLM,
    groups: Sequence[tuple[Ids, Sequence[Ids]]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    max_batch_tokens: int = 4096,
) -> list[list[Answer]]:
    """Hidden states of given answers, for each (prompt ids, answers' ids) group.

    Answers must have at least one token; a group may have none. ``progress`` gets (groups done, groups in
    all).
    """
    answers: list[list[Answer]] = [[] for _ in groups]
    done = 0
    for batch in _batches(groups, max_batch_tokens):
        rows = [(p, a) for p, g in enumerate(batch) for a in range(len(groups[g][1]))]
        if not rows:
            progress(done := done + len(batch), len(groups))
            continue
        prefix = _Prefix(llm, [groups[g][0] for g in batch])
        rows.sort(key=lambda row: len(groups[batch[row[0]]][1][row[1]]))
        states: dict[tuple[int, int], torch.Tensor] = {}
        step = max(1, max_batch_tokens // max(len(groups[batch[p]][1][a]) for p, a in rows))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            ids = [groups[batch[p]][1][a] for p, a in part]
            states.update(zip(part, prefix.extend([p for p, _ in part], ids), strict=True))
        for p, g in enumerate(batch):
            answers[g] = [Answer(tuple(ids), states[p, a]) for a, ids in enumerate(groups[g][1])]
        progress(done := done + len(batch), len(groups))
    return answers


@torch.inference_mode()
def sample_answers(
    llm: LLM,
    prompts: Sequence[Ids],
    samplers: Sequence[Sampler],
    max_new_tokens: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rows: int = 64,
) -> list[list[Answer]]:
    """Answers of the LLM to each prompt, one for each sampler, with their hidden states.

    About ``rows`` answers are decoded at a time. An answer ends with an end-of-sequence token or after
    ``max_new_tokens``.
    """
    answers: list[list[Answer]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    step = max(1, rows // len(samplers))
    for start in range(0, len(order), step):
        batch = order[start : start + step]
        prefix = _Prefix(llm, [prompts[p] for p in batch])
        owners = [p for p in range(len(batch)) for _ in samplers]
        drawn = _decode(llm, prefix, owners, list(samplers) * len(batch), max_new_tokens, generator)
        for place, p in enumerate(batch):
            answers[p] = drawn[place * len(samplers) : (place + 1) * len(samplers)]
        progress(min(start + step, len(order)), len(order))
    return answers


def _decode(
    llm: LLM,
    prefix: _Prefix,
    owners: list[int],
    samplers: list[Sampler],
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[Answer]:
    ids: list[list[int]] = [[] for _ in owners]
    states: list[list[torch.Tensor]] = [[] for _ in owners]
    running = list(range(len(owners)))
    branch = prefix.branch(owners)
    last_BD = prefix.last_states_PD[owners]
    most = max(sampler.top_k for sampler in samplers)
    logit_head = llm.logit_head
    while running:
        logits_BV = logit_head(last_BD)
        top = torch.topk(logits_BV, min(most, logits_BV.shape[-1]))
        values_BK = top.values.float().cpu()
        totals_B = log_totals(logits_BV).cpu()
        probs_BK = torch.exp(values_BK - totals_B[:, None])
        places = [samplers[row].draw(values_BK[i], probs_BK[i], generator) for i, row in enumerate(running)]
        tokens = top.indices.cpu()[torch.arange(len(running)), places].tolist()
        last_BD = branch.step(torch.tensor(tokens)[:, None])[:, -1]
        keep = []
        for i, row in enumerate(running):
            ids[row].append(tokens[i])
            states[row].append(last_BD[i].cpu())
            if tokens[i] not in llm.eos_ids and len(ids[row]) < max_new_tokens:
                keep.append(i)
        if len(keep) < len(running):
            running = [running[i] for i in keep]
            last_BD = last_BD[keep]
            branch.select(keep)
    return [Answer(tuple(i), torch.stack(s)) for i, s in zip(ids, states, strict=True)]


class _Branch:
    """Rows that continue prompts: their cache and attention mask."""

    def __init__(self, llm: LLM, cache: Any, mask_BL: torch.Tensor) -> None:
        self._llm, self._cache, self._mask_BL = llm, cache, mask_BL

    def step(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Append tokens [B, L] (right-padded where ``mask_BL`` is 0); return their states [B, L, D]."""
        device = self._llm.device
        new_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
        positions_BL = self._mask_BL.sum(1, keepdim=True) + torch.cumsum(new_BL.to(device), 1) - 1
        self._mask_BL = torch.cat((self._mask_BL, new_BL.to(device)), 1)
        output = self._llm.model.base_model(
            input_ids=ids_BL.to(device),
            attention_mask=self._mask_BL,
            position_ids=positions_BL.clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
        )
        states_BLD: torch.Tensor = output.last_hidden_state
        return states_BLD

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        index_B = torch.tensor(list(rows), dtype=torch.long, device=self._llm.device)
        self._cache.batch_select_indices(index_B)
        self._mask_BL = self._mask_BL[index_B]


class _Prefix:
    """Prompts passed through the LLM once, left-padded, to be continued in many ways."""

    @torch.inference_mode()
    def __init__(self, llm: LLM, prompts: Sequence[Ids]) -> None:
        longest = max(len(ids) for ids in prompts)
        ids_PL = torch.zeros(len(prompts), longest, dtype=torch.long)
        self._mask_PL = torch.zeros(len(prompts), longest, dtype=torch.long, device=llm.device)
        for p, ids in enumerate(prompts):
            ids_PL[p, longest - len(ids) :] = torch.tensor(list(ids))
            self._mask_PL[p, longest - len(ids) :] = 1
        output = llm.model.base_model(
            input_ids=ids_PL.to(llm.device),
            attention_mask=self._mask_PL,
            position_ids=(torch.cumsum(self._mask_PL, 1) - 1).clamp(min=0),
            use_cache=True,
        )
        self._llm = llm
        self._cache = output.past_key_values
        self.last_states_PD: torch.Tensor = output.last_hidden_state[:, -1]

    def branch(self, owners: Sequence[int]) -> _Branch:
        """Rows that continue the prompts ``owners`` (indices, repeats allowed)."""
        branch = _Branch(self._llm, copy.deepcopy(self._cache), self._mask_PL)
        branch.select(owners)
        return branch

    @torch.inference_mode()
    def extend(self, owners: Sequence[int], answers: Sequence[Ids]) -> list[torch.Tensor]:
        """States [N, D] of each answer to the prompt of its owner, on the CPU."""
        longest = max(len(ids) for ids in answers)
        ids_BL = torch.zeros(len(answers), longest, dtype=torch.long)
        mask_BL = torch.zeros(len(answers), longest, dtype=torch.long)
        for row, ids in enumerate(answers):
            ids_BL[row, : len(ids)] = torch.tensor(list(ids))
            mask_BL[row, : len(ids)] = 1
        states_BLD = self.branch(owners).step(ids_BL, mask_BL).cpu()
        return [states_BLD[row, : len(ids)].clone() for row, ids in enumerate(answers)]


def _batches(groups: Sequence[tuple[Ids, Sequence[Ids]]], max_tokens: int) -> list[list[int]]:
    """Indices of groups with prompts of similar length, each batch of about ``max_tokens`` tokens."""
    batches: list[list[int]] = []
    tokens = 0
    for g in sorted(range(len(groups)), key=lambda g: len(groups[g][0])):
        cost = len(groups[g][0]) + sum(len(ids) for ids in groups[g][1])
        if not batches or tokens + cost > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(g)
        tokens += cost
    return batches
