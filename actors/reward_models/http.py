"""A scoring server as a reward model.

Formats of requests and answers, besides our own: https://docs.vllm.ai (``/score``, ``/classify``) and
https://docs.sglang.ai (``/v1/classify``).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import httpx
import torch

from mara.actors.reward_models.config import HttpRewardConfig
from mara.common.contracts import Conversation
from mara.common.errors import UserError

MAX_ANSWER_BYTES = 16 << 20
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed."""
REFUSING = (400, 413, 422)
"""Status codes with which one request is refused, as it is too long, say; others may be taken."""
SHOWN = 200
"""Characters that are told of what a server says."""


class HttpFailed(Exception):
    """A server gave no scores; one line says why."""


class HttpRefused(HttpFailed):
    """A server does not take these conversations; one line says why. It may take others."""


class HttpRewardModel:
    """Posts conversations to a server, one batch after the other."""

    def __init__(self, config: HttpRewardConfig) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            UserError: the variable with the API key is not set.
        """
        self._config = config
        # Each request, with its address, would be a line of the log.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._client = httpx.Client(headers=_headers(config))

    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return float32 [B]. Blocks for ``timeout_s`` a batch at most.

        Raises:
            HttpRefused: the server refuses a batch, which it may for one of its conversations.
            HttpFailed: the server is away, refuses, or gives something else.
        """
        scores: list[float] = []
        for start in range(0, len(conversations), self._config.batch_size):
            batch = conversations[start : start + self._config.batch_size]
            answer = self._post(request_of(self._config, batch))
            scores += read_scores(self._config, answer, len(batch))
        return torch.tensor(scores, dtype=torch.float32)

    def _post(self, content: dict[str, Any]) -> Any:
        """The answer to ``content``, tried again while the server is away or busy."""
        deadline = time.monotonic() + self._config.timeout_s
        pause_s = self._config.retry_first_s
        for attempt in range(1, self._config.max_attempts + 1):
            try:
                return self._attempt(content, deadline)
            except (httpx.TransportError, _Busy) as error:
                why = _first_line(error)
                if attempt == self._config.max_attempts or time.monotonic() + pause_s >= deadline:
                    raise HttpFailed(f"{self._config.url}: {why} (attempt {attempt})") from None
            time.sleep(pause_s)
            pause_s *= 2
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, content: dict[str, Any], deadline: float) -> Any:
        left_s = max(0.01, deadline - time.monotonic())
        body = bytearray()
        with self._client.stream("POST", self._config.url, json=content, timeout=left_s) as response:
            if response.status_code in BUSY:
                raise _Busy(f"status {response.status_code}")
            if response.status_code in REFUSING:
                said = next(response.iter_text(SHOWN), "").strip()
                raise HttpRefused(f"{self._config.url}: status {response.status_code}: {said!r}")
            if response.status_code != 200:
                raise HttpFailed(f"{self._config.url}: status {response.status_code}")
            for part in response.iter_bytes():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise HttpFailed(f"{self._config.url}: the answer has more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > deadline:  # Each part alone may have been in time.
                    raise HttpFailed(f"{self._config.url}: no whole answer in {self._config.timeout_s:g} s")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise HttpFailed(f"{self._config.url}: the answer is not JSON") from None


class _Busy(Exception):
    """The server asks for patience."""


def request_of(config: HttpRewardConfig, batch: Sequence[Conversation]) -> dict[str, Any]:
    """What is posted for ``batch``."""
    if config.protocol == "mara":
        return {"conversations": [conversation._asdict() for conversation in batch]}
    content: dict[str, Any] = {} if config.model is None else {"model": config.model}
    # Servers apply a sigmoid or softmax to the logits unless they are told not to; older ones ignore this.
    content["use_activation"] = False
    if config.protocol == "vllm_score":
        content["text_1"] = [conversation.prompt for conversation in batch]
        content["text_2"] = [conversation.response for conversation in batch]
    else:
        content["input"] = [config.template.format(**conversation._asdict()) for conversation in batch]
    return content


def read_scores(config: HttpRewardConfig, answer: Any, count: int) -> list[float]:
    """``count`` scores of a server's answer, in the order of the request.

    Raises:
        HttpFailed: it has not the form that the protocol says.
    """
    try:
        if config.protocol == "mara":
            scores = [_number(score) for score in answer["scores"]]
        else:
            entries = sorted(answer["data"], key=lambda entry: int(entry["index"]))
            if [entry["index"] for entry in entries] != list(range(len(entries))):
                raise ValueError("index")
            scores = [_score_of(config, entry) for entry in entries]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise HttpFailed(
            f"{config.url}: the answer is not of protocol {config.protocol} ({reason})"
        ) from None
    if len(scores) != count:
        raise HttpFailed(f"{config.url}: {len(scores)} scores for {count} conversations")
    return scores


def _score_of(config: HttpRewardConfig, entry: dict[str, Any]) -> float:
    if config.protocol == "vllm_score":
        return _number(entry["score"])
    values = entry["probs"]
    if config.label is None and len(values) != 1:
        raise ValueError(f"probs has {len(values)} entries, set label")
    return _number(values[config.label or 0])


def _number(value: Any) -> float:
    """A score; null stands for one that the server could not give."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a score is a {type(value).__name__}")
    return float(value)


def read_api_key(variable: str | None) -> str | None:
    """The key in that variable of the environment, fit for a header; None if none is named.

    Raises:
        UserError: the variable is not set, or holds something else. The key is never shown.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"api_key_env={variable}: this variable is not set; export it, or leave it out")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"api_key_env={variable}: this variable holds no key; look at it")
    return key


def _headers(config: HttpRewardConfig) -> dict[str, str]:
    key = read_api_key(config.api_key_env)
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
