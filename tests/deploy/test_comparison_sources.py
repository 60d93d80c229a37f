"""Prompts of files and of the Hub, and answers that somebody else made."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mara.actors.prompts import Prompt
from mara.common.errors import UserError
from mara.deploy.comparison.config import DatasetConfig
from mara.deploy.comparison.sources import GivenAnswers, hub_dataset, load_dataset
from mara.deploy.hub import HubDataset, prompts_of


def test_the_first_prompts_of_a_file_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "why?", "id": "a", "category": "x"}\n{"prompt": "how?"}\n')
    assert load_dataset("mine", DatasetConfig(path=path, num_prompts=1)) == [Prompt("a", "why?", "x")]
    assert len(load_dataset("mine", DatasetConfig(path=path))) == 2
    path.unlink()
    with pytest.raises(UserError, match=r"datasets\.mine\.path: .* cannot be read"):
        load_dataset("mine", DatasetConfig(path=path))


@pytest.mark.parametrize(
    "name", ["SafeRLHF", "BeaverTails", "HarmfulQA", "HH-RLHF", "UltraFeedback", "hh-rlhf"]
)
def test_known_data_sets_have_their_place_and_columns(name: str) -> None:
    found = hub_dataset(DatasetConfig(hub=name))
    assert "/" in found.name and found.split and found.prompt_column
    other = hub_dataset(DatasetConfig(hub=name, split="validation", prompt_column="text"))
    assert other == found._replace(split="validation", prompt_column="text")


def test_an_unknown_data_set_is_taken_by_its_own_name() -> None:
    found = hub_dataset(DatasetConfig(hub="me/mine", category_column="kind"))
    assert found == HubDataset("me/mine", "test", "prompt", "kind")


def test_prompts_of_the_hub_are_different_and_named_by_their_row() -> None:
    rows = [
        {"question": " why? ", "topic": "a"},
        {"question": "why?", "topic": "b"},
        {"question": "", "topic": "b"},
        {"question": "how?", "topic": 3},
        {"question": "what?", "topic": "c"},
    ]
    source = HubDataset("me/mine", "test", "question", "topic")
    found = prompts_of(rows, source, "datasets.mine", 2)
    assert found == [Prompt("row-1", "why?", "a"), Prompt("row-4", "how?", "3")]
    assert [prompt.prompt for prompt in prompts_of(rows, source, "x")] == ["why?", "how?", "what?"]


def test_of_a_conversation_the_first_words_of_the_user_are_the_prompt() -> None:
    text = "\n\nHuman: Who are you?\nReally?\n\nAssistant: An assistant.\n\nHuman: Oh.\n\nAssistant: Yes."
    (found,) = prompts_of([{"chosen": text}], hub_dataset(DatasetConfig(hub="HH-RLHF")), "datasets.hh")
    assert found.prompt == "Who are you?\nReally?"


def test_a_column_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(
        UserError, match=r"datasets\.x: me/mine has no text in column 'prompt'.*\(there are a, b\)"
    ):
        prompts_of([{"a": 1, "b": 2}], HubDataset("me/mine", "test", "prompt"), "datasets.x")
    with pytest.raises(UserError, match="has no prompts"):
        prompts_of([], HubDataset("me/mine", "test", "prompt"), "datasets.x")


def test_the_hub_is_read_with_a_package_that_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"datasets\.bt\.hub: PKU-Alignment/.* with the package datasets; .* -m pip"
    ):
        load_dataset("bt", DatasetConfig(hub="BeaverTails"))


PROMPTS = [Prompt("a", "why?"), Prompt("b", "how?")]


def given(path: Path, *rows: object) -> GivenAnswers:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return GivenAnswers(path, "systems.theirs.path")


def test_answers_are_found_by_prompt_or_id(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = given(path, {"prompt": "how?", "response": "so"}, {"id": "a", "response": "because"}, "\n")
    assert answers.to("mine", PROMPTS) == ["because", "so"]
    # Two data sets may have the same ids: the prompt says which one is meant.
    answers = given(
        path,
        {"id": "a", "prompt": "why?", "response": "1"},
        {"id": "a", "prompt": "how?", "response": "2"},
    )
    assert answers.to("mine", [Prompt("a", "how?")]) == ["2"]
    answers = given(path, {"id": "a", "response": "because"})
    assert answers.to("mine", [Prompt("a", "why?")]) == answers.to("same", [Prompt("a", "why?")])
    with pytest.raises(UserError, match="the id 'a' stands for other prompts in two data sets"):
        answers.to("other", [Prompt("a", "how?")])


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (["{\n"], "line 1: not JSON"),
        ([{"id": "a"}], 'line 1: needs an object with a text "response"'),
        ([{"response": "x"}], 'line 1: has neither "id" nor "prompt"'),
        (
            [{"id": "a", "response": "x"}, {"id": "a", "response": "y"}],
            "line 2: 'a' is answered a second time",
        ),
        (
            [{"id": "a", "response": "x"}],
            "no response to 1 of the 2 prompts of datasets.mine, such as 'b' ('how?')",
        ),
    ],
)
def test_answers_that_cannot_be_used_are_one_line(tmp_path: Path, rows: list, part: str) -> None:
    with pytest.raises(UserError) as caught:
        given(tmp_path / "answers.jsonl", *rows).to("mine", PROMPTS)
    message = str(caught.value)
    assert message.startswith("systems.theirs.path: ") and part in message and "\n" not in message


def test_a_file_of_answers_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"systems\.theirs\.path: .* cannot be read \(No such file"):
        GivenAnswers(tmp_path / "none.jsonl", "systems.theirs.path")
