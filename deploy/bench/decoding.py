"""``mara bench decode`` and ``mara bench rollout``: the decoding engine against its peers.

Legend: D hidden size. All prompts are token ids, so that a model without a tokenizer can be measured as well.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mara.actors.config import DecodingConfig
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Request
from mara.actors.decoding.logits import make_logit_head
from mara.actors.decoding.policies import AgentPolicy, AnyPolicy, steered_by
from mara.actors.decoding.prefill import common_prefix
from mara.actors.packing import is_packed
from mara.common.agent import Agent
from mara.common.critic import TwinCritic
from mara.deploy.bench.figures import Figure, in_turn, machine
from mara.deploy.bench.paper_procedure import answer

WARM_UP_TOKENS = 4

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured."""

    model: Any
    """A Hugging Face causal language model, in evaluation mode, as rollout actors load it."""
    plain_model: Any
    """The same as transformers loads it, for ``generate``."""
    name: str
    eos_ids: tuple[int, ...]
    agent: Agent
    """On the model's device."""
    agent_name: str
    prompts: list[list[int]]
    """At least as many as the largest batch."""
    critic: TwinCritic | None = None
    """The agent's, on the same device; needed where decoding goes by value."""


@dataclass(slots=True)
class _Work:
    """Tokens made, and what they cost beside the reading of prompts."""

    tokens: int = 0
    passes: int = 0
    """Forward passes, each counted once for every row in it."""
    positions: int = 0
    """Tokens run through the LLM."""

    def per_token(self) -> dict[str, float]:
        return {
            "passes_per_token": round(self.passes / self.tokens, 3),
            "positions_per_token": round(self.positions / self.tokens, 3),
        }


def bench_decode(
    subject: Subject,
    decoding: DecodingConfig,
    batches: Sequence[int],
    num_rounds: int,
    progress: Progress = lambda line: None,
) -> list[Figure]:
    """Aligned greedy decoding against plain greedy ``generate`` of the same model, for each batch size.

    Both answer the same prompts, as many as fill two batches (at batch 1: eight); tokens count up to the end
    of sequence. ``generate`` gets prompts of like length together; on a GPU it uses its static cache.
    """
    return [_decode_figure(subject, decoding, batch, num_rounds, progress) for batch in batches]


def _decode_figure(
    subject: Subject, decoding: DecodingConfig, batch: int, num_rounds: int, progress: Progress
) -> Figure:
    prompts = sorted(subject.prompts[: max(8, 2 * batch)], key=len)
    policy = steered_by(subject.agent, decoding, subject.critic)
    engine = _make_engine(subject, decoding, policy, batch, prompts)
    plain = _Generate(subject, batch, decoding.max_new_tokens)
    aligned, generated = _Work(), _Work()
    # With the longest prompts: what grows with length has grown then.
    list(engine.generate(map(Request, prompts[-batch:])))
    began = _now(subject.model)
    plain.answer(prompts[-batch:], _Work())
    # Both sides take about as long; the first answers of ours find the best mode, too.
    whole_s = 2 * (_now(subject.model) - began) * math.ceil(len(prompts) / batch) * num_rounds
    progress(
        f"batch {batch}: {len(prompts)} prompts by either side, {num_rounds} times; this takes about "
        f"{whole_s / 60:.1f} minutes"
    )

    def ours(number: int) -> float:
        # Longest first, as the evaluation does.
        speed = _decode(engine, list(map(Request, reversed(prompts))), aligned)
        progress(f"batch {batch}, round {number + 1}: aligned {speed:.1f} tokens/s")
        return speed

    def peer(number: int) -> float:
        work = _Work()
        started = _now(subject.model)
        for begin in range(0, len(prompts), batch):
            plain.answer(prompts[begin : begin + batch], work)
        speed = work.tokens / (_now(subject.model) - started)
        generated.tokens += work.tokens
        generated.passes += work.passes
        generated.positions += work.positions
        progress(f"batch {batch}, round {number + 1}: generate {speed:.1f} tokens/s")
        return speed

    rounds = in_turn(ours, peer, num_rounds)
    return Figure(
        figure=f"aligned_vs_generate_batch_{batch}",
        value=statistics.median(rounds.ours),
        unit="tokens/s",
        peer="transformers generate(do_sample=False)",
        ratio=rounds.ratio,
        conditions={
            "peer_value": round(statistics.median(rounds.peers), 2),
            "batch": batch,
            "prompts": len(prompts),
            "rounds": num_rounds,
            "ours": aligned.per_token(),
            "theirs": generated.per_token(),
            **_described(subject, engine, subject.plain_model),
        },
    )


def bench_rollout(
    subject: Subject,
    decoding: DecodingConfig,
    rows: int,
    num_rounds: int,
    peer_prompts: int,
    progress: Progress = lambda line: None,
) -> list[Figure]:
    """Rollouts (decisions are sampled, states recorded) against the paper's procedure, prompt after prompt.

    The peer answers ``peer_prompts`` of the same prompts in each round, others in each: it is too slow for
    all. Two figures: against every candidate in a pass of its own, which is what the authors' code does in
    training, and against stopping at the first accepted one.
    """
    prompts = subject.prompts[: max(rows, peer_prompts)]
    policy = AgentPolicy(subject.agent, threshold=None)
    engine = _make_engine(subject, decoding, policy, rows, prompts)
    logit_head = make_logit_head(subject.model)
    requests = [Request(ids, seed=number) for number, ids in enumerate(prompts)]
    list(
        engine.generate(
            [Request(max(prompts, key=len), max_new_tokens=min(WARM_UP_TOKENS, decoding.max_new_tokens))]
        )
    )
    work = _Work()

    def ours(number: int) -> float:
        speed = _decode(engine, requests, work)
        progress(f"round {number + 1}: {speed:.1f} tokens/s")
        return speed

    figures = []
    for name, every_candidate in (
        ("rollout_vs_paper_procedure", True),
        ("rollout_vs_stopping_procedure", False),
    ):
        cost = _Work()

        def peer(number: int, every_candidate: bool = every_candidate, cost: _Work = cost) -> float:
            chosen = [requests[(number * peer_prompts + i) % len(requests)] for i in range(peer_prompts)]
            tokens, started = 0, _now(subject.model)
            for request in chosen:
                found = answer(
                    subject.model, logit_head, subject.eos_ids, decoding, policy, request, every_candidate
                )
                tokens += len(found.response_ids)
                cost.passes += found.num_passes
            speed = tokens / (_now(subject.model) - started)
            cost.tokens += tokens
            cost.positions = cost.passes
            progress(f"round {number + 1}: peer {speed:.2f} tokens/s")
            return speed

        rounds = in_turn(ours, peer, num_rounds)
        figures.append(
            Figure(
                figure=name,
                value=statistics.median(rounds.ours),
                unit="tokens/s",
                peer="the paper's procedure: batch 1, a cached pass for "
                + ("every candidate" if every_candidate else "each candidate up to the accepted one"),
                ratio=rounds.ratio,
                conditions={
                    "peer_value": round(statistics.median(rounds.peers), 3),
                    "rows": rows,
                    "prompts": len(prompts),
                    "peer_prompts_a_round": peer_prompts,
                    "rounds": num_rounds,
                    "ours": work.per_token(),
                    "theirs": cost.per_token(),
                    **_described(subject, engine, subject.model),
                },
            )
        )
    return figures


class _Generate:
    """Plain greedy ``generate``, and what it costs."""

    def __init__(self, subject: Subject, batch: int, max_new_tokens: int) -> None:
        self._subject, self._batch = subject, batch
        self._options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
        self._options |= {"eos_token_id": list(subject.eos_ids) or None, "pad_token_id": 0}
        if subject.model.device.type == "cuda":
            self._options["cache_implementation"] = "static"

    def answer(self, prompts: Sequence[list[int]], work: _Work) -> None:
        """Answer one batch, left-padded; add to ``work``."""
        longest = max(map(len, prompts))
        ids_BL = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for row, ids in enumerate(prompts):
            ids_BL[row, longest - len(ids) :] = torch.tensor(ids)
            mask_BL[row, longest - len(ids) :] = 1
        device = self._subject.model.device
        with torch.inference_mode():
            found_BL = self._subject.plain_model.generate(
                ids_BL.to(device), attention_mask=mask_BL.to(device), **self._options
            )[:, longest:]
        # The last token is not run through the model.
        work.passes += len(prompts) * (found_BL.shape[1] - 1)
        work.positions += len(prompts) * (found_BL.shape[1] - 1)
        for ids in found_BL.tolist():
            ends = [place for place, token in enumerate(ids) if token in self._subject.eos_ids]
            work.tokens += ends[0] + 1 if ends else len(ids)


def _make_engine(
    subject: Subject,
    decoding: DecodingConfig,
    policy: AnyPolicy,
    rows: int,
    prompts: Sequence[list[int]],
) -> Engine:
    longest = max(map(len, prompts))
    return Engine(subject.model, subject.eos_ids, decoding, policy, rows, longest, common_prefix(prompts))


def _decode(engine: Engine, requests: Sequence[Request], work: _Work) -> float:
    """Answer all requests, add to ``work``, return tokens/s."""
    passes, positions = engine.decoding_work
    started = _now(engine.model)
    tokens = sum(len(generation.response_ids) for generation in engine.generate(requests))
    speed = tokens / (_now(engine.model) - started)
    work.tokens += tokens
    work.passes += engine.decoding_work[0] - passes
    work.positions += engine.decoding_work[1] - positions
    return speed


def _described(subject: Subject, engine: Engine, peer_model: Any) -> dict[str, Any]:
    """What every figure depends on."""
    return {
        "new_tokens": engine.config.max_new_tokens,
        "top_k": engine.config.truncation.top_k,
        "top_p": engine.config.truncation.top_p,
        "steering": engine.config.steering,
        "mode": engine.config.mode,
        "compile": engine.config.compile,
        "cache_bytes_per_row": engine.cache_nbytes // engine.num_rows,
        "llm": subject.name,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": str(subject.model.device),
        "agent": subject.agent_name,
        "packed_layers": is_packed(subject.model),
        "peer_packed_layers": is_packed(peer_model),
    } | machine()


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
