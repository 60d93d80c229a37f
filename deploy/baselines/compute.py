"""Floating-point operations of trainings, counted from tokens. Two for each product that is added up.

Left out of all: attention scores (4·layers·D for each token and each earlier one, some 3 % at 100 tokens of a
small LLM), normalisation, optimisers, sampling, and reward heads, which are tiny. Padding is not counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mara.deploy.baselines.config import Compute

PASS = "pass(T, A) = 2·(body·T + output·A)"
LEGEND = (
    "T tokens read, A positions with logits, body and output the LLM's parameters without its embeddings and "
    "in its output layer, adapter those of the adapter. Attention scores, padding and optimisers are left out"
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


def size_of(model: Any) -> LLMSize:
    """Sizes of a Hugging Face causal language model, without an adapter."""
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    others = {id(embedding), id(output)}
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in others)
    return LLMSize(body, output.numel())


def pairs_compute(size: LLMSize, num_tokens: int, num_answer_tokens: int, has_reference: bool) -> Compute:
    """Training an adapter on given texts.

    Args:
        num_tokens: of all texts, with their prompts, as often as they were trained on.
        num_answer_tokens: those whose logits count.
        has_reference: the plain LLM reads all as well (DPO).

    Example: body 100, output 10, adapter 5, 7 tokens of which 3 are the answer's: a pass has 2·(700 + 30) =
    1460, and training 2·1460 + 6·5·7 = 3130, or with the reference 4590.
    """
    one = size.read(num_tokens, num_answer_tokens)
    flops = {"training": 2 * one + 6.0 * size.adapter * num_tokens}
    formula = f"{PASS}; training 2·pass + 6·adapter·T: forward, and backward through frozen weights"
    if has_reference:
        flops["reference"] = one
        formula += "; reference pass"
    return Compute(
        tokens={"read": num_tokens, "answers": num_answer_tokens},
        flops=flops,
        formula=f"{formula}. {LEGEND}.",
    )


def rlhf_compute(
    size: LLMSize, num_prompt_tokens: int, num_answer_tokens: int, num_scored_prompt_tokens: int
) -> Compute:
    """Training an adapter on sampled answers with reward heads, one update for each.

    Args:
        num_prompt_tokens: the prompt of every answer.
        num_scored_prompt_tokens: prompts that were read for the heads, once for all its answers.
    """
    num_tokens = num_prompt_tokens + num_answer_tokens
    one = size.read(num_tokens, num_answer_tokens)
    adapter = float(size.adapter * num_tokens)
    return Compute(
        tokens={
            "prompts": num_prompt_tokens,
            "answers": num_answer_tokens,
            "prompts read for the rewards": num_scored_prompt_tokens,
        },
        flops={
            "sampling": one + 2 * adapter,
            "log-probabilities": one + 2 * adapter,
            "reference": one,
            "rewards": size.read(num_scored_prompt_tokens + num_answer_tokens, 0),
            "training": 2 * one + 6 * adapter,
        },
        formula=(
            f"{PASS}; sampling and log-probabilities pass + 2·adapter·T each, reference pass, rewards "
            f"pass(T, 0) with each prompt once, training 2·pass + 6·adapter·T. {LEGEND}."
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
        num_decisions: candidates that the LLM read and the agent decided on.
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
            f"that a pass examined after the accepted one are not counted. {LEGEND}."
        ),
    )
