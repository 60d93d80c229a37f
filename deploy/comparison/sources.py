"""What a comparison reads: prompts of files and of the Hub, and answers that somebody else made."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mara.actors.prompts import Prompt, check_unicode, load_prompts
from mara.common.errors import UserError
from mara.deploy.comparison.config import DatasetConfig


class HubDataset(NamedTuple):
    """Where the prompts of a known data set are."""

    name: str
    split: str
    prompt_column: str
    category_column: str | None = None


KNOWN = {
    "saferlhf": HubDataset("PKU-Alignment/PKU-SafeRLHF", "test", "prompt"),
    "beavertails": HubDataset("PKU-Alignment/BeaverTails-Evaluation", "test", "prompt", "category"),
    "harmfulqa": HubDataset("declare-lab/HarmfulQA", "train", "question", "topic"),
    "hhrlhf": HubDataset("Anthropic/hh-rlhf", "test", "chosen"),
    "ultrafeedback": HubDataset("HuggingFaceH4/ultrafeedback_binarized", "test_prefs", "prompt"),
}
"""By their usual names, in lower case without hyphens."""
FIRST_TURN = re.compile(r"\s*Human:(.*?)(?:\n\nAssistant:|\Z)", re.DOTALL)
"""What the user said first, in a column that holds whole conversations as HH-RLHF writes them."""


def hub_dataset(config: DatasetConfig) -> HubDataset:
    """The data set that ``config.hub`` names, with the settings beside it in place of what is known of it."""
    assert config.hub is not None
    known = KNOWN.get(config.hub.lower().replace("-", ""), HubDataset(config.hub, "test", "prompt"))
    return HubDataset(
        known.name,
        config.split or known.split,
        config.prompt_column or known.prompt_column,
        config.category_column or known.category_column,
    )


def load_dataset(name: str, config: DatasetConfig) -> list[Prompt]:
    """The first ``num_prompts`` prompts of data set ``name``.

    Raises:
        UserError: there is no such file or data set, a column is missing, or it has no prompts.
    """
    field = f"datasets.{name}"
    if config.path is not None:
        return load_prompts(config.path, f"{field}.path")[: config.num_prompts]
    source = hub_dataset(config)
    return prompts_of(_hub_rows(source, field), source, field, config.num_prompts)


def prompts_of(
    rows: Iterable[Mapping[str, Any]], source: HubDataset, field: str, num_prompts: int | None = None
) -> list[Prompt]:
    """The first ``num_prompts`` different prompts of ``rows``, which have the columns of ``source``.

    Ids are the rows' numbers. Of a conversation the user's first words are the prompt.

    Raises:
        UserError: a column is missing, holds something else than text, or there are no prompts.
    """
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, start=1):
        if num_prompts is not None and len(prompts) == num_prompts:
            break
        text = row.get(source.prompt_column)
        if not isinstance(text, str):
            raise UserError(
                f"{field}: {source.name} has no text in column {source.prompt_column!r}; name another in "
                f"{field}.prompt_column (there are {', '.join(map(str, row))})"
            )
        turn = FIRST_TURN.match(text)
        text = (turn[1] if turn else text).strip()
        if not text or text in prompts:
            continue
        check_unicode(text, f"{field}: {source.name}, row {number}")
        category = "" if source.category_column is None else row.get(source.category_column, "")
        prompts[text] = Prompt(f"row-{number}", text, str(category))
    if not prompts:
        raise UserError(f"{field}: {source.name}, split {source.split!r}, has no prompts; name another split")
    return list(prompts.values())


def _hub_rows(source: HubDataset, field: str) -> Iterable[Mapping[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{field}.hub: {source.name} is read from the Hugging Face Hub with the package datasets; pip "
            f"install datasets, or give a file in {field}.path"
        )
    datasets = importlib.import_module("datasets")
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(source.name, split=source.split)
    except Exception as error:
        # What the network and the files do arrives as the errors of several libraries.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{field}.hub: {source.name}, split {source.split!r}, cannot be read ({reason}); check name, "
            "split and access"
        ) from error
    return rows


class GivenAnswers:
    """Answers read from a file, found by the prompt's id or its text."""

    def __init__(self, path: Path, field: str) -> None:
        """Read JSON lines with ``response`` and ``id`` or ``prompt``.

        Raises:
            UserError: the file cannot be read, or a line is something else; names the line.
        """
        self._path, self._field = path, field
        self._by_id: dict[str, str] = {}
        self._by_prompt: dict[str, str] = {}
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{field}: {path} cannot be read ({reason}); give a .jsonl file") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self._add(line, f"{field}: {path}, line {number}")

    def _add(self, line: str, where: str) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); write one object on each line") from error
        if not isinstance(row, dict) or not isinstance(row.get("response"), str):
            raise UserError(f'{where}: needs an object with a text "response" and "id" or "prompt"')
        check_unicode(row["response"], where)
        if not isinstance(row.get("prompt", ""), str) or row.keys().isdisjoint({"id", "prompt"}):
            raise UserError(f'{where}: has neither "id" nor "prompt"; say which prompt the response answers')
        # Ids may be those of several data sets, so a prompt that is given tells more.
        key, found = (row["prompt"], self._by_prompt) if "prompt" in row else (row["id"], self._by_id)
        if found.setdefault(str(key), row["response"]) != row["response"]:
            raise UserError(f"{where}: {str(key)[:60]!r} is answered a second time; keep one answer to each")

    def to(self, dataset: str, prompts: Sequence[Prompt]) -> list[str]:
        """The answer to each of the ``prompts``, by text where that is given: ids may be of another data set.

        Raises:
            UserError: one is missing.
        """
        found = [self._by_prompt.get(prompt.prompt, self._by_id.get(prompt.id)) for prompt in prompts]
        missing = [prompt for prompt, response in zip(prompts, found, strict=True) if response is None]
        if missing:
            raise UserError(
                f"{self._field}: {self._path} has no response to {len(missing)} of the {len(prompts)} "
                f"prompts of datasets.{dataset}, such as {missing[0].id!r} ({missing[0].prompt[:60]!r}); "
                "add them"
            )
        return [response for response in found if response is not None]
