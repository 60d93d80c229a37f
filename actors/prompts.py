"""Prompts from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def load_prompts(path: Path) -> list[Prompt]:
    """Read prompts from JSON lines (``prompt``, optional ``id`` and ``category``) or, in a ``.txt`` file,
    one prompt a line. Empty lines are skipped.

    Raises:
        UserError: the file is missing, empty, or has a malformed line or an id that is too long; names the
            line.
    """
    try:
        # Not splitlines(): JSON strings may hold U+2028 and its like.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"prompts: {path} cannot be read ({error.strerror}); give a .jsonl or .txt file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompts: {path} is not UTF-8 text; convert it") from error
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse(line, path, number)
        if prompt.id in prompts:
            raise UserError(
                f"prompts: {path}, line {number}: the id {prompt.id!r} stands there twice; make ids unique"
            )
        prompts[prompt.id] = prompt
    if not prompts:
        raise UserError(f'prompts: {path} has no prompts; put one JSON object with "prompt" on each line')
    return list(prompts.values())


def _parse(line: str, path: Path, number: int) -> Prompt:
    name = f"{path.stem}-{number}"
    if path.suffix == ".txt":
        return Prompt(name, line.strip())
    where = f"prompts: {path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f'{where}: not JSON ({error}); write one object with "prompt" on each line'
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UserError(f'{where}: needs an object with a non-empty text "prompt", has {line.strip()[:60]!r}')
    identity = str(row.get("id", name))
    if (num_bytes := len(identity.encode("utf-8", "replace"))) > MAX_ID_BYTES:
        raise UserError(
            f"{where}: the id {identity[:20]!r}… has {num_bytes} bytes; give one of at most {MAX_ID_BYTES}"
        )
    return Prompt(identity, row["prompt"], str(row.get("category", "")))


def endless(prompts: Sequence[Prompt], seed: int) -> Iterator[Prompt]:
    """All prompts in a random order, then all in another, for ever."""
    draws = np.random.default_rng(derive_seed(seed, "prompts"))
    while True:
        yield from (prompts[index] for index in draws.permutation(len(prompts)))
