"""What a comparison has found so far, as files: a line for each answer and each score, written at once.

::

    FOLDER/config.yaml                          the settings
    FOLDER/comparison.json                      what must stay the same for it to go on
    FOLDER/prompts/DATASET.jsonl                id, prompt, category
    FOLDER/answers/DATASET/SYSTEM.jsonl         id, prompt, response, tokens, seconds, finish_reason
    FOLDER/scores/DATASET/SYSTEM/JUDGE.jsonl    id, score; where it compares: id, against, difference, …;
                                                refused, where a server would not judge: what it said
    FOLDER/report.json, report.md, report.html  made from the files above alone
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from mara.actors.prompts import Prompt
from mara.common.errors import UserError
from mara.common.files import write_whole

Row = dict[str, Any]


class Results:
    """The files of one comparison, written by one process. A line that was added outlives that process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exits = ExitStack()
        self._files: dict[Path, TextIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._exits.close()

    def prompts(self, dataset: str) -> list[Prompt]:
        """The prompts of a data set, in its order."""
        return [Prompt(**row) for row in read_rows(self.folder / "prompts" / f"{dataset}.jsonl")]

    def keep_prompts(self, dataset: str, prompts: Sequence[Prompt]) -> None:
        """Write the prompts of a data set: what is on the Hub may change."""
        path = self.folder / "prompts" / f"{dataset}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(_line(asdict(prompt)) for prompt in prompts))

    def answers(self, dataset: str, system: str) -> dict[str, Row]:
        """Answers by the prompt's id."""
        return {row["id"]: row for row in read_rows(self._answers(dataset, system))}

    def add_answer(self, dataset: str, system: str, row: Row) -> None:
        self._append(self._answers(dataset, system), row)

    def scores(self, dataset: str, system: str, judge: str) -> dict[str, Row]:
        """What a judge that scores, or the likelihood, says of a system's answers, by the prompt's id."""
        return {row["id"]: row for row in read_rows(self._scores(dataset, system, judge))}

    def verdicts(self, dataset: str, system: str, against: str, judge: str) -> dict[str, Row]:
        """What a judge that compares says of a system's answers against another's, by the prompt's id."""
        rows = read_rows(self._scores(dataset, system, judge))
        return {row["id"]: row for row in rows if row["against"] == against}

    def add_score(self, dataset: str, system: str, judge: str, row: Row) -> None:
        self._append(self._scores(dataset, system, judge), row)

    def _answers(self, dataset: str, system: str) -> Path:
        return self.folder / "answers" / dataset / f"{system}.jsonl"

    def _scores(self, dataset: str, system: str, judge: str) -> Path:
        return self.folder / "scores" / dataset / system / f"{judge}.jsonl"

    def _append(self, path: Path, row: Row) -> None:
        if path not in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_torn_line(path)
            self._files[path] = self._exits.enter_context(path.open("a", encoding="utf-8"))
        self._files[path].write(_line(row))
        self._files[path].flush()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; none if it is not there. A last line that is unfinished is left out.

    Raises:
        UserError: another line is damaged.
    """
    if not path.is_file():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: damaged ({error}); delete the line, and it is made again"
            ) from error
        rows.append(row)
    return rows


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that was not finished: its writer was killed."""
    if not path.is_file():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
