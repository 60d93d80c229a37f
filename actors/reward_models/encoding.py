"""From a conversation to the tokens that a reward model reads.

Legend: B conversations, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mara.common.contracts import Conversation


class Encoded(NamedTuple):
    """Tokens of one conversation."""

    ids: list[int]
    type_ids: list[int] | None = None
    """Which sentence each token is of, for models that are told."""


Encode = Callable[[Conversation], Encoded]


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Puts a conversation into a text, and that into tokens with the special tokens that are asked for."""

    tokenizer: Any
    template: str
    """A text with ``{prompt}`` and ``{response}``, or ``chat``."""
    add_bos: bool | None
    """None: as the chat template has it or, without one, as the tokenizer does by itself."""
    add_eos: bool

    def __call__(self, conversation: Conversation) -> Encoded:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.template == "chat":
            messages = [
                {"role": "user", "content": conversation.prompt},
                {"role": "assistant", "content": conversation.response},
            ]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        else:
            text = self.template.format(prompt=conversation.prompt, response=conversation.response)
        by_itself = self.add_bos is None and self.template != "chat"
        ids = list(self.tokenizer(text, add_special_tokens=by_itself)["input_ids"])
        if self.add_bos is not None and bos is not None:
            if ids[:1] == [bos]:
                del ids[0]
            ids = [bos, *ids] if self.add_bos else ids
        if self.add_eos and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return Encoded(ids)


@dataclass(frozen=True, slots=True)
class PairEncoder:
    """Prompt and answer as a pair of sentences, with the tokenizer's own special tokens."""

    tokenizer: Any

    def __call__(self, conversation: Conversation) -> Encoded:
        # As lists: a single empty answer would be taken for no second sentence at all.
        encoded = self.tokenizer([conversation.prompt], [conversation.response])
        types = encoded.get("token_type_ids")
        return Encoded(list(encoded["input_ids"][0]), None if types is None else list(types[0]))


def shorten(encode: Encode, conversation: Conversation, max_length: int) -> Encoded | None:
    """The longest beginning of the answer that makes at most ``max_length`` tokens with everything round it.

    None: not even an empty answer does.
    """
    best = encode(conversation._replace(response=""))
    if len(best.ids) > max_length:
        return None
    fits, too_many = 0, len(conversation.response)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        tried = encode(conversation._replace(response=conversation.response[:middle]))
        if len(tried.ids) <= max_length:
            fits, best = middle, tried
        else:
            too_many = middle
    return best


def pad(rows: Sequence[Encoded], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, and ``token_type_ids`` where there are any: int64 [B, L].

    Padded on the right, whatever the tokenizer would do.
    """
    longest = max(len(row.ids) for row in rows)

    def column(values: Callable[[Encoded], Sequence[int]], filler: int) -> torch.Tensor:
        lists = [[*values(row), *[filler] * (longest - len(row.ids))] for row in rows]
        return torch.tensor(lists, dtype=torch.long, device=device)

    columns = {
        "input_ids": column(lambda row: row.ids, pad_id),
        "attention_mask": column(lambda row: [1] * len(row.ids), 0),
    }
    if rows[0].type_ids is not None:
        columns["token_type_ids"] = column(lambda row: row.type_ids or [], 0)
    return columns
