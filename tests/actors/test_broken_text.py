"""Broken versions of texts differ from them, but not in length."""

from __future__ import annotations

import random

import pytest

from mara.actors import broken_text

TEXT = (
    "Bread needs flour, water, salt and time. Mix them in a large bowl. Then let the dough rest for an hour, "
    "fold it twice and bake it until the crust is brown."
)
BREAKERS = [
    broken_text.shuffled,
    *broken_text.REPETITIONS,
    broken_text.stock_loop,
    lambda text, rng: broken_text.garbled(text, rng, ["pillar", "seven", "because"]),
]


@pytest.mark.parametrize("breaker", BREAKERS)
def test_a_broken_text_is_another_text_of_about_the_same_length(breaker):
    for seed in range(50):
        broken = breaker(TEXT, random.Random(seed))
        assert broken != TEXT
        assert 0.6 < len(broken.split()) / len(TEXT.split()) < 1.6


@pytest.mark.parametrize("breaker", broken_text.REPETITIONS)
def test_repetitions_use_the_words_of_the_text_and_fewer_of_them(breaker):
    for seed in range(50):
        words = breaker(TEXT, random.Random(seed)).split()
        assert set(words) <= set(TEXT.split())
        assert len(set(words)) < 0.8 * len(set(TEXT.split()))


@pytest.mark.parametrize("breaker", BREAKERS)
@pytest.mark.parametrize("text", ["", "No.", "Not at all."])
def test_short_texts_are_broken_without_an_error(breaker, text):
    assert isinstance(breaker(text, random.Random(0)), str)


def test_shuffling_keeps_every_word():
    assert sorted(broken_text.shuffled(TEXT, random.Random(1)).split()) == sorted(TEXT.split())
