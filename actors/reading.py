"""Reading text with an LLM that somebody else may have written: how probable it is, and its hidden states.

Legend: N tokens of one response, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mara.actors.answer_states import read_answers
from mara.actors.decoding.candidates import log_totals
from mara.actors.heads import answer_ids
from mara.actors.llm import LLM
from mara.common.contracts import Conversation
from mara.common.errors import UserError


class Reading(NamedTuple):
    """What an LLM makes of a response, given its prompt."""

    num_tokens: int
    """Of the response, without special tokens. 0: it is empty."""
    logprob: float
    """Sum over its tokens, at temperature 1 over the whole vocabulary."""
    states_ND: torch.Tensor
    """Last hidden states after the final norm at its tokens, in the LLM's dtype, on the CPU."""


@torch.inference_mode()
def read_responses(llm: LLM, conversations: Sequence[Conversation]) -> list[Reading]:
    """Read every response once, and each prompt once for all its responses.

    Raises:
        UserError: the LLM gives a number that is not finite.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    responses = []
    for place, said in enumerate(conversations):
        places.setdefault(tuple(llm.render(said.prompt)), []).append(place)
        responses.append(answer_ids(llm, said.response))
    # The prompt's last token is read with the response: its state says how probable the first word is.
    groups = [
        (prompt[:-1], [[prompt[-1], *responses[place]] for place in of_prompt])
        for prompt, of_prompt in places.items()
        if len(prompt) > 1
    ]
    found: dict[int, torch.Tensor] = {}
    read = iter(read_answers(llm, groups))
    for prompt, of_prompt in places.items():
        if len(prompt) > 1:
            states = [answer.states_ND for answer in next(read)]
        else:
            states = llm.hidden_states([[*prompt, *responses[place]] for place in of_prompt])
        for place, states_LD in zip(of_prompt, states, strict=True):
            found[place] = states_LD
    logit_head = llm.logit_head
    readings = []
    for place, (said, response) in enumerate(zip(conversations, responses, strict=True)):
        states_LD, logprob = found[place], 0.0
        if response:
            logits_NV = logit_head(states_LD[:-1].to(llm.device))
            tokens_N1 = torch.tensor(response, device=llm.device)[:, None]
            logprob = float((logits_NV.gather(1, tokens_N1)[:, 0] - log_totals(logits_NV)).sum())
        if not math.isfinite(logprob):
            raise UserError(
                f"llm.model: the probabilities of the text {said.response[:40]!r} are not finite; try "
                "llm.dtype=float32"
            )
        readings.append(Reading(len(response), logprob, states_LD[1:].cpu()))
    return readings
