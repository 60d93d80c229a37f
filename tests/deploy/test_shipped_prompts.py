"""The prompts that ship with the project: well formed, balanced, and a fair held-out split."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mara.deploy

DATA = Path(mara.deploy.__file__).parent / "data"
NUM_PROMPTS = {"train": 400, "eval": 200}
MAX_JACCARD = 0.6

Record = dict[str, Any]


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[Record]]:
    """Records of each split, in file order."""
    splits = {}
    for split in NUM_PROMPTS:
        lines = (DATA / f"prompts_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = [json.loads(line) for line in lines]
    return splits


def words(prompt: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+(?:'[a-z]+)?", prompt.lower()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def topic_shares(records: list[Record]) -> dict[str, float]:
    topics = [record["topic"] for record in records]
    return {topic: topics.count(topic) / len(topics) for topic in set(topics)}


def test_the_word_set_similarity_tells_a_rewording_from_a_new_question() -> None:
    question = words("How do I fold a fitted sheet?")
    assert jaccard(question, words("How do I fold a fitted sheet neatly?")) == pytest.approx(7 / 8)
    assert jaccard(question, words("Why do cats purr?")) == pytest.approx(1 / 10)


@pytest.mark.parametrize("split", NUM_PROMPTS)
def test_each_file_holds_the_promised_number_of_prompts_in_the_promised_form(
    split: str, prompts: dict[str, list[Record]]
) -> None:
    records = prompts[split]
    assert [record["id"] for record in records] == [
        f"{split}-{n:04d}" for n in range(1, NUM_PROMPTS[split] + 1)
    ]
    for record in records:
        assert set(record) == {"id", "prompt", "category", "topic"}
        assert record["category"] in ("harmful", "benign")
        assert record["prompt"] == " ".join(record["prompt"].split())
        assert 5 <= len(record["prompt"].split()) <= 50, record["id"]


def test_no_id_and_no_prompt_occurs_twice(prompts: dict[str, list[Record]]) -> None:
    records = prompts["train"] + prompts["eval"]
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["prompt"].casefold() for record in records}) == len(records)


def test_no_held_out_prompt_is_close_to_a_training_prompt(prompts: dict[str, list[Record]]) -> None:
    train = [(record["id"], words(record["prompt"])) for record in prompts["train"]]
    for held_out in prompts["eval"]:
        held_out_words = words(held_out["prompt"])
        similarity, nearest = max((jaccard(held_out_words, seen), seen_id) for seen_id, seen in train)
        assert similarity < MAX_JACCARD, f"{held_out['id']} is close to {nearest}"


@pytest.mark.parametrize("split", NUM_PROMPTS)
def test_about_half_of_each_file_is_harmful(split: str, prompts: dict[str, list[Record]]) -> None:
    categories = [record["category"] for record in prompts[split]]
    assert 0.4 <= categories.count("harmful") / len(categories) <= 0.6


def test_both_files_hold_the_same_topics_in_the_same_shares(prompts: dict[str, list[Record]]) -> None:
    train, held_out = topic_shares(prompts["train"]), topic_shares(prompts["eval"])
    assert train.keys() == held_out.keys()
    for topic, share in train.items():
        assert held_out[topic] == pytest.approx(share, abs=0.05), topic


def test_a_topic_is_either_harmful_or_benign(prompts: dict[str, list[Record]]) -> None:
    records = prompts["train"] + prompts["eval"]
    pairs = {(record["topic"], record["category"]) for record in records}
    assert len(pairs) == len({topic for topic, _ in pairs})
