"""Prompts of data sets of the Hugging Face Hub, beside those of files."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mara.actors.prompts import Prompt, check_unicode, load_prompts
from mara.common.errors import UserError
from mara.common.extras import install_extra
from mara.deploy.config import HUB_PREFIX, is_of_hub


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
"""By their usual names, in lower case without hyphens. The splits are those to compare on."""
FIRST_TURN = re.compile(r"\s*Human:(.*?)(?:\n\nAssistant:|\Z)", re.DOTALL)
"""What the user said first, in a column that holds whole conversations as HH-RLHF writes them."""


def known_dataset(name: str) -> HubDataset:
    """What is known of the data set that goes by ``name``; of others: split ``test``, column ``prompt``."""
    return KNOWN.get(name.lower().replace("-", ""), HubDataset(name, "test", "prompt"))


def load_source(source: Path, field: str) -> list[Prompt]:
    """The prompts of a file, or of a Hub data set where ``source`` is ``hub:NAME#SPLIT``.

    Args:
        field: the setting that names them, for messages.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    if not is_of_hub(source):
        return load_prompts(source, field)
    name, _, split = str(source).removeprefix(HUB_PREFIX).partition("#")
    dataset = known_dataset(name)._replace(split=split)
    rows = hub_rows(dataset, f"{field}={source}", field)
    return prompts_of(rows, dataset, f"{field}={source}", remedy=f"give a file of its prompts in {field}")


def digest_of(source: Path, prompts: Iterable[Prompt]) -> str:
    """SHA-256 of the file, or of the ``prompts`` that the Hub gave: a data set may change under its name."""
    if not is_of_hub(source):
        return sha256(source.read_bytes()).hexdigest()
    return digest_of_prompts(prompts)


def digest_of_prompts(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of ids, texts and categories."""
    return sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


def prompts_of(
    rows: Iterable[Mapping[str, Any]],
    source: HubDataset,
    field: str,
    num_prompts: int | None = None,
    remedy: str | None = None,
) -> list[Prompt]:
    """The first ``num_prompts`` different prompts of ``rows``, which have the columns of ``source``.

    Ids are the rows' numbers. Of a conversation the user's first words are the prompt. ``remedy`` is what to
    do where that column is another one; None: name it in ``field``.

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
                f"{field}: {source.name} has no text in column {source.prompt_column!r}; "
                f"{remedy or f'name another in {field}.prompt_column'} (there are {', '.join(map(str, row))})"
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


def hub_rows(source: HubDataset, field: str, instead: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a split.

    Args:
        field: the setting that names the data set, for messages.
        instead: what takes a file in its place.

    Raises:
        UserError: the package datasets is missing, or the split cannot be read.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{field}: {source.name} is read from the Hugging Face Hub with the package datasets; "
            f"{install_extra('hub')}, or give a file in {instead}"
        )
    datasets = importlib.import_module("datasets")
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(source.name, split=source.split)
    except Exception as error:
        # What the network and the files do arrives as the errors of several libraries.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{field}: {source.name}, split {source.split!r}, cannot be read ({reason}); check name, "
            "split and access"
        ) from error
    return rows
