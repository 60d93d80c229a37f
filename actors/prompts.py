"""Prompts from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mara.buffer.codec import RecordLimits
from mara.common.errors import UserError
from mara.common.seeding import derive_seed

MAX_ID_BYTES = RecordLimits().max_text_bytes


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the LLM is asked."""

    id: str
    """Unique in its file. At most 512 bytes: it travels with every episode."""
    prompt: str
    """The user's words, without any template."""
    category: str = ""


def load_prompts(path: Path, field: str = "prompts") -> list[Prompt]:
    """Read prompts from JSON lines (``prompt``, optional ``id`` and ``category``) or, in a ``.txt`` file,
    one prompt a line. Empty lines are skipped.

    Args:
        field: the setting that names the file, for messages.

    Raises:
        UserError: the file is missing, empty, or has a malformed line or an id that is too long; names the
            line.
    """
    try:
        # Not splitlines(): JSON strings may hold U+2028 and its like.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {path} is not UTF-8 text; convert it") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}: {path} cannot be read ({reason}); give a .jsonl or .txt file") from error
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse(line, path, number, field)
        if prompt.id in prompts:
            raise UserError(
                f"{field}: {path}, line {number}: the id {prompt.id!r} stands there twice; make ids unique"
            )
        prompts[prompt.id] = prompt
    if not prompts:
        a_prompt = "a prompt" if _is_plain(path) else 'a JSON object with "prompt"'
        raise UserError(f"{field}: {path} has no prompts; put {a_prompt} on each line")
    return list(prompts.values())


def _parse(line: str, path: Path, number: int, field: str) -> Prompt:
    name = f"{path.stem}-{number}"
    if _is_plain(path):
        return Prompt(name, line.strip())
    where = f"{field}: {path}, line {number}"
    row = parse_json(line, where, 'write one object with "prompt" on each line')
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UserError(f'{where}: needs an object with a non-empty text "prompt", has {line.strip()[:60]!r}')
    identity = name if row.get("id") is None else str(row["id"])
    prompt = Prompt(identity, row["prompt"], str(row.get("category", "")))
    for text in (prompt.id, prompt.prompt, prompt.category):
        check_unicode(text, where)
    if (num_bytes := len(identity.encode())) > MAX_ID_BYTES:
        raise UserError(
            f"{where}: the id {identity[:20]!r}… has {num_bytes} bytes; give one of at most {MAX_ID_BYTES}"
        )
    return prompt


def _is_plain(path: Path) -> bool:
    return path.suffix.lower() == ".txt"


def parse_json(line: str, where: str, remedy: str) -> Any:
    """What one line of a file holds, which ``where`` names.

    Raises:
        UserError: it is not JSON; names ``where`` with the column.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: not JSON ({error.msg}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all bounds
        raise UserError(f"{where}: not JSON ({error}); {remedy}") from error


def check_unicode(text: str, where: str) -> None:
    """Refuse text with half a character (a lone surrogate), which no tokenizer and no file takes.

    JSON can spell it, and a terminal that does not speak UTF-8 makes it of every letter beyond ASCII.

    Raises:
        UserError: names ``where`` and the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start + 1} ({text[error.start]!a}) is not Unicode; write it in UTF-8"
        ) from error


def endless(prompts: Sequence[Prompt], seed: int) -> Iterator[Prompt]:
    """All prompts in a random order, then all in another, for ever."""
    draws = np.random.default_rng(derive_seed(seed, "prompts"))
    while True:
        yield from (prompts[index] for index in draws.permutation(len(prompts)))
