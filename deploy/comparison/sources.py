"""What a comparison reads: prompts of files and of the Hub, and answers that somebody else made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mara.actors.prompts import Prompt, check_unicode, load_prompts
from mara.common.errors import UserError
from mara.deploy.comparison.config import DatasetConfig
from mara.deploy.hub import HubDataset, hub_rows, known_dataset, prompts_of


def hub_dataset(config: DatasetConfig) -> HubDataset:
    """The data set that ``config.hub`` names, with the settings beside it in place of what is known of it."""
    assert config.hub is not None
    known = known_dataset(config.hub)
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
    return prompts_of(hub_rows(source, f"{field}.hub", f"{field}.path"), source, field, config.num_prompts)


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
        self._asked: dict[str, str] = {}
        """The prompt that each id stood for where it was looked up."""
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
        by_id = [p for p in prompts if p.prompt not in self._by_prompt and p.id in self._by_id]
        for prompt in by_id:
            if self._asked.setdefault(prompt.id, prompt.prompt) != prompt.prompt:
                raise UserError(
                    f"{self._field}: {self._path}: the id {prompt.id!r} stands for other prompts in two data "
                    'sets; give the "prompt" of each response'
                )
        missing = [prompt for prompt, response in zip(prompts, found, strict=True) if response is None]
        if missing:
            raise UserError(
                f"{self._field}: {self._path} has no response to {len(missing)} of the {len(prompts)} "
                f"prompts of datasets.{dataset}, such as {missing[0].id!r} ({missing[0].prompt[:60]!r}); "
                "add them"
            )
        return [response for response in found if response is not None]
