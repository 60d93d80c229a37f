"""What a reward head is fitted to: states of real and broken answers, and which of two is better.

Legend: T texts, M tokens of all of them, D hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mara.actors import broken_text
from mara.actors.answer_states import Answer, Ids, Sampler, read_answers, sample_answers
from mara.actors.head_config import FitConfig
from mara.actors.heads import answer_ids
from mara.actors.llm import LLM
from mara.actors.preferences import Message, PreferencePair, prompt_fraction
from mara.common.errors import UserError
from mara.common.seeding import derive_seed, generator

Progress = Callable[[str, int, int], None]

SPLIT_SEED = 0
"""The held-out prompts are the same for every head."""

MIN_OWN_PROMPTS = 10

SAMPLED = "sampled"
OWN = {"greedy": Sampler(temperature=0), SAMPLED: Sampler(), "sampled of 5": Sampler(top_k=5)}
"""Answers the LLM gives when it is left alone."""

SALAD = {
    "last of 5": Sampler(top_k=5, slip=1, slip_to_last=True),
    "last of 40": Sampler(top_k=40, slip=1, slip_to_last=True),
    "hot": Sampler(top_k=200, top_p=0.999, temperature=1.6),
    "half slips of 5": Sampler(top_k=5, slip=0.5),
    "third slips of 40": Sampler(top_k=40, slip=0.3, temperature=0),
}
"""Answers that an agent draws which rejects too much: everything; at high temperature; now and then."""

MILD_SALAD = ("half slips of 5", "third slips of 40")
PREFERENCE, OFF_TOPIC = "preference", "off topic"
OWN_TEXT = "own text"
REAL = (PREFERENCE, OWN_TEXT, *OWN)
BROKEN_TEXT = ("shuffled", "repeated", "garbled", "stock loop")
CUT = {"cut to a half": 0.5, "cut to a quarter": 0.25, "two tokens": 0.0}


class Comparison(NamedTuple):
    """Text ``better`` should score higher than text ``worse``."""

    better: int
    worse: int
    kind: str


@dataclass(frozen=True, slots=True)
class Material:
    """States of T texts, without end-of-sequence tokens, and comparisons between them."""

    states_MD: torch.Tensor
    """In the LLM's dtype, text after text."""
    starts_T: torch.Tensor
    counts_T: torch.Tensor
    """int64: tokens of each text, at least 1."""
    kinds_T: list[str]
    """``preference`` for texts of the pairs, else how the text was drawn or broken."""
    places_T: torch.Tensor
    """float64 in [0, 1): where the text's prompt falls in the split."""
    comparisons: list[Comparison]
    num_too_long: int

    def take(self, texts_B: torch.Tensor, limits_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States [M, D] of the texts, each cut to its limit, and their token counts [B]."""
        counts_B = torch.minimum(self.counts_T[texts_B], limits_B).clamp(min=1)
        firsts_B = counts_B.cumsum(0) - counts_B
        owner_M = torch.repeat_interleave(torch.arange(len(texts_B)), counts_B)
        rows_M = self.starts_T[texts_B][owner_M] + torch.arange(int(counts_B.sum())) - firsts_B[owner_M]
        return self.states_MD[rows_M], counts_B


class _Collector:
    def __init__(self, eos_ids: Sequence[int]) -> None:
        self._eos_ids = eos_ids
        self.states: list[torch.Tensor] = []
        self.kinds: list[str] = []
        self.places: list[float] = []
        self.comparisons: list[Comparison] = []

    def add(self, answer: Answer, kind: str, place: float) -> int | None:
        """Keep the answer's words; None if it has none."""
        num_words = len(answer.ids) - (answer.ids[-1] in self._eos_ids)
        if num_words == 0:
            return None
        self.states.append(answer.states_ND[:num_words])
        self.kinds.append(kind)
        self.places.append(place)
        return len(self.states) - 1

    def compare(self, better: int | None, worse: int | None, kind: str) -> None:
        if better is not None and worse is not None and better != worse:
            self.comparisons.append(Comparison(better, worse, kind))

    def material(self, num_too_long: int) -> Material:
        counts_T = torch.tensor([len(states_ND) for states_ND in self.states])
        return Material(
            states_MD=torch.cat(self.states),
            starts_T=counts_T.cumsum(0) - counts_T,
            counts_T=counts_T,
            kinds_T=self.kinds,
            places_T=torch.tensor(self.places, dtype=torch.float64),
            comparisons=self.comparisons,
            num_too_long=num_too_long,
        )


class OwnAnswers(NamedTuple):
    """The LLM's answers to one prompt, by how they were drawn."""

    prompt: str
    prompt_ids: Ids
    answers: dict[str, Answer]


def build_material(
    llm: LLM,
    pairs: Sequence[PreferencePair],
    own: Sequence[OwnAnswers],
    config: FitConfig,
    progress: Progress,
) -> Material:
    """Pass all texts of a fit through the LLM. ``own`` comes from :func:`sample_own_answers`."""
    collector = _Collector(llm.eos_ids)
    rng = random.Random(derive_seed(config.seed, "broken texts"))
    num_too_long = _add_pairs(llm, pairs, config, collector, rng, progress)
    _add_own(llm, own, config, collector, rng, progress)
    return collector.material(num_too_long)


def sample_own_answers(
    llm: LLM, prompts: Sequence[str], config: FitConfig, progress: Progress
) -> list[OwnAnswers]:
    """Answers of the LLM to up to ``num_own_prompts`` of the prompts, good ones and broken ones.

    They depend on the LLM, the prompts and the seed alone, so heads for several qualities can share them.

    Raises:
        UserError: fewer than 10 prompts are short enough.
    """
    chosen = sorted(set(prompts))
    random.Random(derive_seed(config.seed, "own prompts")).shuffle(chosen)
    rendered = [(prompt, llm.render(prompt)) for prompt in chosen]
    rendered = [item for item in rendered if len(item[1]) <= config.max_prompt_tokens][
        : config.num_own_prompts
    ]
    check_prompts(len(rendered), config)
    samplers = OWN | SALAD
    answers = sample_answers(
        llm,
        [ids for _, ids in rendered],
        list(samplers.values()),
        config.own_tokens,
        generator(config.seed, "own answers"),
        lambda done, total: progress("sampling the LLM's own answers", done, total),
        rows=max(len(samplers), config.max_batch_tokens // config.own_tokens),
    )
    return [
        OwnAnswers(prompt, ids, dict(zip(samplers, drawn, strict=True)))
        for (prompt, ids), drawn in zip(rendered, answers, strict=True)
    ]


def check_prompts(num_prompts: int, config: FitConfig) -> None:
    """Refuse prompts that are too few for the scale of a head.

    Raises:
        UserError: fewer than 10.
    """
    if num_prompts < MIN_OWN_PROMPTS:
        raise UserError(
            f"prompts: {config.prompts or config.pairs} has {num_prompts} prompts for the LLM to answer; "
            f"give at least {MIN_OWN_PROMPTS} of at most max_prompt_tokens={config.max_prompt_tokens}"
        )


def render_conversation(llm: LLM, messages: Sequence[Message], max_tokens: int) -> list[int] | None:
    """Token ids of a conversation in the LLM's chat template, ready for the answer.

    Drops the oldest turns until it fits, keeping the last; None if that alone is too long. For one user
    message it equals :meth:`LLM.render`.
    """
    turns = list(messages)
    while turns:
        ids = _render(llm, turns)
        if len(ids) <= max_tokens:
            return ids
        # An answer without its question misleads: question and answer go together.
        turns = turns[2:] if len(turns) > 2 else turns[-1:] if len(turns) == 2 else []
    return None


def _render(llm: LLM, turns: Sequence[Message]) -> list[int]:
    if len(turns) == 1 and turns[0].role == "user":
        return llm.render(turns[0].content)
    if llm.tokenizer.chat_template is None:
        return list(llm.tokenizer("\n\n".join(turn.content for turn in turns))["input_ids"])
    return llm.fill([turn._asdict() for turn in turns])


def _add_pairs(
    llm: LLM,
    pairs: Sequence[PreferencePair],
    config: FitConfig,
    collector: _Collector,
    rng: random.Random,
    progress: Progress,
) -> int:
    """Texts of the pairs and their broken versions; returns how many pairs were too long."""
    by_prompt: dict[tuple[Message, ...], list[PreferencePair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.messages, []).append(pair)
    prompts = list(by_prompt)
    broken = set(rng.sample(prompts, min(config.num_broken_prompts, len(prompts))))
    words = [word for pair in rng.sample(list(pairs), min(300, len(pairs))) for word in pair.chosen.split()]
    num_too_long = 0
    groups: list[tuple[Ids, list[list[int]]]] = []
    labels: list[tuple[tuple[Message, ...], list[str], dict[str, str]]] = []
    for number, messages in enumerate(prompts):
        prompt_ids = render_conversation(llm, messages, config.max_prompt_tokens)
        if prompt_ids is None:
            num_too_long += len(by_prompt[messages])
            continue
        texts = list(dict.fromkeys(t for p in by_prompt[messages] for t in (p.chosen, p.rejected)))
        versions: dict[str, str] = {}
        real = rng.choice(texts)
        cut = llm.decode(answer_ids(llm, real)[: config.max_answer_tokens])
        if messages in broken and len(cut.split()) >= 3:
            other = by_prompt[prompts[(number + 1) % len(prompts)]][0]
            versions = {
                PREFERENCE: cut,
                **_break(cut, rng, words),
                OFF_TOPIC: rng.choice((other.chosen, other.rejected)),
            }
        ids = [[*answer_ids(llm, t), llm.eos_id][: config.max_answer_tokens] for t in texts]
        ids += _cut_ids(llm, versions.values(), config.max_answer_tokens)
        groups.append((prompt_ids, ids))
        labels.append((messages, texts, versions))
    answers = read_answers(
        llm,
        groups,
        lambda done, total: progress("reading the pairs", done, total),
        config.max_batch_tokens,
    )
    for (messages, texts, versions), group in zip(labels, answers, strict=True):
        place = prompt_fraction(by_prompt[messages][0].group, SPLIT_SEED)
        index = {
            text: collector.add(answer, PREFERENCE, place) for text, answer in zip(texts, group, strict=False)
        }
        for pair in by_prompt[messages]:
            collector.compare(index[pair.chosen], index[pair.rejected], PREFERENCE)
        _add_versions(collector, versions, group[len(texts) :], place)
    return num_too_long


def _add_own(
    llm: LLM,
    own: Sequence[OwnAnswers],
    config: FitConfig,
    collector: _Collector,
    rng: random.Random,
    progress: Progress,
) -> None:
    """The LLM's own answers, good and broken while sampling, and good ones broken afterwards."""
    words = [word for item in own[:100] for word in llm.decode(item.answers[SAMPLED].ids).split()]
    groups: list[tuple[Ids, list[list[int]]]] = []
    versions: list[dict[str, str]] = []
    places: list[float] = []
    for item in own[::2]:
        real = llm.decode(item.answers[rng.choice(list(OWN))].ids)
        if len(real.split()) >= 3:
            versions.append({OWN_TEXT: real, **_break(real, rng, words)})
            groups.append((item.prompt_ids, _cut_ids(llm, versions[-1].values(), config.own_tokens)))
            places.append(_place(item.prompt))
    answers = read_answers(
        llm,
        groups,
        lambda done, total: progress("reading broken answers", done, total),
        config.max_batch_tokens,
    )
    for texts, group, place in zip(versions, answers, places, strict=True):
        _add_versions(collector, texts, group, place)
    for item in own:
        place = _place(item.prompt)
        index = {kind: collector.add(answer, kind, place) for kind, answer in item.answers.items()}
        for good in OWN:
            for kind in SALAD:
                # A sample at temperature 1 slips as often as the mild kinds do.
                if good != SAMPLED or kind not in MILD_SALAD:
                    collector.compare(index[good], index[kind], kind)


def _break(text: str, rng: random.Random, words: list[str]) -> dict[str, str]:
    """Broken versions of a text, by kind."""
    broken = {
        "shuffled": broken_text.shuffled(text, rng),
        "repeated": rng.choice(broken_text.REPETITIONS)(text, rng),
        "garbled": broken_text.garbled(text, rng, words),
    }
    if rng.random() < 0.3:
        broken["stock loop"] = broken_text.stock_loop(text, rng)
    return broken


def _add_versions(
    collector: _Collector, versions: dict[str, str], answers: Sequence[Answer], place: float
) -> None:
    """The first version is the real text."""
    real: int | None = None
    for (kind, text), answer in zip(versions.items(), answers, strict=True):
        index = collector.add(answer, kind, place)
        if kind in REAL:
            real = index
        elif text != next(iter(versions.values())):
            collector.compare(real, index, kind)


def _cut_ids(llm: LLM, texts: Iterable[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, at least one."""
    return [answer_ids(llm, text)[:max_tokens] or [llm.eos_id] for text in texts]


def _place(prompt: str) -> float:
    return prompt_fraction(PreferencePair((Message("user", prompt),), "", "").group, SPLIT_SEED)
