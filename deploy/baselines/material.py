"""Preference pairs as token ids, cut as those of a reward head are."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mara.actors.head_material import SPLIT_SEED, render_conversation
from mara.actors.heads import answer_ids
from mara.actors.llm import LLM
from mara.actors.preferences import (
    PreferencePair,
    drop_shared_answers,
    read_preferences,
    select_pairs,
)
from mara.common.errors import UserError
from mara.common.seeding import derive_seed
from mara.deploy.baselines.config import AlignerSettings, Data, PairsConfig
from mara.deploy.comparison.config import fill_template

SHARED, OTHER_PART, TOO_LONG = (
    "an answer to more than two prompts",
    "outside of share, or in held_out",
    "prompt too long",
)
SAME, NOT_DRAWN = "no two different answers", "beyond num_pairs"


class PairIds(NamedTuple):
    """Token ids of one pair."""

    prompt_ids: list[int]
    """In the chat template, ready for the answer."""
    chosen_ids: list[int]
    rejected_ids: list[int]
    """At least one token each; with the end-of-sequence token where that is not cut off."""


class ReadPairs(NamedTuple):
    """Pairs of all files, before they are tokenised."""

    pairs: list[PreferencePair]
    sources: dict[str, str]
    num_read: int
    left_out: Counter[str]


def read_pairs(config: PairsConfig) -> ReadPairs:
    """The pairs of all files of the part to train on, without those that a reward head leaves out.

    Raises:
        UserError: a file cannot be read, or nothing is left.
    """
    pairs: list[PreferencePair] = []
    sources: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    num_read = 0
    low, high = (config.held_out + end * (1 - config.held_out) for end in config.share)
    for source in config.pairs:
        read = read_preferences(source)
        clean = drop_shared_answers(read)
        used = select_pairs(clean, low, high, SPLIT_SEED)
        num_read += len(read)
        left_out[SHARED] += len(read) - len(clean)
        left_out[OTHER_PART] += len(clean) - len(used)
        name = Path(source).name
        sources[source if name in sources else name] = hashlib.sha256(repr(read).encode()).hexdigest()
        pairs += used
    if not pairs:
        raise _nothing_left(config)
    return ReadPairs(pairs, sources, num_read, left_out)


def dpo_pairs(llm: LLM, read: ReadPairs, config: PairsConfig) -> tuple[list[PairIds], Data]:
    """The pairs to train on, and what became of the others.

    Raises:
        UserError: no pair is usable.
    """
    found = [_pair_ids(llm, pair, config) for pair in read.pairs]
    return _chosen(found, read, config)


def aligner_pairs(llm: LLM, read: ReadPairs, config: AlignerSettings) -> tuple[list[PairIds], Data]:
    """As :func:`dpo_pairs`; the prompts ask to correct the worse answer, which is cut as well.

    Of a conversation the template holds the last turn; those before it stand before the template.

    Raises:
        UserError: no pair is usable.
    """
    # What the template adds does not make a prompt too long.
    most = config.max_prompt_tokens + config.max_answer_tokens + len(answer_ids(llm, config.template))
    found: list[PairIds | str] = []
    for pair in read.pairs:
        ids = _pair_ids(llm, pair, config)
        if isinstance(ids, PairIds):
            worse = llm.decode(answer_ids(llm, pair.rejected)[: config.max_answer_tokens])
            last = pair.messages[-1]
            asked = last._replace(content=fill_template(config.template, last.content, worse))
            prompt_ids = render_conversation(llm, (*pair.messages[:-1], asked), most)
            ids = TOO_LONG if prompt_ids is None else ids._replace(prompt_ids=prompt_ids)
        found.append(ids)
    return _chosen(found, read, config)


def _pair_ids(llm: LLM, pair: PreferencePair, config: PairsConfig) -> PairIds | str:
    """The pair as ids, or why it is left out."""
    prompt_ids = render_conversation(llm, pair.messages, config.max_prompt_tokens)
    if prompt_ids is None:
        return TOO_LONG
    chosen, rejected = (
        [*answer_ids(llm, text), llm.eos_id][: config.max_answer_tokens]
        for text in (pair.chosen, pair.rejected)
    )
    if not (pair.chosen and pair.rejected) or chosen == rejected:
        return SAME
    return PairIds(prompt_ids, chosen, rejected)


def _chosen(
    found: Sequence[PairIds | str], read: ReadPairs, config: PairsConfig
) -> tuple[list[PairIds], Data]:
    usable = [ids for ids in found if isinstance(ids, PairIds)]
    left_out = read.left_out + Counter(why for why in found if isinstance(why, str))
    if not usable:
        raise _nothing_left(config)
    random.Random(derive_seed(config.seed, "pairs")).shuffle(usable)
    used = usable[: config.num_pairs]
    left_out[NOT_DRAWN] += len(usable) - len(used)
    data = Data(sources=read.sources, num_read=read.num_read, left_out=dict(+left_out), num_used=len(used))
    return used, data


def _nothing_left(config: PairsConfig) -> UserError:
    return UserError(
        f"pairs: {', '.join(config.pairs)} leave none to train on; give pairs with two different answers and "
        f"a prompt of at most max_prompt_tokens={config.max_prompt_tokens}, or a larger share={config.share}"
    )
