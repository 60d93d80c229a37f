"""Prompts to train on and to compare with that a data set of the Hub has."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mara.actors.prompts import Prompt
from mara.common.errors import UserError
from mara.deploy.config import RunConfig, portable_name
from mara.deploy.config_file import dump_config, load_config
from mara.deploy.hub import digest_of, load_source

CONFIG = """
llm: {model: some/model}
prompts: {train: "hub:SafeRLHF#train", evaluation: "hub:me/mine#held-out"}
rewards: {helpful: {path: heads/helpful, weight: 1.0}}
"""
ROWS = {
    ("PKU-Alignment/PKU-SafeRLHF", "train"): [{"prompt": "why?"}, {"prompt": "why?"}, {"prompt": " how? "}],
    ("Anthropic/hh-rlhf", "train"): [{"chosen": "\n\nHuman: who?\n\nAssistant: me", "rejected": ""}],
    ("me/mine", "held-out"): [{"prompt": "when?"}],
    ("me/other", "train"): [{"text": "when?"}],
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return load_config(tmp_path / "mine.yaml")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package datasets, of which the tests have the one function that is called."""
    module = ModuleType("datasets")
    module.load_dataset = lambda name, split: ROWS[name, split]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "datasets" else found(name)
    )


def test_prompts_of_the_hub_are_named_by_data_set_and_split(config: RunConfig, tmp_path: Path) -> None:
    assert str(config.prompts.train) == portable_name(config.prompts.train) == "hub:SafeRLHF#train"
    assert portable_name(Path("hub:me/mine#train")) == "hub:me/mine#train"
    changed = load_config(tmp_path / "mine.yaml", ["prompts.train=hub:HH-RLHF#train"])
    assert str(changed.prompts.train) == "hub:HH-RLHF#train"
    printed = tmp_path / "elsewhere" / "mine.yaml"
    printed.parent.mkdir()
    printed.write_text(dump_config(config))
    assert load_config(printed).prompts == config.prompts


@pytest.mark.parametrize("name", ["hub:SafeRLHF", "hub:SafeRLHF#", "hub:#train", "hub:"])
def test_a_data_set_without_a_split_is_refused(tmp_path: Path, config: RunConfig, name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "mine.yaml", [f"prompts.train={name}"])
    assert str(caught.value) == (
        f"prompts.train: {name} is no data set with a split; write such as hub:SafeRLHF#train"
    )


@pytest.mark.usefixtures("hub")
def test_the_split_is_the_one_that_is_named_and_prompts_are_different() -> None:
    assert load_source(Path("hub:SafeRLHF#train"), "prompts.train") == [
        Prompt("row-1", "why?"),
        Prompt("row-3", "how?"),
    ]
    assert [p.prompt for p in load_source(Path("hub:hh-rlhf#train"), "prompts.train")] == ["who?"]
    assert load_source(Path("hub:me/mine#held-out"), "prompts.evaluation") == [Prompt("row-1", "when?")]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("hub:me/other#train", "has no text in column 'prompt'; give a file of its prompts in prompts.train"),
        ("hub:me/mine#test", "me/mine, split 'test', cannot be read"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_one_line(name: str, mistake: str) -> None:
    with pytest.raises(UserError) as caught:
        load_source(Path(name), "prompts.train")
    assert str(caught.value).startswith(f"prompts.train={name}: ")
    assert mistake in str(caught.value) and "\n" not in str(caught.value)


def test_the_package_datasets_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"prompts\.train=hub:SafeRLHF#train: .* -m pip install .*hub.*, or give"
    ):
        load_source(Path("hub:SafeRLHF#train"), "prompts.train")


def test_the_digest_is_that_of_the_file_or_of_the_prompts_that_the_hub_gave(tmp_path: Path) -> None:
    one, other = [Prompt("row-1", "why?")], [Prompt("row-1", "why not?")]
    source = Path("hub:me/mine#train")
    assert digest_of(source, one) == digest_of(source, list(one)) != digest_of(source, other)
    file = tmp_path / "prompts.txt"
    file.write_text("why?\n")
    of_text = digest_of(file, one)
    assert digest_of(file, other) == of_text
    file.write_text("why not?\n")
    assert digest_of(file, other) != of_text
