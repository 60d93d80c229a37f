"""Floating-point operations of trainings, counted from tokens. Two for each product that is added up.

Training is counted as TRL 1.16 does it. Its output layer keeps no logits: the backward pass makes them again,
so that layer costs three passes where others cost two. On a GPU with Triton only the answers' positions have
logits; elsewhere all do, prompts' too.

Left out of all: attention scores (4·layers·D for each token and each earlier one, some 3 % at 100 tokens of a
small LLM), normalisation, optimisers, sampling, and reward heads, which are tiny. Padding is not counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.utils import is_triton_available

from mara.deploy.baselines.config import Compute

PASS = "pass(T, L) = 2·(body·T + output·L)"
TRAINING = "4·body·T + 6·output·L + 6·adapter·T"
SIZES = "body and output the LLM's parameters without its embeddings and in its output layer"
LEFT_OUT = "Attention scores, padding and optimisers are left out"
LEGEND = (
    "T tokens read, L positions with logits (the answers' on a GPU with Triton, elsewhere all), "
    f"{SIZES}, adapter those of the adapter. {LEFT_OUT}"
)


class LLMSize(NamedTuple):
    """Parameters by how they are used."""

    body: int
    """Of the matrices that meet every token: all but the token embedding and the output layer."""
    output: int
    """Of the output layer, which only positions with logits meet."""
    adapter: int = 0
    """Of the adapter, in the body."""

    def read(self, num_tokens: int, num_logits: int) -> float:
        """Operations of a forward pass without the adapter."""
        return 2.0 * (self.body * num_tokens + self.output * num_logits)

    def train(self, num_tokens: int, num_logits: int) -> float:
        """Operations of forward and backward through frozen weights to the adapter's, logits made twice."""
        matrices = 4.0 * self.body * num_tokens + 6.0 * self.output * num_logits
        return matrices + 6.0 * self.adapter * num_tokens


def size_of(model: Any) -> LLMSize:
    """Sizes of a Hugging Face causal language model, without an adapter."""
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    others = {id(embedding), id(output)}
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in others)
    return LLMSize(body, output.numel())


def count_logits(device: torch.device, num_tokens: int, num_answer_tokens: int, num_texts: int) -> int:
    """Positions whose logits TRL's trainers make: the answers', or all that have a next token.

    Args:
        num_tokens: of all texts, prompts and answers.
    """
    has_kernel = device.type in ("cuda", "xpu") and is_triton_available()
    return num_answer_tokens if has_kernel else num_tokens - num_texts


def pairs_compute(size: LLMSize, num_tokens: int, num_logits: int, has_reference: bool) -> Compute:
    """Training an adapter on given texts.

    Args:
        num_tokens: of all texts, with their prompts, as often as they were trained on.
        num_logits: as :func:`count_logits` says.
        has_reference: the plain LLM reads all as well (DPO).

    Example: body 100, output 10, adapter 5, 7 tokens, 3 with logits: training has 4·700 + 6·30 + 6·35 = 3190,
    and the reference 2·(700 + 30) = 1460 more.
    """
    flops = {"training": size.train(num_tokens, num_logits)}
    formula = f"{PASS}; training {TRAINING}: forward, and backward through frozen weights, logits made twice"
    if has_reference:
        flops["reference"] = size.read(num_tokens, num_logits)
        formula += "; reference pass"
    return Compute(
        tokens={"read": num_tokens, "with logits": num_logits},
        flops=flops,
        formula=f"{formula}. {LEGEND}.",
    )


def rlhf_compute(
    size: LLMSize,
    num_prompt_tokens: int,
    num_answer_tokens: int,
    num_scored_prompt_tokens: int,
    num_logits: int,
    has_reference: bool,
) -> Compute:
    """Training an adapter on sampled answers with reward heads, one update for each.

    Args:
        num_prompt_tokens: the prompt of every answer.
        num_scored_prompt_tokens: prompts that were read for the heads, once for all its answers.
        num_logits: as :func:`count_logits` says; sampling makes those of the answers alone.
        has_reference: the plain LLM reads all as well, for the penalty.
    """
    num_tokens = num_prompt_tokens + num_answer_tokens
    adapter = 2.0 * size.adapter * num_tokens
    reference = size.read(num_tokens, num_logits)
    return Compute(
        tokens={
            "prompts": num_prompt_tokens,
            "answers": num_answer_tokens,
            "prompts read for the rewards": num_scored_prompt_tokens,
            "with logits": num_logits,
        },
        flops={
            "sampling": size.read(num_tokens, num_answer_tokens) + adapter,
            "log-probabilities": reference + adapter,
            "reference": reference if has_reference else 0.0,
            "rewards": size.read(num_scored_prompt_tokens + num_answer_tokens, 0),
            "training": size.train(num_tokens, num_logits),
        },
        formula=(
            f"{PASS}; sampling pass(T, answers) + 2·adapter·T, log-probabilities pass + 2·adapter·T, "
            "reference pass (none without a penalty), rewards pass(T, 0) with each prompt once, "
            f"training {TRAINING}. {LEGEND}."
        ),
    )


def agent_compute(
    size: LLMSize,
    num_prompt_tokens: int,
    num_decisions: int,
    num_answer_tokens: int,
    num_transitions: int,
    num_agent_parameters: int,
    num_critic_parameters: int,
) -> Compute:
    """Training an agent: rollouts of the frozen LLM, and gradient steps of the small networks.

    Args:
        num_prompt_tokens: prompts that were read; one that has several answers is read once.
        num_decisions: candidates that the agent decided on, up to the accepted one. In wide mode the LLM
            reads more.
        num_transitions: those of all gradient steps, as often as they were used.
        num_critic_parameters: of both heads.
    """
    networks = num_agent_parameters + num_critic_parameters
    return Compute(
        tokens={
            "prompts": num_prompt_tokens,
            "candidates": num_decisions,
            "answers": num_answer_tokens,
            "transitions": num_transitions,
        },
        flops={
            "rollouts": size.read(num_prompt_tokens + num_decisions, num_answer_tokens)
            + 2.0 * num_agent_parameters * num_decisions,
            "learner": 8.0 * networks * num_transitions,
        },
        formula=(
            f"{PASS}; rollouts pass(prompts + candidates, answers) + 2·agent·candidates; learner "
            "8·(agent + critic)·transitions: forward and backward, and forward at the next state. Candidates "
            "are those that were decided on, up to the accepted one; wide mode reads more. T tokens read, L "
            f"positions with logits, {SIZES}. {LEFT_OUT}."
        ),
    )
