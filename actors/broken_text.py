"""Broken versions of a text: what a reward must rank below the text itself.

Each function takes a text and a random source and returns a text of about the same number of words, so
that length tells nothing about which one is broken.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

STOCK_LOOPS = (
    "the",
    "I",
    "and",
    "yes",
    "!",
    "?",
    "...",
    "very",
    "help",
    "I am",
    "thank you",
    "of the",
    "sorry",
)


def shuffled(text: str, rng: random.Random) -> str:
    """The same words in a random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def looped(text: str, rng: random.Random) -> str:
    """One phrase of the text, of 1 to 8 words, over and over."""
    words = text.split()
    length = rng.randint(1, min(8, max(1, len(words) // 2)))
    start = rng.randint(0, max(0, len(words) - length))
    phrase = words[start : start + length]
    return " ".join((phrase * (len(words) // length + 1))[: max(len(words), 2 * length)])


def stuttered(text: str, rng: random.Random) -> str:
    """Each phrase of the text, of 2 to 12 words, twice or three times; cut to the length of the text."""
    words = text.split()
    repeated: list[str] = []
    start = 0
    while start < len(words) and len(repeated) < len(words):
        length = rng.randint(2, min(12, max(2, len(words) // 3)))
        repeated += words[start : start + length] * rng.randint(2, 3)
        start += length
    return " ".join(repeated[: max(len(words), 4)])


def sentence_repeated(text: str, rng: random.Random) -> str:
    """One sentence of the text again and again; a phrase, if no sentence fits twice into the length."""
    num_words = len(text.split())
    sentences = [s for s in re.split(r"(?<=[.!?\n])\s+", text) if 2 < len(s.split()) <= num_words // 2]
    if not sentences:
        return looped(text, rng)
    sentence = rng.choice(sentences)
    return " ".join([sentence] * round(num_words / len(sentence.split())))


def stock_loop(text: str, rng: random.Random) -> str:
    """A common word or two, over and over."""
    loop = rng.choice(STOCK_LOOPS)
    return " ".join([loop] * (max(4, len(text.split())) // len(loop.split())))


def garbled(text: str, rng: random.Random, foreign_words: list[str]) -> str:
    """A share of the words, 15 to 60 %, replaced by words of other texts."""
    words = text.split()
    share = rng.uniform(0.15, 0.6)
    places = rng.sample(range(len(words)), max(1, round(share * len(words)))) if words else []
    for place in places:
        words[place] = rng.choice(foreign_words)
    return " ".join(words)


REPETITIONS: tuple[Callable[[str, random.Random], str], ...] = (looped, stuttered, sentence_repeated)
