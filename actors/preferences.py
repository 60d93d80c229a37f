"""Human preference pairs: reading, cleaning and splitting them. Needs no LLM."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mara.actors.prompts import check_unicode, parse_json
from mara.common.errors import UserError
from mara.common.extras import install_extra

FORMAT_HINT = (
    'a row is {"prompt": "…", "chosen": "…", "rejected": "…"}, or with "messages": '
    '[{"role": "user", "content": "…"}, …] in place of "prompt"'
)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one conversation, of which a judge preferred the first."""

    messages: tuple[Message, ...]
    """The conversation so far, with at least one message of the role ``user``."""
    chosen: str
    rejected: str

    @property
    def group(self) -> str:
        """What pairs of the same prompt share: the first thing the user said, in lower case."""
        first = next(m.content for m in self.messages if m.role == "user")
        return " ".join(first.lower().split())


def read_preferences(source: str, split: str = "train") -> list[PreferencePair]:
    """Read pairs from a JSON or JSONL file, or from a data set of the Hugging Face Hub.

    ``chosen`` and ``rejected`` are strings or message lists, of which the last message is the answer;
    without ``prompt`` and ``messages`` the conversation before it is taken from ``chosen``. Other fields
    are ignored. ``split`` names a part of a Hub data set.

    Raises:
        UserError: the source is missing, has no pairs, or has a malformed row (named by its number).
    """
    is_file = source.endswith((".json", ".jsonl"))
    rows = _file_rows(Path(source).expanduser()) if is_file else _hub_rows(source, split)
    pairs = [_pair(row, where) for where, row in rows]
    if not pairs:
        raise UserError(f"pairs: {source} has no rows; {FORMAT_HINT}")
    return pairs


def drop_shared_answers(
    pairs: Sequence[PreferencePair], max_prompts: int = 2, min_chars: int = 80
) -> list[PreferencePair]:
    """Leave out pairs with an answer that is given to more than ``max_prompts`` different prompts.

    Such an answer cannot be a reply to what was asked. Public preference sets contain outputs made to
    fool an automatic judge, the same text for every prompt and always preferred. Answers shorter than
    ``min_chars`` ("You're welcome.") are left alone.
    """
    prompts: dict[str, set[tuple[Message, ...]]] = defaultdict(set)
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            if len(answer) >= min_chars:
                prompts[answer].add(pair.messages)
    shared = {answer for answer, seen in prompts.items() if len(seen) > max_prompts}
    return [pair for pair in pairs if pair.chosen not in shared and pair.rejected not in shared]


def prompt_fraction(group: str, seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def select_pairs(pairs: Sequence[PreferencePair], low: float, high: float, seed: int) -> list[PreferencePair]:
    """The pairs whose prompt falls into [low, high) by :func:`prompt_fraction`.

    All pairs of one prompt fall on the same side of any border, so selections with ranges that do not
    overlap share no prompt. Example: ``(0, 0.15)`` is held out, ``(0.15, 1)`` is fitted to.
    """
    return [pair for pair in pairs if low <= prompt_fraction(pair.group, seed) < high]


def _file_rows(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise UserError(f"pairs: {path} does not exist; give a JSON or JSONL file, or a Hub data set's name")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"pairs: {path} is not UTF-8 text (byte {error.start}); convert it") from error
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            where = f"pairs: {path}, line {error.lineno}, column {error.colno}"
            raise UserError(f"{where}: not JSON ({error.msg}); correct it") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"pairs: {path}: not JSON ({error}); correct it") from error
        if not isinstance(content, list):
            raise UserError(f"pairs: {path} is not a JSON list; {FORMAT_HINT}")
        return [(f"{path}, row {number}", row) for number, row in enumerate(content, 1)]
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append((where, parse_json(line, f"pairs: {where}", "correct it")))
    return rows


def _hub_rows(name: str, split: str) -> Iterable[tuple[str, Any]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"pairs: {name!r} is no .json or .jsonl file, and reading it from the Hugging Face Hub needs the "
            f"package datasets; {install_extra('hub')}"
        ) from error
    try:
        content = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"pairs: data set {name!r}, split {split!r}, cannot be read: {reason}") from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(content, 1))


def _pair(row: Any, where: str) -> PreferencePair:
    if not isinstance(row, Mapping):
        raise UserError(f"pairs: {where}: not an object; {FORMAT_HINT}")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise UserError(f"pairs: {where}: {name!r} is missing; {FORMAT_HINT}")
    chosen, before = _answer(row["chosen"], "chosen", where)
    rejected, _ = _answer(row["rejected"], "rejected", where)
    messages = before
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", where)
    elif isinstance(row.get("prompt"), str):
        messages = (Message("user", row["prompt"]),)
    elif row.get("prompt") is not None:
        messages = _messages(row["prompt"], "prompt", where)
    if not messages:
        raise UserError(f"pairs: {where}: neither 'prompt' nor 'messages' is given; {FORMAT_HINT}")
    if not any(message.role == "user" for message in messages):
        raise UserError(f"pairs: {where}: no message has the role 'user'; {FORMAT_HINT}")
    for text in (chosen, rejected, *itertools.chain.from_iterable(messages)):
        check_unicode(text, f"pairs: {where}")
    return PreferencePair(messages, chosen, rejected)


def _answer(value: Any, name: str, where: str) -> tuple[str, tuple[Message, ...]]:
    """The answer, and the conversation before it where ``value`` holds one."""
    if isinstance(value, str):
        return value.strip(), ()
    messages = _messages(value, name, where)
    if messages[-1].role != "assistant":
        raise UserError(
            f"pairs: {where}: {name!r} ends with {messages[-1].role!r}; it must end with 'assistant'"
        )
    return messages[-1].content.strip(), messages[:-1]


def _messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    fault = f'pairs: {where}: {name!r} must be a string or a list of {{"role": "…", "content": "…"}}'
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(fault)
    messages = []
    for item in value:
        if not isinstance(item, Mapping):
            raise UserError(fault)
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(fault)
        messages.append(Message(role, content))
    return tuple(messages)
